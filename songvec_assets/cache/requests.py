"""A range's missing texts: packed into requests, divided where refused, stored as the answers come.

What goes wrong with a request is decided in `embedding.client`; here, what becomes of the texts in it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from songvec_assets.cache.manifest import Rejection
from songvec_assets.cache.plan import FillReport, Text
from songvec_assets.cache.writing import AnswerGatherer
from songvec_assets.embedding.answers import hinted_texts
from songvec_assets.embedding.batching import LearnedLimits, bisect, pack_requests
from songvec_assets.embedding.budget import Budget, Reservation
from songvec_assets.embedding.client import Embedder, RequestHooks
from songvec_assets.embedding.health import ServerHealth
from songvec_assets.embedding.pricing import Quota, TokenEstimator
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import (
    BudgetExceededError,
    ProviderError,
    ProviderUnavailableError,
    RequestFailsError,
    RequestRefusedError,
    RequestTooLargeError,
    RequestTooSlowError,
    ServerSickError,
    StoppedError,
    StoreError,
)
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange

MAX_REFUSALS_IN_A_ROW = 25
"""If more texts are refused one after another, and none accepted between them, the fault is not the songs'."""
_ENOUGH_TEXTS = 400
"""From this number of texts on, too many bad ones end the run at once; of fewer, a few in one place may be chance."""
_N_BAD_ALONE = 3
"""Answers without a vector for a text, the last of them alone, before it is rejected."""
_GROWTH = 1.1
"""By which requests grow again with each answer, after one took too long."""
_LEAST_HINT = 8
"""Texts per request that a server's words may hint at, at least: real limits begin at 10 (DashScope)."""


class _OutgrownError(Exception):
    """A limit was learned while the request waited for its place: it is divided, and was not sent."""


@dataclass
class SendContext:
    """What all requests of a run share: the means, the rules, what was learned and counted so far.

    Attributes:
        embedder_factory: makes what makes the vectors; called once, in the event loop, when a first text must be sent.
            Its argument is notified of every bad answer, and of long waits for the first.
        quota: limits of a request.
        budget: stops before the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        concurrency: requests in flight at most; how many there are follows from the quota and the latency.
        server: that is asked; the reason of a rejection begins with it, so that another server is asked again.
        run: is notified of songs, rate and dollars; once it is stopped, no further request starts.
        health: of the server.
        limits: of a request, as the server was found to have them; for all ranges of the run.
        slow_bytes: of a request; smaller, once one took too long, and larger with each answer since.
        n_refused_in_a_row: texts that were refused since one was accepted, in any range.
        is_proven: whether the provider has answered well in this run.
        n_songs, n_done, n_free: of all ranges; done so far; and of those the ones that no request was sent for.
        n_expected: tokens, as estimated before the first request of each range.
        fatal: why no further request may start.
        over_budget: why no further range may begin.
    """

    embedder_factory: Callable[[Callable[[str], None]], Embedder]
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    concurrency: int
    server: str
    run: RunContext
    health: ServerHealth = field(default_factory=ServerHealth)
    limits: LearnedLimits = field(default_factory=LearnedLimits)
    slow_bytes: float = math.inf
    n_refused_in_a_row: int = 0
    is_proven: bool = False
    n_songs: int = 0
    n_done: int = 0
    n_free: int = 0
    n_retries: int = 0
    n_limited: int = 0
    n_expected: int = 0
    fatal: Exception | None = None
    over_budget: BudgetExceededError | None = None

    @cached_property
    def embedder(self) -> Embedder:
        """What makes the vectors; it belongs to the event loop that first asks for it."""
        return self.embedder_factory(self.report_trouble)

    @cached_property
    def slots(self) -> asyncio.Semaphore:
        """Requests begun at most, over all ranges."""
        return asyncio.Semaphore(self.concurrency)

    async def close(self) -> None:
        """Give the embedder's connections back, if it was used, and settle what its plain texts were billed."""
        if "embedder" in self.__dict__:
            try:
                await asyncio.to_thread(self.budget.settle, 0, self.embedder.take_probe_tokens())
            finally:
                await self.embedder.close()

    def next_request(self) -> tuple[float, float]:
        """Texts and bytes that the next request may hold, as far as tokens and the server's limits are known."""
        n_texts, n_bytes = self.limits.next_request()
        most_bytes = self.estimator.n_bytes(self.quota.max_request_tokens)
        return min(self.quota.max_request_texts, n_texts), min(most_bytes, n_bytes, self.slow_bytes)

    def count_accepted(self, n_texts: int) -> None:
        """Record that n texts got their vectors in one answer."""
        self.health.count_good(n_texts)
        self.n_refused_in_a_row = 0
        self.slow_bytes *= _GROWTH
        if self.slow_bytes > self.estimator.n_bytes(self.quota.max_request_tokens):
            self.slow_bytes = math.inf

    def note_error(self, error: Exception) -> None:
        """Let no further request start where going on is pointless: one range may fail for what is in it."""
        if isinstance(error, BudgetExceededError):
            # no further range begins, but what has its share of the budget is still sent
            self.over_budget = self.over_budget or error
        elif not isinstance(error, (StoreError, ProviderUnavailableError)):
            self.fatal = self.fatal or error

    def check_halted(self) -> None:
        """Raise where no further request may start."""
        if self.fatal:
            raise self.fatal
        self.run.check_stop()

    def advance(self, n_songs: int, song_range: SongIdRange, are_free: bool = False) -> None:
        """Report n_songs more that need nothing further; `are_free` if no request was sent for them."""
        self.n_done += n_songs
        self.n_free += n_songs if are_free else 0
        self.report(song_range.key)

    def report_trouble(self, words: str) -> None:
        """Report that something goes wrong, or a limit of the server."""
        self.report(words, is_trouble=True)

    def report(self, what: str, is_trouble: bool = False) -> None:
        """Report how far the run has come, with a few words on what it does."""
        note = f"{what}, ${self.budget.usd:,.4f} so far"
        used = self.embedder.quota_used if "embedder" in self.__dict__ else None
        if used is not None:
            note += f", {used:.0%} of the quota used, {self.n_retries:,} retries, {self.n_limited:,} of them after 429"
        if self.run.stop.is_set():
            note += "; stopping: requests in flight are still stored"
        self.run.report(Progress("embed songs", self.n_done, self.n_songs, "songs", note, is_trouble, self.n_free))


