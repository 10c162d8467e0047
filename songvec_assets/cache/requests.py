"""A range's missing texts: packed into requests, divided if refused, stored as answers arrive.

When to add here: another way to divide or resend the texts of a failed request. Keep out: retries of a request
(`embedding.client`), and whether a text is rejected (`rejections`).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from songvec_assets.cache.context import SendContext
from songvec_assets.cache.plan import FillReport, Text
from songvec_assets.cache.rejections import RefusedTexts
from songvec_assets.cache.writing import AnswerGatherer
from songvec_assets.embedding.answers import hinted_texts
from songvec_assets.embedding.batching import bisect, pack_requests
from songvec_assets.embedding.reservation import Reservation
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import (
    BudgetExceededError,
    ProviderError,
    RequestFailsError,
    RequestRefusedError,
    RequestTooLargeError,
    RequestTooSlowError,
    StoppedError,
)

_N_BAD_ALONE = 3
"""Answers without a vector for a text, the last one to the text alone, before it is rejected."""
_LEAST_HINT = 8
"""The smallest number in a refusal that is tried as a limit of texts: real limits begin at 10 (DashScope)."""


class _TooLargeNowError(Exception):
    """A limit was learned while the request waited: it was not sent, and is divided."""


@dataclass
class RangeSender:
    """Sends one range's texts and stores what comes back.

    Attributes:
        report: of the range; counts what is sent and what comes back.
        gatherer: stores the vectors.
        check_held: raises if the range's lock was lost.
        let_next_begin: called when another range may use the rest of the quota.
        refused: the texts that got no vector, and the songs rejected for it.
    """

    context: SendContext
    report: FillReport
    gatherer: AnswerGatherer
    check_held: Callable[[], None]
    let_next_begin: Callable[[], None]
    _all_started: bool = False
    _errors: list[Exception] = field(default_factory=list)
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.refused = RefusedTexts(self.context, self.report)

    async def send(self, texts: Sequence[Text]) -> None:
        """Send all texts, each once; requests in flight when something fails are still stored.

        Raises:
            SongvecError: the first error, once nothing is in flight any more.
        """
        pieces = pack_requests([each.n_bytes for each in texts], self.context.next_request)
        sending: list[asyncio.Task[None]] = []
        while True:
            await self.context.slots.acquire()
            # packed only now: answers that arrived meanwhile may have taught a limit of requests
            piece = next(pieces, None) if self._may_go_on() else None
            if piece is None:
                self.context.slots.release()
                break
            sending.append(asyncio.create_task(self._send_one(texts[piece])))
        self._all_started = True
        self._pass_turn()
        await asyncio.gather(*sending)
        if self._errors:
            if self.refused.others_succeeded:  # even if something else failed
                self.refused.reject()
            raise next((error for error in self._errors if not isinstance(error, StoppedError)), self._errors[0])
        await self.refused.check()
        self.refused.reject()

    def _may_go_on(self) -> bool:
        try:
            self.check_going_on()
        except Exception as error:  # noqa: BLE001 - raised after the requests in flight are stored
            self._errors.append(error)
        return not self._errors

    def check_going_on(self) -> None:
        """Raise if no further request may be sent; after a budget error, those with a reservation still may."""
        self.context.check_halted()
        if any(not isinstance(error, BudgetExceededError) for error in self._errors):
            raise StoppedError("another request of the range failed")

    async def check_sendable(self) -> None:
        """Raise if a request must not be sent now."""
        self.check_going_on()
        async with self._checking:
            await asyncio.to_thread(self.check_held)

    async def _send_one(self, texts: Sequence[Text]) -> None:
        try:
            await self._send_divided(texts)
        except Exception as error:  # noqa: BLE001 - the other requests are paid for, and must be stored
            self._errors.append(error)
            # requests with a reservation may still be sent; the cause of a stop is noted elsewhere
            if not isinstance(error, (BudgetExceededError, StoppedError)):
                self.context.note_error(error)
        finally:
            self.context.slots.release()

    async def _send_divided(self, texts: Sequence[Text], n_bad_before: int = 0, is_part: bool = False) -> bool:
        """Send one request; if it fails, it is divided until the failing text is alone.

        Args:
            n_bad_before: answers in a row without a vector for any of them.
            is_part: whether they are part of a request that failed repeatedly.

        Returns:
            Whether all texts were accepted.
        """
        if self.is_too_large(texts):
            return await self._send_in_turn(texts, n_bad_before, is_part)
        n_tokens = sum(self.context.estimator.estimate(each.n_bytes for each in texts))
        request = _RangeRequest(
            self.context.embedder,
            self.context.budget,
            n_tokens,
            check=self.check_going_on,
            sender=self,
            texts=texts,
            is_part=is_part,
        )
        refusal: RequestRefusedError | None = None
        batch: EmbeddingBatch | None = None
        bad = list(texts)
        n_songs = 0
        asked_at = time.monotonic()
        try:
            async with request:
                if not self.report.n_embedded:  # before the probe, which no hook precedes
                    await self.check_sendable()
                with self.gatherer.expecting():
                    batch = await request.send([each.text for each in texts])
                bad = [texts[row] for row in batch.bad]
                n_songs = await self._store(texts, batch)
            self.context.limits.count_accepted(len(texts), sum(each.n_bytes for each in texts))
        except RequestRefusedError as error:
            refusal = error
        except _TooLargeNowError:
            pass  # it was not sent: there is no batch
        finally:
            self.report.n_tokens += request.n_billed
        if refusal:
            return await self._divide(texts, refusal)
        if batch is None:
            return await self._send_in_turn(texts, n_bad_before, is_part)
        if len(bad) < len(texts):
            self.context.count_accepted(len(texts) - len(bad))
        self._count_answer(n_songs, batch)
        return not bad or await self._send_bad(bad, n_bad_before + 1, len(texts) == 1, asked_at)

    def _count_answer(self, n_songs: int, batch: EmbeddingBatch) -> None:
        self.report.n_embedded += n_songs
        self.report.n_retries += batch.n_retries
        self.report.n_limited += batch.n_limited
        self.context.advance(n_songs, self.report.range)
        self._pass_turn()

    def _pass_turn(self) -> None:
        # until the provider has answered well it may refuse the whole run: one range is enough to find out
        if self._all_started and self.context.total("n_embedded"):
            self.let_next_begin()

    async def _store(self, texts: Sequence[Text], batch: EmbeddingBatch) -> int:
        """Store each text's vector for every song that has the text; return the number of these songs."""
        bad = set(batch.bad)
        rows = [
            (song_id, each.text_hash, place)
            for place, each in enumerate(texts)
            if place not in bad
            for song_id in each.song_ids
        ]
        if rows:
            song_ids, text_hashes, places = zip(*rows, strict=True)
            vectors = batch.embeddings if len(rows) == len(texts) and not bad else batch.embeddings[list(places)]
            await self.gatherer.store(song_ids, text_hashes, vectors)
        return len(rows)

    def is_too_large(self, texts: Sequence[Text]) -> bool:
        """Whether a request of these texts is known to be too large for the server."""
        return self.context.limits.are_exceeded_by(len(texts), sum(each.n_bytes for each in texts))

    async def _send_in_turn(self, texts: Sequence[Text], n_bad_before: int, is_part: bool) -> bool:
        """Send texts in requests that the server accepts, one after the other."""
        pieces = pack_requests([each.n_bytes for each in texts], self.context.next_request)
        return all([await self._send_divided(texts[piece], n_bad_before, is_part) for piece in pieces])

    async def _send_bad(self, bad: Sequence[Text], n_bad: int, was_alone: bool, asked_at: float) -> bool:
        """Send texts without a vector again: first together, then in halves, since one may spoil the others.

        Args:
            bad: the texts.
            n_bad: answers in a row without a vector for them.
            was_alone: whether the last answer was to a single text.
            asked_at: when the last request was sent.
        """
        if not await self.refused.answers_well(asked_at):
            raise ProviderError(
                f"{len(bad):,} texts got a vector that is zero, null or not finite, and so does a plain one: the fault "
                "is the server's. No song is rejected for it, and nothing more is sent. See the server's log and its "
                "precision (some models give NaN in fp16), then start the same command again",
                "provider.failing",
            )
        if was_alone and n_bad >= _N_BAD_ALONE:
            reason = "gives no vector for the text, alone or with others: its values are zero, null or not finite"
            self.refused.add(bad[0], f"{self.context.server} {reason}", is_refusal=False)
            return False
        parts = [bad] if n_bad == 1 or len(bad) == 1 else bisect(bad)
        # one after the other: the first may show that the server is at fault
        return all([await self._send_divided(part, n_bad) for part in parts])

    async def _divide(self, texts: Sequence[Text], refusal: RequestRefusedError) -> bool:
        fails = isinstance(refusal, RequestFailsError)
        if len(texts) == 1:
            self.refused.add(texts[0], str(refusal), is_refusal=not fails)
            return False
        limits = self.context.limits
        n_bytes = sum(each.n_bytes for each in texts)
        if isinstance(refusal, RequestTooSlowError):
            self.context.slow_bytes = min(self.context.slow_bytes, n_bytes / 2)
        hint = hinted_texts(str(refusal), len(texts)) or 0
        size = max(limits.most_texts if limits.are_known else 0, hint if hint >= _LEAST_HINT else 0)
        parts: Sequence[Sequence[Text]] = bisect(texts)
        if 0 < size < len(texts):
            parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        all_accepted = all([await self._send_divided(part, is_part=fails) for part in parts])
        if all_accepted and not isinstance(refusal, RequestTooSlowError):
            # the size was at fault, not a text
            is_for_size = isinstance(refusal, RequestTooLargeError)
            if limits.count_refused(len(texts), n_bytes, is_for_size):
                self.context.report_trouble(
                    f"{self.context.server} refused a request of {len(texts):,} texts and {n_bytes:,} bytes, and took "
                    f"its parts: from now on requests have up to {limits.most_texts:,} texts and {limits.most_bytes:,} "
                    f"bytes, and grow slowly. Set SONGVEC_MAX_REQUEST_TEXTS={limits.most_texts} to begin so"
                )
        return all_accepted


@dataclass
class _RangeRequest(Reservation):
    """One request of a range: it is checked immediately before it is sent, too."""

    sender: RangeSender
    texts: Sequence[Text]
    is_part: bool = False

    def check_size(self) -> None:
        if self.sender.is_too_large(self.texts):
            raise _TooLargeNowError

    async def before_send(self) -> None:
        await self.sender.check_sendable()
        await super().before_send()
