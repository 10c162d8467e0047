"""A range's missing texts on their way: packed into requests, divided where refused, stored as the answers come.

What goes wrong with a request is decided in `embedding.client`; here, what becomes of the texts in it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from songvec_assets.cache.manifest import Rejection
from songvec_assets.cache.plan import Text
from songvec_assets.cache.writing import AnswerGatherer
from songvec_assets.embedding.answers import hinted_texts
from songvec_assets.embedding.batching import LearnedLimits, bisect, pack_requests
from songvec_assets.embedding.budget import Budget, Reservation
from songvec_assets.embedding.embedder import Embedder, RequestHooks
from songvec_assets.embedding.health import ServerHealth
from songvec_assets.embedding.pricing import Quota, TokenEstimator
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import (
    BudgetExceededError,
    ProviderError,
    RequestFailsError,
    RequestRefusedError,
    RequestTooLargeError,
    RequestTooSlowError,
    ServerSickError,
    StoppedError,
)

MAX_REFUSALS_IN_A_ROW = 25
"""So many texts refused one after another, and none accepted between them, are not the songs' fault."""
_ENOUGH_TEXTS = 400
"""From so many texts on, too many bad ones end the run at once; of fewer, a handful in one place may be chance."""
_N_BAD_ALONE = 3
"""Answers without a vector for a text, the last of them alone, before it is rejected."""
_GROWTH = 1.1
"""By which requests grow again with each answer, after one took too long."""
_LEAST_HINT = 8
"""Texts per request that a server's words may hint at, at least: real limits begin at 10 (DashScope)."""


class _OutgrownError(Exception):
    """A limit was learned while the request waited for its place: it is divided, and was not sent."""


class Counters(Protocol):
    """What is told of a range's texts."""

    def all_started(self) -> None:
        """The last request has begun: another range may use what is left of the quota."""

    def count_tokens(self, n_tokens: int) -> None:
        """So many tokens were billed."""

    def count_answer(self, n_songs: int, batch: EmbeddingBatch) -> None:
        """So many songs have their vectors on disk."""

    def count_set_aside(self, song_ids: list[int], reason: str) -> None:
        """These songs are set aside."""


@dataclass
class SendContext:
    """What all requests of a run share.

    Attributes:
        embedder: makes the vectors.
        quota: limits of a request.
        budget: stops before the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        slots: requests begun at most, over all ranges.
        check_halted: raises where no further request may start.
        on_error: notified of each request's error at once.
        server: that is asked; the reason of a rejection begins with it, so that another server is asked again.
        on_learned: notified of a limit of the server.
        health: of the server.
        limits: of a request, as the server was found to have them; for all ranges of the run.
        slow_bytes: of a request; smaller, once one took too long, and larger with each answer since.
        n_refused_in_a_row: texts that were refused since one was accepted, in any range.
    """

    embedder: Embedder
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    slots: asyncio.Semaphore
    check_halted: Callable[[], None]
    on_error: Callable[[Exception], None]
    server: str
    on_learned: Callable[[str], None]
    health: ServerHealth = field(default_factory=ServerHealth)
    limits: LearnedLimits = field(default_factory=LearnedLimits)
    slow_bytes: float = math.inf
    n_refused_in_a_row: int = 0

    def next_request(self) -> tuple[float, float]:
        """Texts and bytes that the next request may hold, as far as tokens and the server's limits are known."""
        n_texts, n_bytes = self.limits.next_request()
        most_bytes = self.estimator.n_bytes(self.quota.max_request_tokens)
        return min(self.quota.max_request_texts, n_texts), min(most_bytes, n_bytes, self.slow_bytes)

    def count_accepted(self, n_texts: int) -> None:
        """So many texts got their vectors in one answer."""
        self.health.count_good(n_texts)
        self.n_refused_in_a_row = 0
        self.slow_bytes *= _GROWTH
        if self.slow_bytes > self.estimator.n_bytes(self.quota.max_request_tokens):
            self.slow_bytes = math.inf