@dataclass
class RangeSender:
    """Sends one range's texts and stores what comes back.

    Attributes:
        context: what all requests of the run share.
        report: of the range; counts what is sent and what comes back.
        gatherer: where the vectors go.
        check_held: raises where the range's lock was lost.
        let_next_begin: called when another range may use what is left of the quota.
        rejected: songs that the provider was found to reject.
    """

    context: SendContext
    report: FillReport
    gatherer: AnswerGatherer
    check_held: Callable[[], None]
    let_next_begin: Callable[[], None]
    rejected: list[Rejection] = field(default_factory=list)
    _all_started: bool = False
    _errors: list[Exception] = field(default_factory=list)
    _refused: list[tuple[Text, str]] = field(default_factory=list)
    _refused_at: float = 0.0
    _is_blamed: bool = False
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, texts: Sequence[Text]) -> None:
        """Send all texts, each once; requests in flight when something fails are still stored.

        Raises:
            SongvecError: the first thing that went wrong, when nothing is in flight any more.
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
        self._all_started = True
        self._pass_turn()
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
        except Exception as error:  # noqa: BLE001 - raised when the requests in flight are stored
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
                self.context.note_error(error)
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
            self.report.n_tokens += reservation.n_billed
            await reservation.settle()
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
        for counts in (self.report, self.context):
            counts.n_retries += batch.n_retries
            counts.n_limited += batch.n_limited
        self.context.is_proven = self.context.is_proven or n_songs > 0
        self.context.advance(n_songs, self.report.range)
        self._pass_turn()

    def _pass_turn(self) -> None:
        # a provider that has not answered well yet may refuse the run: one range is enough to find out
        if self._all_started and self.context.is_proven:
            self.let_next_begin()

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
        self.report.n_tokens += n_tokens
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
                self.context.report_trouble(
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
            self.report.rejected += [(song_id, reason) for song_id in text.song_ids]
            self.report.n_rejected += len(text.song_ids)
            self.context.advance(len(text.song_ids), self.report.range)


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
