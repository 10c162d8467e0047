"""The resumable loop over ranges: compare, reuse stored vectors, send missing texts, record that a range is complete.

A vector is identified by (model, dimensions, text_hash) alone. Nothing counts as done before its part is synced.
When to add here: another step of filling a range. Keep out: requests (`requests`), and what a range lacks (`plan`).
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial

from msgspec.structs import replace

from songvec_assets.cache import comparison, completion, reembedding, texts
from songvec_assets.cache.cached_range import CachedRange, RangeFiles
from songvec_assets.cache.context import SendContext
from songvec_assets.cache.elsewhere import OtherRanges
from songvec_assets.cache.manifest import Completion, Manifest, Rejection
from songvec_assets.cache.model_cache import ModelCache, copy_vectors
from songvec_assets.cache.plan import FillPlan, FillReport, plan_fill
from songvec_assets.cache.requests import RangeSender
from songvec_assets.cache.writing import AnswerGatherer
from songvec_assets.embedding.drift import ModelRecord
from songvec_assets.embedding.spending import Spending, SpendingLog
from songvec_assets.errors import ProviderUnavailableError
from songvec_assets.progress import run_event_loop
from songvec_assets.songs.content import Footer
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec

MAX_OPEN_RANGES = 4
"""Ranges in progress at a time, so that the quota is used while the last answers of a range arrive."""

LockRange = Callable[[SongIdRange, Callable[[], None], Callable[[], None]], AbstractContextManager[Callable[[], None]]]
"""Locks a range against other runs; returns a function that raises if the lock was lost. The first callback is called
once if it has to wait, the second repeatedly while it waits."""


@dataclass
class Filler:
    """Fills ranges with one embedder. Call `fill_ranges` once per object.

    Attributes:
        snapshots: of the store.
        cache: of the model.
        tiling: how song_ids are divided into ranges.
        spec: how songs become texts.
        context: what all requests share.
        record: of the server; it is compared with cached songs before it is paid for the first time.
        lock_range: see `LockRange`.
        before_fill: called before the first range begins, with the ranges whose texts were made with other settings;
            raises to refuse.
        before_payment: called before a range's first request; raises to refuse.
        spending: records at the end what was sent.
        retention_s: seconds for which the cache keeps the vectors of deleted songs.
        reembed: identifies a request to embed, and pay for, songs again that have vectors; None: no such request. Each
            request is served once; a stopped one is resumed.
        retry_rejected: whether to send songs again that this server rejected before.
        generation: of the request to embed songs again; 0: no such request.
    """

    snapshots: Snapshots
    cache: ModelCache
    tiling: Tiling
    spec: TextSpec
    context: SendContext
    record: ModelRecord
    lock_range: LockRange
    before_fill: Callable[[Sequence[SongIdRange]], None]
    before_payment: Callable[[], None]
    spending: SpendingLog
    retention_s: float = 0.0
    reembed: str | None = None
    retry_rejected: bool = False
    generation: int = field(default=0, init=False)
    _found: dict[SongIdRange, RangeFiles] = field(default_factory=dict)
    _footers: dict[SongIdRange, Footer] = field(default_factory=dict)
    _has_failed: bool = False
    _was_unavailable: bool = False

    @cached_property
    def others(self) -> OtherRanges:
        """Where a range finds vectors of texts that it lacks. Only one plan uses it at a time."""
        return OtherRanges(self.cache)

    def fill_ranges(self, ranges: Sequence[SongIdRange], report: Callable[[FillReport], None]) -> None:
        """Fill ranges in order; after a failed range the next one is tried.

        Args:
            ranges: to fill; those with neither snapshot nor cache are skipped.
            report: called with each other range, as soon as it is done or has failed.

        Raises:
            SongvecError: an error that all ranges would meet (budget, key, model, stop); the range is reported first.
        """
        cached, exported = {*self.cache.ranges()}, {*self.snapshots.ranges()}
        held = [each for each in ranges if each in cached or each in exported]
        # looked at once, for all decisions before a range's lock is taken
        found = self.cache.look_all([each for each in held if each in cached])
        self._found = {each: found.get(each) or RangeFiles() for each in held}
        self._footers = self.snapshots.footers(held)
        if not held:
            return
        self.before_fill(
            [each for each in held if texts.is_made_otherwise(self.cache.storage, self._found[each], self.spec)]
        )
        run_event_loop(self._fill_ranges(report))

    async def _fill_ranges(self, report: Callable[[FillReport], None]) -> None:
        context, places, filling = self.context, asyncio.Semaphore(MAX_OPEN_RANGES), []
        try:
            if self.reembed:
                generations = (files.last_generation for files in self._found.values())
                self.generation = reembedding.begin(self.cache.storage, [*self._found], self.reembed, generations)
            context.n_songs = sum(each.n_songs for each in self._footers.values())
            for files in self._found.values():
                context.health.count_known(files.done.n_vectors if files.done else 0)
            for song_range in self._found:
                done = self._find_completion(song_range)
                if done is None:
                    await places.acquire()
                if context.fatal or context.over_budget or context.run.stop.is_set():
                    break
                if done is not None:
                    context.advance(done.n_songs, song_range, are_free=True)
                    report(_report_complete(song_range, done))
                    continue
                turn = asyncio.Event()
                filling.append(asyncio.create_task(self._fill_reported(song_range, turn.set, report)))
                filling[-1].add_done_callback(lambda _: places.release())
                await turn.wait()
            await asyncio.gather(*filling)
            if self.generation and not self._has_failed and not context.run.stop.is_set():
                reembedding.end(self.cache.storage, self.generation)
        finally:
            await context.close()
        try:
            if n_tokens := context.budget.n_tokens:
                n_tokens_expected = context.total("n_tokens_expected")
                self.spending.write(Spending(n_tokens_expected, n_tokens, context.estimator.bytes_per_token))
        finally:
            context.check_halted()
            if context.over_budget:
                raise context.over_budget

    def _find_completion(self, song_range: SongIdRange) -> Completion | None:
        """The earlier fill, if it is still complete for the snapshot: nothing to do, and no lock to take."""
        files, footer = self._found[song_range], self._footers[song_range]
        done = files.done
        if done is None or files.generation < self.generation or (self.retry_rejected and done.n_rejected):
            return None
        return done if done.fits(footer.digest, self.spec.identity, self.context.server) else None

    async def _fill_reported(
        self, song_range: SongIdRange, let_next_begin: Callable[[], None], report: Callable[[FillReport], None]
    ) -> None:
        """Fill one range and report it; an error that ends the run is raised later, by the loop."""
        context, started = self.context, time.monotonic()
        fill = _RangeFill(self, let_next_begin, FillReport(song_range))
        held = contextlib.ExitStack()
        try:
            # another run may hold it for hours: meanwhile answers for earlier ranges arrive
            waiting = partial(context.report, f"another run fills {song_range.key}: waiting for it")
            lock = self.lock_range(song_range, waiting, context.check_halted)
            try:
                check_held = await asyncio.to_thread(held.enter_context, lock)
                await fill.fill(check_held)
            finally:
                # in a thread: the database may not answer, and the other ranges must not wait for it
                await asyncio.to_thread(held.close)
            self._was_unavailable = self._was_unavailable and not fill.report.n_embedded
        except Exception as error:  # noqa: BLE001 - raised after the other ranges' answers are stored
            fill.report.error, self._has_failed = error, True
            context.note_error(error)
            if isinstance(error, ProviderUnavailableError):
                # one range may hold texts that make a server fail; two ranges in a row mean that the server is at fault
                context.fatal = context.fatal or (error if self._was_unavailable else None)
                self._was_unavailable = True
        finally:
            self.others.forget(song_range)
            let_next_begin()
            fill.report.seconds = time.monotonic() - started
            fill.report.usd = context.budget.price.usd(fill.report.n_tokens)
            report(fill.report)


def _report_complete(song_range: SongIdRange, done: Completion) -> FillReport:
    return FillReport(
        song_range,
        n_songs=done.n_songs,
        n_unchanged=done.n_vectors,
        n_rejected=done.n_rejected,
        n_truncated=done.n_truncated,
    )


@dataclass
class _RangeFill:
    """The fill of one range, under its lock."""

    filler: Filler
    let_next_begin: Callable[[], None]
    report: FillReport

    async def fill(self, check_held: Callable[[], None]) -> None:
        """Fill the range; `report` has the counts even if it raises."""
        filler, context, song_range = self.filler, self.filler.context, self.report.range
        cached, plan = await asyncio.to_thread(self._plan)
        self.report = plan.report
        n_to_embed = sum(len(each.song_ids) for each in plan.texts)
        if plan.texts:
            plan.report.n_tokens_expected = plan.estimate_tokens(context.estimator)
            filler.tiling.check_tail(song_range, plan.report.n_songs)
            await asyncio.to_thread(filler.before_payment)
            n_rows = n_to_embed + plan.reused.height
            await asyncio.to_thread(cached.storage.check_room, n_rows * cached.identity.row_bytes)
            find_songs = partial(comparison.find_songs, filler.cache, filler.snapshots, filler.spec)
            await comparison.compare_server(filler.record, find_songs, context, plan.report)
        await asyncio.to_thread(self._begin, cached, plan)
        context.reports.append(plan.report)
        context.advance(plan.report.n_songs - n_to_embed, song_range, are_free=True)
        rejected = await self._send(cached, plan, check_held)
        filled = Completion(
            snapshot=plan.snapshot,
            text=filler.spec.identity,
            n_songs=plan.report.n_songs,
            n_rejected=plan.report.n_rejected,
            n_truncated=plan.report.n_truncated,
            server=context.server if plan.has_rejected or rejected else "",
        )
        await asyncio.to_thread(completion.complete, cached, filled, filler.retention_s, rejected, plan.spared)

    def _plan(self) -> tuple[CachedRange, FillPlan]:
        filler, song_range = self.filler, self.report.range
        cached = filler.cache.open(song_range)
        if cached.manifest.generation < filler.generation:
            cached = filler.cache.open(song_range, filler.generation)
        rejected_by = None if filler.retry_rejected or cached.replaces else filler.context.server
        copy = partial(filler.others.copy, cached, check=filler.context.check_halted)
        return cached, plan_fill(filler.snapshots, cached, filler.spec, rejected_by, copy)

    def _begin(self, cached: CachedRange, plan: FillPlan) -> None:
        """Record deletions and the parts of killed runs, then store the range's own vectors that are reused."""
        wanted = cached.manifest
        if plan.deleted:
            has_vector = {*cached.rows["song_id"], *(cached.replaces or cached).rows["song_id"]}
            wanted = wanted.without(plan.deleted).delete(
                [each for each in plan.deleted if each in has_vector], time.time()
            )
        if plan.texts or plan.reused.height:
            wanted = replace(wanted, complete=None)
        cached.manifest = wanted
        # a later generation is saved once it is complete: until then loads read the earlier one
        if cached.replaces is None and wanted != (cached.files.manifest or Manifest()):
            cached.save(wanted)
        copy_vectors(cached, plan.reused, cached)

    async def _send(self, cached: CachedRange, plan: FillPlan, check_held: Callable[[], None]) -> list[Rejection]:
        """Send the missing texts; return the songs that the provider rejected."""
        if not plan.texts:
            return []
        self.filler.context.health.count_known(plan.report.n_unchanged)
        gatherer = AnswerGatherer(cached.open_writer())
        sender = RangeSender(self.filler.context, plan.report, gatherer, check_held, self.let_next_begin)
        try:
            await sender.send(plan.texts)
        except Exception:
            if sender.refused.rejected and cached.replaces is None:
                cached.add_written()
                await asyncio.to_thread(cached.save, cached.manifest.reject(sender.refused.rejected))
            raise
        return sender.refused.rejected
