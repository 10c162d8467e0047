"""The resumable loop: send what a range lacks, store each answer as it comes.

What is stored is decided by (model, dimensions, text_hash) alone. Nothing counts as done before its shard is synced.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from songvec_assets.cache.plan import FillPlan, Text, plan_fill
from songvec_assets.cache.shards import ModelCache, Shard, write_embeddings_to_file
from songvec_assets.embedding.batching import bisect, pack_requests
from songvec_assets.embedding.client import Embedder
from songvec_assets.embedding.pricing import Budget, Quota, TokenEstimator
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import (
    ProviderError,
    ProviderUnavailableError,
    RequestRefusedError,
    StoppedError,
    StoreError,
)
from songvec_assets.files import replace_atomically
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.songs.export import snapshot_digest, snapshot_path
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.text import TextSpec

MAX_REFUSALS_IN_A_ROW = 25
"""So many texts refused one after another, and none accepted between them, are not the songs' fault."""


@dataclass
class FillReport:
    """What a fill did to one range: counts of songs, and what it cost.

    Attributes:
        n_songs, n_new, n_changed, n_gone, n_reused, n_unchanged: against the shard as it was.
        n_embedded: songs that got a vector from the provider.
        n_set_aside: songs without a vector, for a reason: the export's and the provider's.
        n_truncated: songs whose text was cut.
        n_tokens: billed.
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
    n_tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0
    n_bytes_damaged: int = 0
    set_aside: list[tuple[int, str]] = field(default_factory=list)
    error: Exception | None = None


@dataclass
class Filler:
    """Fills ranges with one embedder; holds what all of them share.

    Attributes:
        songs_folder: of the snapshots.
        cache: the model's shards.
        spec: how songs become texts.
        embedder_factory: makes what makes the vectors; called once, in the event loop, when a first text must be sent.
        quota: limits of a request.
        budget: stops before the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        concurrency: requests in flight at most.
        lock_range: holds a range against other runs; gives what raises when that hold was lost.
        tiling: how song_ids are cut.
        before_payment: called before a range's first request; raises to refuse.
        stop: once set, no further request starts.
        progress: told songs, rate and dollars.
    """

    songs_folder: Path
    cache: ModelCache
    spec: TextSpec
    embedder_factory: Callable[[], Embedder]
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    concurrency: int
    lock_range: Callable[[SongIdRange], AbstractContextManager[Callable[[], None]]]
    tiling: Tiling
    before_payment: Callable[[], None]
    stop: StopSignal
    progress: ReportProgress = ignore_progress
    _refused: list[tuple[Text, str]] = field(default_factory=list)
    _embedder: Embedder | None = None

    def fill_ranges(self, ranges: Sequence[SongIdRange], report: Callable[[FillReport], None]) -> None:
        """Fill ranges one after another; a failed one does not keep the next from being tried.

        Args:
            ranges: those to fill; one without snapshot and shard is passed over in silence.
            report: told of each range that holds anything, as soon as it is done or has failed.

        Raises:
            SongvecError: where going on is pointless (budget, key, model, stop); the range is reported first.
        """
        asyncio.run(self._fill_ranges(ranges, report))

    async def _fill_ranges(self, ranges: Sequence[SongIdRange], report: Callable[[FillReport], None]) -> None:
        unavailable_before = False
        try:
            for song_range in ranges:
                self.stop.check()
                if not self._holds_anything(song_range):
                    continue
                filled, started = FillReport(song_range), time.monotonic()
                try:
                    with self.lock_range(song_range) as check_held:
                        await self._fill_range(filled, check_held)
                    unavailable_before = unavailable_before and not filled.n_embedded
                except (StoreError, ProviderUnavailableError) as error:
                    filled.error = error
                    # one range may hold what makes a server stumble; two in a row are the server
                    if isinstance(error, ProviderUnavailableError):
                        if unavailable_before:
                            raise
                        unavailable_before = True
                except Exception as error:
                    filled.error = error
                    raise
                finally:
                    filled.seconds = time.monotonic() - started
                    filled.usd = self.budget.price.usd(filled.n_tokens)
                    report(filled)
        finally:
            if self._embedder:
                await self._embedder.close()

    def _holds_anything(self, song_range: SongIdRange) -> bool:
        return snapshot_path(self.songs_folder, song_range).exists() or self.cache.path_of(song_range).exists()

    async def _fill_range(self, report: FillReport, check_held: Callable[[], None]) -> None:
        done = self._read_mark(report.range)
        if done is not None:
            report.n_songs, report.n_unchanged, report.n_set_aside, report.n_truncated = done
            return
        # taken before the songs are read: an export that comes in between leaves a mark that does not fit
        snapshot = self._snapshot(report.range)
        shard, plan = plan_fill(self.songs_folder, self.cache, report.range, self.spec)
        report.n_bytes_damaged = shard.n_bytes_damaged
        report.n_songs, report.n_unchanged = plan.n_songs, plan.n_unchanged
        report.n_new, report.n_changed = plan.n_new, plan.n_changed
        report.n_truncated, report.n_set_aside = plan.n_truncated, plan.n_set_aside
        if plan.texts:
            self.tiling.check_tail(plan.range, plan.n_songs)
            self.before_payment()
            self._embedder = self._embedder or self.embedder_factory()
        self._store_what_is_free(shard, plan, report)
        if plan.texts:
            await self._send_all(shard, plan, report, check_held)
        shard.compact_if_worth_it()
        self._write_mark(report, snapshot)

    def _snapshot(self, song_range: SongIdRange) -> str | None:
        return snapshot_digest(snapshot_path(self.songs_folder, song_range))

    def _identity(self, song_range: SongIdRange, snapshot: str | None) -> list[object]:
        """What a completed fill depends on; it is told without reading a song or a vector."""
        path = self.cache.path_of(song_range)
        return [snapshot, self.spec.identity, path.stat().st_size if path.exists() else 0]

    def _read_mark(self, song_range: SongIdRange) -> list[int] | None:
        """The counts of the last complete fill, where nothing it depends on has changed since."""
        try:
            mark = json.loads(self.cache.mark_of(song_range).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a mark only saves time: without one, all is compared again
            return None
        snapshot = self._snapshot(song_range)
        return list(mark["counts"]) if snapshot and mark["of"] == self._identity(song_range, snapshot) else None

    def _write_mark(self, report: FillReport, snapshot: str | None) -> None:
        counts = [report.n_songs, report.n_songs - report.n_set_aside, report.n_set_aside, report.n_truncated]
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.cache.mark_of(report.range)) as file:
            file.write(json.dumps({"of": self._identity(report.range, snapshot), "counts": counts}).encode())

    def _store_what_is_free(self, shard: Shard, plan: FillPlan, report: FillReport) -> None:
        shard.append_gone(plan.gone)
        report.n_gone = len(plan.gone)
        for piece in plan.reused.iter_slices(self.quota.max_request_texts):
            embeddings = shard.embeddings_at(piece["row"].to_list())
            write_embeddings_to_file(shard, piece["song_id"].to_list(), piece["text_hash"].to_list(), embeddings)
        report.n_reused = plan.reused.height

    async def _send_all(self, shard: Shard, plan: FillPlan, report: FillReport, check_held: Callable[[], None]) -> None:
        tokens = self.estimator.estimate(len(each.text.encode()) for each in plan.texts)
        requests = [
            (plan.texts[piece], sum(tokens[piece]))
            for piece in pack_requests(tokens, self.quota.max_request_texts, self.quota.max_request_tokens)
        ]
        todo, n_songs = iter(requests), sum(len(each.song_ids) for each in plan.texts)
        writing = asyncio.Lock()
        failed: list[Exception] = []

        async def work() -> None:
            # an error ends the range, but answers that are on their way are paid for: let them be stored
            for texts, n_tokens in todo:
                if failed or self.stop.is_set():
                    return
                try:
                    await asyncio.to_thread(check_held)
                    await self._send(shard, texts, n_tokens, report, writing)
                except Exception as error:  # noqa: BLE001 - raised below, when the others have ended
                    failed.append(error)
                self._tell(report, n_songs)

        self._refused.clear()
        self._tell(report, n_songs)
        await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(requests)))))
        if failed:
            raise next((error for error in failed if not isinstance(error, StoppedError)), failed[0])
        self.stop.check()
        self._set_refused_aside(shard, report)

    async def _send(
        self, shard: Shard, texts: Sequence[Text], n_tokens: int, report: FillReport, writing: asyncio.Lock
    ) -> None:
        """Send one request; one that is refused is halved until the text that is refused stands alone."""
        assert self._embedder is not None
        self.budget.reserve(n_tokens)
        batch, refusal = None, ""
        try:
            batch = await self._embedder.generate_embeddings_batch([each.text for each in texts])
        except RequestRefusedError as error:
            refusal = str(error)
        finally:
            self.budget.settle(n_tokens, batch.n_tokens if batch else 0)
        if batch is not None:
            report.n_tokens += batch.n_tokens
            async with writing:
                await asyncio.to_thread(_store, shard, texts, batch.embeddings)
                self._set_refused_aside(shard, report)
            report.n_embedded += sum(len(each.song_ids) for each in texts)
        elif len(texts) > 1:
            for half in bisect(texts):
                await self._send(shard, half, n_tokens // 2 + 1, report, writing)
        else:
            self._refused.append((texts[0], refusal))
            self._check_refusals()

    def _check_refusals(self) -> None:
        if len(self._refused) > MAX_REFUSALS_IN_A_ROW:
            raise ProviderError(
                f"{MAX_REFUSALS_IN_A_ROW} texts in a row were refused, so the fault is not the songs'. The provider "
                f"{self._refused[-1][1]}. None of them is set aside. Check the model, its dimensions and the account, "
                "then start the same command again"
            )

    def _set_refused_aside(self, shard: Shard, report: FillReport) -> None:
        """Store refusals once another text was accepted: until then the fault may be the provider's."""
        refused, self._refused = self._refused, []
        for text, reason in refused:
            shard.append_set_aside(text.song_ids, [text.text_hash] * len(text.song_ids), reason)
            report.set_aside.extend((song_id, reason) for song_id in text.song_ids)
            report.n_set_aside += len(text.song_ids)

    def _tell(self, report: FillReport, n_songs: int) -> None:
        note = f"{report.range.key}, ${self.budget.usd:,.4f} so far"
        if self.stop.is_set():
            note += "; stopping: answers on their way are still stored"
        self.progress(Progress("embed songs", report.n_embedded + len(report.set_aside), n_songs, note=note))


def _store(shard: Shard, texts: Sequence[Text], embeddings: Float32Matrix) -> None:
    """Append an answer: each text's vector for every song that has the text."""
    rows = [(song_id, each.text_hash, place) for place, each in enumerate(texts) for song_id in each.song_ids]
    song_ids, text_hashes, places = zip(*rows, strict=True)
    write_embeddings_to_file(shard, song_ids, text_hashes, embeddings[list(places)])
