"""The resumable loop over ranges: compare, take what is free, send what is missing, mark what is complete.

What is stored is decided by (model, dimensions, text_hash) alone. Nothing counts as done before its shard is synced.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial

import polars as pl
from msgspec.structs import replace

from songvec_assets.cache import asks, manifest, upkeep
from songvec_assets.cache.parts import PIECE_ROWS
from songvec_assets.cache.plan import FillPlan, plan_fill
from songvec_assets.cache.requests import RangeSender, SendContext
from songvec_assets.cache.shards import CachedRange, ModelCache, write_embeddings_to_file
from songvec_assets.cache.writing import AnswerGatherer
from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.client import Embedder
from songvec_assets.embedding.pricing import Quota, TokenEstimator
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import BudgetExceededError, ProviderUnavailableError, StoreError
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress, run_event_loop
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec

MAX_OPEN_RANGES = 4
"""Ranges begun before earlier ones have all their answers, so that the quota is used while the last ones come in."""


@dataclass
class FillReport:
    """What a fill did to one range: counts of songs, and what it cost.

    Attributes:
        n_songs, n_new, n_changed, n_gone, n_reused, n_unchanged: against the shard as it was.
        n_embedded: songs that got a vector from the provider.
        n_set_aside: songs without a vector, for a reason: the export's and the provider's.
        n_truncated: songs whose text was cut.
        n_retries, n_limited: bad answers before good ones, and those of them that were 429.
        n_tokens: billed; estimated where the provider does not say, or spoilt the answer.
        n_tokens_expected: as estimated before the first request.
        usd: their price.
        seconds: of this range.
        n_bytes_damaged: of the shard, as it was found: cut off by a crash, or damaged.
        set_aside: (song_id, reason) of songs set aside by this fill.
        error: why the range is not complete, if it is not.
    """

    range: SongIdRange
    n_songs: int = 0
    n_new: int = 0
    n_changed: int = 0
    n_gone: int = 0
    n_reused: int = 0
    n_unchanged: int = 0
    n_embedded: int = 0
    n_set_aside: int = 0
    n_truncated: int = 0
    n_retries: int = 0
    n_limited: int = 0
    n_tokens: int = 0
    n_tokens_expected: int = 0
    usd: float = 0.0
    seconds: float = 0.0
    n_bytes_damaged: int = 0
    set_aside: list[tuple[int, str]] = field(default_factory=list)
    error: Exception | None = None


@dataclass(frozen=True)
class Spending:
    """What a run sent.

    Attributes:
        n_tokens_expected: as estimated before the first request of each range.
        n_tokens: billed.
        bytes_per_token: of the model's tokens, as far as they are known now.
        is_first: whether nothing was known of the model's tokens before this run.
    """

    n_tokens_expected: int
    n_tokens: int
    bytes_per_token: float
    is_first: bool = False


@dataclass
class Filler:
    """Fills ranges with one embedder; holds what all of them share. One call of `fill_ranges` each.

    Attributes:
        snapshots: of the store.
        cache: of the model.
        spec: how songs become texts.
        embedder_factory: makes what makes the vectors; called once, in the event loop, when a first text must be sent.
            Its argument is notified of every bad answer, and of long waits for the first.
        quota: limits of a request.
        budget: stops before the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        concurrency: requests in flight at most; how many there are follows from the quota and the latency.
        server: that is asked, as the reasons of rejections name it.
        lock_range: holds a range against other runs; gives what raises when that hold was lost. Its callbacks: called
            when it has to wait, and while it does.
        tiling: how song_ids are cut.
        before_fill: called with all ranges before the first one is begun; raises to refuse.
        before_payment: called before a range's first request; raises to refuse.
        keep_spending: told at the end what was sent.
        retention_s: for how long the cache keeps the vectors of deleted songs.
        anew: who asks that songs which have their vectors are embedded, and paid for, again; None: nobody. Whoever asks
            twice is served once, and an ask that was not ended goes on.
        retry_rejected: whether songs that this server rejected before are sent again.
        stop: once set, no further request starts.
        progress: told songs, rate and dollars.
        proven: whether the provider has answered well in this run.
    """

    snapshots: Snapshots
    cache: ModelCache
    spec: TextSpec
    embedder_factory: Callable[[Callable[[str], None]], Embedder]
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    concurrency: int
    server: str
    lock_range: Callable[
        [SongIdRange, Callable[[], None], Callable[[], None]], AbstractContextManager[Callable[[], None]]
    ]
    tiling: Tiling
    before_payment: Callable[[], None]
    keep_spending: Callable[["Spending"], None]
    stop: StopSignal
    retention_s: float = 0.0
    anew: str | None = None
    retry_rejected: bool = False
    before_fill: Callable[[Sequence[SongIdRange]], None] = lambda _: None
    progress: ReportProgress = ignore_progress
    proven: bool = False
    _ranges: Sequence[SongIdRange] = ()
    _fatal: Exception | None = None
    _over_budget: BudgetExceededError | None = None
    _failed: bool = False
    _unavailable_before: bool = False
    _n_songs: int = 0
    _n_done: int = 0
    _n_free: int = 0
    _n_retries: int = 0
    _n_limited: int = 0
    _n_expected: int = 0

    def fill_ranges(self, ranges: Sequence[SongIdRange], report: Callable[[FillReport], None]) -> None:
        """Fill ranges in their order; a failed one does not keep the next from being tried.

        Args:
            ranges: those to fill; one without snapshot and shard is passed over in silence.
            report: told of each range that holds anything, as soon as it is done or has failed.

        Raises:
            SongvecError: where going on is pointless (budget, key, model, stop); the range is reported first.
        """
        self.before_fill(ranges)
        run_event_loop(self._fill_ranges(ranges, report))

    async def _fill_ranges(self, ranges: Sequence[SongIdRange], report: Callable[[FillReport], None]) -> None:
        places, filling = asyncio.Semaphore(MAX_OPEN_RANGES), []
        try:
            if self.anew:
                self.anew = asks.begin(self.cache, ranges, self.anew)
            self._ranges = ranges
            self._n_songs = sum(map(self.snapshots.count, ranges))
            for song_range in filter(self._holds_anything, ranges):
                await places.acquire()
                if self._fatal or self._over_budget or self.stop.is_set():
                    break
                turn = asyncio.Event()
                filling.append(asyncio.create_task(self._fill_reported(song_range, turn.set, report)))
                filling[-1].add_done_callback(lambda _: places.release())
                await turn.wait()
            await asyncio.gather(*filling)
            if self.anew and not self._failed and not self.stop.is_set():
                asks.end(self.cache)
        finally:
            if "_embedder" in self.__dict__:
                try:
                    await asyncio.to_thread(self.budget.settle, 0, self._embedder.take_probe_tokens())
                finally:
                    await self._embedder.close()
        try:
            if self.budget.n_tokens:
                self.keep_spending(Spending(self._n_expected, self.budget.n_tokens, self.estimator.bytes_per_token))
        finally:
            self._check_halted()
            if self._over_budget:
                raise self._over_budget

    @cached_property
    def _cached(self) -> set[SongIdRange]:
        return {*self.cache.ranges()}

    @cached_property
    def _embedder(self) -> Embedder:
        return self.embedder_factory(self._tell_trouble)

    @cached_property
    def _context(self) -> SendContext:
        slots = asyncio.Semaphore(self.concurrency)
        shared = self._embedder, self.quota, self.budget, self.estimator, slots
        context = SendContext(*shared, self._check_halted, self._note_error, self.server, self._tell_trouble)
        for each in self._ranges:
            done = self.cache.find_completion(each)
            context.health.count_known(done.n_vectors if done else 0)
        return context

    def _note_error(self, error: Exception) -> None:
        """Let no further request start where going on is pointless: one range may fail for what is in it."""
        if isinstance(error, BudgetExceededError):
            # no further range begins, but what has its share of the budget is still sent
            self._over_budget = self._over_budget or error
            return
        if not isinstance(error, (StoreError, ProviderUnavailableError)):
            self._fatal = self._fatal or error

    def _check_halted(self) -> None:
        if self._fatal:
            raise self._fatal
        self.stop.check()

    def _holds_anything(self, song_range: SongIdRange) -> bool:
        return song_range in self.snapshots or song_range in self._cached

    async def _fill_reported(
        self, song_range: SongIdRange, let_next_begin: Callable[[], None], report: Callable[[FillReport], None]
    ) -> None:
        """Fill one range and report it; what makes going on pointless is kept for the end."""
        filled, started = FillReport(song_range), time.monotonic()
        held = contextlib.ExitStack()
        try:
            # another run may hold it for hours, while answers for earlier ranges come in
            waiting = partial(self._tell, f"another run fills {song_range.key}: waiting for it")
            lock = self.lock_range(song_range, waiting, self._check_halted)
            try:
                check_held = await asyncio.to_thread(held.enter_context, lock)
                await self._fill_range(filled, check_held, let_next_begin)
            finally:
                # letting go asks the database, which may not answer: the other ranges' answers must not wait for it
                await asyncio.to_thread(held.close)
            self._unavailable_before = self._unavailable_before and not filled.n_embedded
        except Exception as error:  # noqa: BLE001 - raised when the other ranges' answers are stored
            filled.error, self._failed = error, True
            self._note_error(error)
            if isinstance(error, ProviderUnavailableError):
                # one range may hold what makes a server stumble; two in a row are the server
                self._fatal = self._fatal or (error if self._unavailable_before else None)
                self._unavailable_before = True
        finally:
            let_next_begin()
            filled.seconds = time.monotonic() - started
            filled.usd = self.budget.price.usd(filled.n_tokens)
            report(filled)

    async def _fill_range(
        self, report: FillReport, check_held: Callable[[], None], let_next_begin: Callable[[], None]
    ) -> None:
        # taken before the songs are read: an export that comes in between leaves a manifest that does not fit
        snapshot = self.snapshots.digest(report.range)
        known = self.cache.read_manifest(report.range)
        done, owed = known.complete, known.is_owed(self.anew)
        retries = self.retry_rejected and done is not None and done.n_rejected > 0
        fits = done is not None and done.fits(snapshot, self.spec.identity, self.server)
        if done and fits and not owed and not retries and self.cache.is_complete(report.range, known):
            report.n_songs, report.n_set_aside, report.n_truncated = done.n_songs, done.n_rejected, done.n_truncated
            report.n_unchanged = done.n_vectors
            self.advance(report.n_songs, report.range, are_free=True)
            return
        goes_on = owed and known.asked_by == self.anew
        shard, plan = await asyncio.to_thread(self._plan, report.range, owed, goes_on)
        report.n_bytes_damaged = shard.n_bytes_damaged
        report.n_songs, report.n_unchanged = plan.n_songs, plan.n_unchanged
        report.n_new, report.n_changed = plan.n_new, plan.n_changed
        report.n_truncated, report.n_set_aside = plan.n_truncated, plan.n_set_aside
        if plan.texts:
            report.n_tokens_expected = plan.estimate_tokens(self.estimator)
            self._n_expected += report.n_tokens_expected
            self.tiling.check_tail(plan.range, plan.n_songs)
            await asyncio.to_thread(self.before_payment)
        await asyncio.to_thread(self._begin, shard, plan, self.anew if owed and not goes_on else None)
        await asyncio.to_thread(self._store_what_is_free, shard, plan)
        report.n_gone, report.n_reused = len(plan.deleted), plan.reused.height
        n_to_embed = sum(len(each.song_ids) for each in plan.texts)
        self.advance(plan.n_songs - n_to_embed, report.range, are_free=True)
        rejected = await self._send(shard, plan, _Counters(report, self, let_next_begin), check_held)
        server = self.server if plan.n_rejected or rejected else ""
        counts = report.n_songs, report.n_set_aside, report.n_truncated
        filled = manifest.Completion(snapshot, self.spec.identity, *counts, server, 0, b"")
        await asyncio.to_thread(self._complete, shard, plan, filled, rejected)

    def _plan(self, song_range: SongIdRange, owed: bool, goes_on: bool) -> tuple[CachedRange, FillPlan]:
        shard = self.cache.open(song_range, asked=goes_on)
        rejected_by = None if self.retry_rejected or owed else self.server
        since = shard.first_asked if owed else 0
        return shard, plan_fill(self.snapshots, shard, self.spec, since, rejected_by)

    def _begin(self, shard: CachedRange, plan: FillPlan, asked_by: str | None) -> None:
        """Record what is known before anything is written: deletions, parts of killed runs, who asks for all songs."""
        wanted = shard.manifest
        if plan.deleted:
            has_vector = {*shard.rows["song_id"]}
            wanted = wanted.without(plan.deleted).delete(
                [each for each in plan.deleted if each in has_vector], time.time()
            )
        if asked_by is not None:
            generations = [wanted.generation, *(manifest.generation_of(name) or 0 for name in shard.sizes)]
            wanted = replace(wanted, asked_by=asked_by, asked_generation=max(generations) + 1)
        elif not shard.asked and (plan.texts or plan.reused.height):
            wanted = replace(wanted, complete=None)
        if wanted != (shard.stored or manifest.Manifest()):
            shard.save(wanted)
        shard.asked = shard.asked or asked_by is not None

    def _store_what_is_free(self, shard: CachedRange, plan: FillPlan) -> None:
        for piece in plan.reused.iter_slices(PIECE_ROWS):
            embeddings = shard.embeddings_at(piece["row"])
            write_embeddings_to_file(shard, piece["song_id"].to_list(), piece["text_hash"].to_list(), embeddings)

    async def _send(
        self, shard: CachedRange, plan: FillPlan, counters: "_Counters", check_held: Callable[[], None]
    ) -> list[manifest.Rejection]:
        """Send what is missing; the songs that the provider was found to reject."""
        if not plan.texts:
            return []
        self._context.health.count_known(plan.n_unchanged)
        sender = RangeSender(self._context, AnswerGatherer(shard.writer), check_held, counters)
        try:
            await sender.send(plan.texts)
        except Exception:
            if sender.rejected and not shard.asked:
                shard.add_written()
                await asyncio.to_thread(shard.save, shard.manifest.reject(sender.rejected))
            raise
        return sender.rejected

    def _complete(
        self,
        shard: CachedRange,
        plan: FillPlan,
        filled: manifest.Completion,
        rejected: list[manifest.Rejection],
    ) -> None:
        shard.add_written()
        if shard.asked:
            rows = shard.asked_rows()
            rows = rows.filter(pl.col("song_id").is_in(plan.song_ids.implode()))
            rows = rows.filter(~pl.col("song_id").is_in([each.song_id for each in rejected]))
            upkeep.complete_asked(shard, filled, self.retention_s, rows, rejected)
        else:
            shard.manifest = shard.manifest.reject(rejected)
            upkeep.complete(shard, filled, self.retention_s)

    def count_answer(self, n_songs: int, batch: EmbeddingBatch) -> None:
        """Take in that the provider answered with vectors for so many songs, and after how many bad answers."""
        self._n_retries += batch.n_retries
        self._n_limited += batch.n_limited
        self.proven = self.proven or n_songs > 0

    def advance(self, n_songs: int, song_range: SongIdRange, are_free: bool = False) -> None:
        """Report n_songs more that need nothing further; `are_free` if no request was sent for them."""
        self._n_done += n_songs
        self._n_free += n_songs if are_free else 0
        self._tell(song_range.key)

    def _tell_trouble(self, words: str) -> None:
        self._tell(words, is_trouble=True)

    def _tell(self, what: str, is_trouble: bool = False) -> None:
        note = f"{what}, ${self.budget.usd:,.4f} so far"
        used = self._embedder.quota_used if "_embedder" in self.__dict__ else None
        if used is not None:
            note += (
                f", {used:.0%} of the quota used, {self._n_retries:,} retries, {self._n_limited:,} of them after 429"
            )
        if self.stop.is_set():
            note += "; stopping: answers on their way are still stored"
        self.progress(Progress("embed songs", self._n_done, self._n_songs, "songs", note, is_trouble, self._n_free))


@dataclass
class _Counters:
    """Counts what a range's sender tells, into the range's report and the run's progress."""

    report: FillReport
    filler: Filler
    let_next_begin: Callable[[], None]
    _all_started: bool = False

    def all_started(self) -> None:
        self._all_started = True
        self._pass_on()

    def count_tokens(self, n_tokens: int) -> None:
        self.report.n_tokens += n_tokens

    def count_answer(self, n_songs: int, batch: EmbeddingBatch) -> None:
        self.report.n_embedded += n_songs
        self.report.n_retries += batch.n_retries
        self.report.n_limited += batch.n_limited
        self.filler.count_answer(n_songs, batch)
        self.filler.advance(n_songs, self.report.range)
        self._pass_on()

    def count_set_aside(self, song_ids: list[int], reason: str) -> None:
        self.report.set_aside.extend((song_id, reason) for song_id in song_ids)
        self.report.n_set_aside += len(song_ids)
        self.filler.advance(len(song_ids), self.report.range)

    def _pass_on(self) -> None:
        # a provider that has not answered well yet may refuse the run: one range is enough to find out
        if self._all_started and self.filler.proven:
            self.let_next_begin()