@dataclass
class RangeSender:
    """Sends one range's texts and stores what comes back.

    Attributes:
        context: what all requests share.
        gatherer: where the vectors go.
        check_held: raises where the range's lock was lost.
        counters: is notified.
        rejected: songs that the provider was found to reject.
    """

    context: SendContext
    gatherer: AnswerGatherer
    check_held: Callable[[], None]
    counters: Counters
    rejected: list[Rejection] = field(default_factory=list)
    _errors: list[Exception] = field(default_factory=list)
    _refused: list[tuple[Text, str]] = field(default_factory=list)
    _refused_at: float = 0.0
    _is_blamed: bool = False
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, texts: Sequence[Text]) -> None:
        """Send all texts, each once; answers that are on their way when something fails are still stored.

        Raises:
            SongvecError: the first thing that went wrong, when nothing is on its way any more.
        """
        pieces = pack_requests([each.n_bytes for each in texts], self.context.next_request)
        sending: list[asyncio.Task[None]] = []
        while True:
            await self.context.slots.acquire()
            # cut now, not before: answers that came meanwhile may have taught what a request may hold
            piece = next(pieces, None) if self._may_go_on() else None
            if piece is None:
                self.context.slots.release()
                break
            sending.append(asyncio.create_task(self._send_one(texts[piece])))
        self.counters.all_started()
        await asyncio.gather(*sending)
        if self._errors:
            if not self._is_blamed and self.context.health.last_good_at > self._refused_at:
                self._reject()  # they are proven, whatever else went wrong
            raise next((error for error in self._errors if not isinstance(error, StoppedError)), self._errors[0])
        await self._check_rejections()
        self._reject()

    def _may_go_on(self) -> bool:
        try:
            self.check_going_on()
        except Exception as error:  # noqa: BLE001 - raised when the answers on their way are stored
            self._errors.append(error)
        return not self._errors

    def check_going_on(self) -> None:
        """Raise where no request of the range may go any more; one that has its share of the budget still may."""
        self.context.check_halted()
        if any(not isinstance(error, BudgetExceededError) for error in self._errors):
            raise StoppedError("another request of the range failed")

    async def check_sendable(self) -> None:
        """Raise where a request must not go now."""
        self.check_going_on()
        async with self._checking:
            await asyncio.to_thread(self.check_held)

    async def _send_one(self, texts: Sequence[Text]) -> None:
        try:
            await self._send_divided(texts)
        except Exception as error:  # noqa: BLE001 - the other requests of the range are paid for: let them be stored
            self._errors.append(error)
            # what had its share of the budget before may still go; what was stopped had its reason elsewhere
            if not isinstance(error, (BudgetExceededError, StoppedError)):
                self.context.on_error(error)
        finally:
            self.context.slots.release()

    async def _send_divided(self, texts: Sequence[Text], n_bad_before: int = 0, is_part: bool = False) -> bool:
        """Send one request; one that fails is halved until the text that makes it fail stands alone.

        Args:
            texts: of the request.
            n_bad_before: answers in a row that had no vector for any of them.
            is_part: whether they are a part of a request that failed again and again.

        Returns:
            Whether all texts were accepted.
        """
        if self.is_too_large(texts):
            return await self._send_in_turn(texts, n_bad_before, is_part)
        n_tokens = sum(self.context.estimator.estimate(each.n_bytes for each in texts))
        reservation = Reservation(self.context.budget, n_tokens, self.check_going_on)
        hooks = _Hooks(self, texts, reservation, is_part)
        refusal: RequestRefusedError | None = None
        batch: EmbeddingBatch | None = None
        n_songs, bad, asked_at = 0, list(texts), time.monotonic()
        try:
            # before anything goes, the provider's probe included
            await hooks.before_try()
            await self.check_sendable()
            with self.gatherer.expecting():
                batch = await self.context.embedder.generate_embeddings_batch([each.text for each in texts], hooks)
            reservation.n_billed += batch.n_tokens
            bad = [texts[row] for row in batch.bad]
            n_songs = await self._store(texts, batch)
            self.context.limits.count_accepted(len(texts), sum(each.n_bytes for each in texts))
        except RequestRefusedError as error:
            refusal = error
        except _OutgrownError:
            batch = None
        finally:
            # after the answer is stored: what goes wrong here must not cost it
            self.counters.count_tokens(reservation.n_billed)
            await reservation.settle()
        if refusal:
            return await self._divide(texts, refusal)
        if batch is None:
            return await self._send_in_turn(texts, n_bad_before, is_part)
        if len(bad) < len(texts):
            self.context.count_accepted(len(texts) - len(bad))
        self.counters.count_answer(n_songs, batch)
        return not bad or await self._send_bad(bad, n_bad_before + 1, len(texts) == 1, asked_at)

    async def _store(self, texts: Sequence[Text], batch: EmbeddingBatch) -> int:
        """Store an answer: each text's vector for every song that has the text; how many songs that are."""
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
        """Whether a request of these texts is known to be refused for its size."""
        return self.context.limits.are_exceeded_by(len(texts), sum(each.n_bytes for each in texts))

    async def _send_in_turn(self, texts: Sequence[Text], n_bad_before: int, is_part: bool) -> bool:
        """Send texts in requests of the size that the server takes, one after the other."""
        pieces = pack_requests([each.n_bytes for each in texts], self.context.next_request)
        return all([await self._send_divided(texts[piece], n_bad_before, is_part) for piece in pieces])

    async def _send_bad(self, bad: Sequence[Text], n_bad: int, was_alone: bool, asked_at: float) -> bool:
        """Send again the texts that an answer had no vector for: all together, then halved, since one may spoil others.

        Args:
            bad: the texts.
            n_bad: answers in a row that had no vector for them.
            was_alone: whether the last of these was of one text.
            asked_at: when the last of them was asked for.
        """
        if not await self._answers_well(asked_at):
            raise ProviderError(
                f"{len(bad):,} texts got a vector that is zero, null or not finite, and so does a plain one: the fault "
                "is the server's. No song is rejected for it, and nothing more is sent. See the server's log and its "
                "precision (some models give NaN in fp16), then start the same command again"
            )
        if was_alone and n_bad >= _N_BAD_ALONE:
            reason = "gives no vector for the text, alone or with others: its values are zero, null or not finite"
            self._refuse(bad[0], f"{self.context.server} {reason}", is_refusal=False)
            return False
        parts = [bad] if n_bad == 1 or len(bad) == 1 else bisect(bad)
        # one after the other: the first may show whether the server is the fault
        return all([await self._send_divided(part, n_bad) for part in parts])

    async def _answers_well(self, since: float) -> bool:
        answers = await self.context.embedder.answers_well(since)
        n_tokens = self.context.embedder.take_probe_tokens()
        self.counters.count_tokens(n_tokens)
        await asyncio.to_thread(self.context.budget.settle, 0, n_tokens)
        return answers

    async def _divide(self, texts: Sequence[Text], refusal: RequestRefusedError) -> bool:
        fails = isinstance(refusal, RequestFailsError)
        if len(texts) == 1:
            self._refuse(texts[0], str(refusal), is_refusal=not fails)
            return False
        if isinstance(refusal, RequestTooSlowError):
            half_bytes = sum(each.n_bytes for each in texts) / 2
            self.context.slow_bytes = min(self.context.slow_bytes, half_bytes)
        limits, n_bytes = self.context.limits, sum(each.n_bytes for each in texts)
        hint = hinted_texts(str(refusal), len(texts)) or 0
        size = max(limits.most_texts if limits.are_known else 0, hint if hint >= _LEAST_HINT else 0)
        parts: Sequence[Sequence[Text]] = bisect(texts)
        if 0 < size < len(texts):
            parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        all_accepted = all([await self._send_divided(part, is_part=fails) for part in parts])
        if all_accepted and not isinstance(refusal, RequestTooSlowError):
            # it was the size, and not one text
            is_for_size = isinstance(refusal, RequestTooLargeError)
            if limits.count_refused(len(texts), n_bytes, is_for_size):
                self.context.on_learned(
                    f"{self.context.server} refused a request of {len(texts):,} texts and {n_bytes:,} bytes, and took "
                    f"its parts: from now on requests have up to {limits.most_texts:,} texts and {limits.most_bytes:,} "
                    f"bytes, and grow slowly. Set SONGVEC_MAX_REQUEST_TEXTS={limits.most_texts} to begin so"
                )
        return all_accepted

    def _refuse(self, text: Text, reason: str, is_refusal: bool) -> None:
        """Take in that a text stands alone and got no vector; `is_refusal`: the provider said that it is the text.

        Raises:
            ProviderError: too many do: the fault is not the songs'.
        """
        self._refused.append((text, reason))
        self._refused_at = time.monotonic()
        if text.rejected_before:  # that it is refused again says nothing new of the server
            return
        if is_refusal:
            self.context.n_refused_in_a_row += 1
            if self.context.n_refused_in_a_row > MAX_REFUSALS_IN_A_ROW:
                self._is_blamed = True
                raise ProviderError(
                    f"{MAX_REFUSALS_IN_A_ROW} texts in a row were refused, so the fault is not the songs'. {reason}. "
                    "None of this range's is rejected. Check the model, its dimensions and the account, then start the "
                    "same command again"
                )
            return
        health = self.context.health
        health.count_bad(text.text_hash)
        if health.is_sick() and health.n_texts() >= _ENOUGH_TEXTS:
            self._is_blamed = True
            raise ProviderError(
                f"of the last {health.n_texts():,} texts {health.n_bad:,} fail though others succeed, more than songs "
                f"can be at fault for: the server is. {reason}. None of this range's is rejected, and nothing more is "
                "sent. See the server's log, then start the same command again"
            )

    async def _check_rejections(self) -> None:
        """Refuse to reject texts that may not be at fault.

        Raises:
            ServerSickError: too many fail for that; other ranges may show that it is the texts.
            ProviderError: no other text was accepted after them, and a plain one is not.
        """
        if not self._refused:
            return
        health = self.context.health
        if health.is_sick() and not all(text.rejected_before for text, _ in self._refused):
            raise ServerSickError(
                f"of {health.n_texts():,} texts {health.n_bad:,} fail though others succeed, more than songs can be at "
                f"fault for: the server is, unless other ranges show that it is not. {self._refused[-1][1]}. None of "
                "this range's is rejected. See the server's log, then start the same command again"
            )
        if not await self._answers_well(self._refused_at):
            raise ProviderError(
                f"the last {len(self._refused)} texts were refused, and so is a plain one: {self._refused[-1][1]}. "
                "None of them is rejected. Check the model and the account, then start the same command again"
            )

    def _reject(self) -> None:
        for text, reason in self._refused:
            self.rejected += [Rejection(song_id, text.text_hash, reason) for song_id in text.song_ids]
            self.counters.count_set_aside(text.song_ids, reason)


@dataclass
class _Hooks(RequestHooks):
    """What is asked and counted around the tries of one request of a range."""

    sender: RangeSender
    texts: Sequence[Text]
    reservation: Reservation
    is_part: bool = False

    async def before_try(self) -> None:
        await self.reservation.grow()

    def check_size(self) -> None:
        if self.sender.is_too_large(self.texts):
            raise _OutgrownError

    async def before_send(self) -> None:
        await self.sender.check_sendable()

    def count_spoilt(self, n_tokens: int) -> None:
        self.reservation.n_billed += n_tokens
