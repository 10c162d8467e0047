"""The resumable loop: compare a range's snapshot with its shard, send what is missing, store each answer as it comes.

What is stored is decided by (model, dimensions, text_hash) alone. Nothing counts as done before its shard is synced.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from songvec_assets.cache.shards import (
    ModelCache,
    Shard,
    discard_damaged_rows,
    load_embeddings_from_cache,
    write_embeddings_to_file,
)
from songvec_assets.embedding.batching import bisect, pack_requests
from songvec_assets.embedding.client import Embedder
from songvec_assets.embedding.pricing import Budget, Estimate, Price, Quota, TokenEstimator
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
from songvec_assets.songs.export import load_songs_from_parquet, snapshot_digest, snapshot_path
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TextSpec, render_texts

MAX_REFUSALS_IN_A_ROW = 25
"""So many texts refused one after another, and none accepted between them, are not the songs' fault."""


@dataclass(frozen=True)
class Text:
    """A text to send, and the songs that it stands for."""

    text: str
    text_hash: bytes
    song_ids: list[int]


@dataclass(frozen=True)
class FillPlan:
    """What a range lacks.

    Attributes:
        range: which.
        n_songs: songs of the snapshot, those set aside by the export included.
        n_unchanged: songs whose text has its vector already.
        gone: song_ids in the shard but no longer in the snapshot.
        reused: songs (song_id, text_hash, row) whose text has a vector in the shard under another or an older song.
        texts: what must be sent.
        n_new, n_changed, n_truncated, n_set_aside: songs; set aside by the export, or by the provider before.
    """

    range: SongIdRange
    n_songs: int
    n_unchanged: int
    gone: list[int]
    reused: pl.DataFrame
    texts: list[Text]
    n_new: int
    n_changed: int
    n_truncated: int
    n_set_aside: int


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
    n_bytes_cut: int = 0
    set_aside: list[tuple[int, str]] = field(default_factory=list)
    error: Exception | None = None
    started: float = field(default_factory=time.monotonic)


def plan_fill(songs_folder: Path, cache: ModelCache, song_range: SongIdRange, spec: TextSpec) -> tuple[Shard, FillPlan]:
    """Compare a range's snapshot with its shard; writes nothing."""
    songs = load_songs_from_parquet(snapshot_path(songs_folder, song_range))
    shard, live = load_embeddings_from_cache(cache, song_range)
    return shard, compare_with_shard(song_range, songs, live, spec)


def compare_with_shard(song_range: SongIdRange, songs: pl.DataFrame, live: pl.DataFrame, spec: TextSpec) -> FillPlan:
    """Find what a shard lacks.

    Args:
        song_range: which range.
        songs: its snapshot.
        live: its shard's live rows.
        spec: how songs become texts.
    """
    embeddable = songs.filter(pl.col("set_aside").is_null())
    texts = render_texts(embeddable, spec)
    known = live.select("song_id", before=pl.col("text_hash"), refused=pl.col("reason").is_not_null())
    compared = texts.join(known, on="song_id", how="left", maintain_order="left")
    unchanged = compared.filter(pl.col("before") == pl.col("text_hash"))
    missing = compared.filter(pl.col("before").ne_missing(pl.col("text_hash")))
    vectors = live.filter(pl.col("reason").is_null()).unique("text_hash", keep="any").select("text_hash", "row")
    reused = missing.join(vectors, on="text_hash", how="inner", maintain_order="left")
    to_send = (
        missing.join(vectors, on="text_hash", how="anti", maintain_order="left")
        .group_by("text_hash", maintain_order=True)
        .agg(pl.col("text").first(), pl.col("song_id"))
    )
    return FillPlan(
        range=song_range,
        n_songs=songs.height,
        n_unchanged=unchanged.height - int(unchanged["refused"].sum()),
        gone=live.join(embeddable, on="song_id", how="anti")["song_id"].to_list(),
        reused=reused.select("song_id", "text_hash", "row"),
        texts=[
            Text(text, text_hash, song_ids)
            for text_hash, text, song_ids in to_send.select("text_hash", "text", "song_id").iter_rows()
        ],
        n_new=missing["before"].null_count(),
        n_changed=missing["before"].count(),
        n_truncated=int(texts["truncated"].sum()),
        n_set_aside=songs["set_aside"].count() + int(unchanged["refused"].sum()),
    )


def estimate_fills(plans: Iterable[FillPlan], price: Price, quota: Quota) -> Estimate:
    """Tokens, dollars and hours of some plans together."""
    estimator = TokenEstimator()
    n_songs = n_texts = n_tokens = 0
    for plan in plans:
        n_songs += plan.n_songs
        n_texts += len(plan.texts)
        n_tokens += sum(estimator.estimate(len(each.text.encode()) for each in plan.texts))
    return price.estimate(n_songs, n_texts, n_tokens, quota)


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
        lock_range: holds a range against other runs.
        max_tail_songs: the open tail range is refused above so many.
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
    lock_range: Callable[[SongIdRange], AbstractContextManager[None]]
    max_tail_songs: int
    before_payment: Callable[[], None]
    stop: StopSignal
    progress: ReportProgress = ignore_progress
    _refusals_in_a_row: int = 0
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
                filled = FillReport(song_range)
                try:
                    with self.lock_range(song_range):
                        await self._fill_range(filled)
                except (StoreError, ProviderUnavailableError) as error:
                    filled.error = error
                    # one range may hold what makes a server stumble; two in a row are the server
                    unavailable = isinstance(error, ProviderUnavailableError)
                    if unavailable and unavailable_before:
                        raise
                    unavailable_before = unavailable
                except Exception as error:
                    filled.error = error
                    raise
                finally:
                    filled.seconds = time.monotonic() - filled.started
                    filled.usd = self.budget.price.usd(filled.n_tokens)
                    report(filled)
        finally:
            if self._embedder:
                await self._embedder.close()

    def _holds_anything(self, song_range: SongIdRange) -> bool:
        return snapshot_path(self.songs_folder, song_range).exists() or self.cache.path_of(song_range).exists()

    async def _fill_range(self, report: FillReport) -> None:
        done = self._read_mark(report.range)
        if done is not None:
            report.n_songs, report.n_unchanged, report.n_set_aside, report.n_truncated = done
            return
        # taken before the songs are read: an export that comes in between leaves a mark that does not fit
        snapshot = self._snapshot(report.range)
        shard, plan = plan_fill(self.songs_folder, self.cache, report.range, self.spec)
        if plan.reused.height and discard_damaged_rows(shard):
            shard, plan = plan_fill(self.songs_folder, self.cache, report.range, self.spec)
        report.n_bytes_cut = shard.n_bytes_damaged
        report.n_songs, report.n_unchanged = plan.n_songs, plan.n_unchanged
        report.n_new, report.n_changed = plan.n_new, plan.n_changed
        report.n_truncated, report.n_set_aside = plan.n_truncated, plan.n_set_aside
        if plan.texts:
            self._check_tail(plan)
            self.before_payment()
            self._embedder = self._embedder or self.embedder_factory()
        self._store_what_is_free(shard, plan, report)
        if plan.texts:
            await self._send_all(shard, plan, report)
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
        return list(mark["counts"]) if mark["of"] == self._identity(song_range, self._snapshot(song_range)) else None

    def _write_mark(self, report: FillReport, snapshot: str | None) -> None:
        n_answered = report.n_songs - report.n_set_aside
        counts = [report.n_songs, n_answered, report.n_set_aside, report.n_truncated]
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.cache.mark_of(report.range)) as file:
            file.write(json.dumps({"of": self._identity(report.range, snapshot), "counts": counts}).encode())

    def _check_tail(self, plan: FillPlan) -> None:
        if plan.range.is_tail and plan.n_songs > self.max_tail_songs:
            raise StoreError(
                f"the open tail from song_id {plan.range.start} on holds {plan.n_songs:,} songs, more than the "
                f"{self.max_tail_songs:,} of one range: raise SONGVEC_SONG_ID_STOP above the highest song_id and start "
                "the same command again; what the tail's cache holds is kept"
            )

    def _store_what_is_free(self, shard: Shard, plan: FillPlan, report: FillReport) -> None:
        shard.append_gone(plan.gone)
        report.n_gone = len(plan.gone)
        for piece in plan.reused.iter_slices(self.quota.max_request_texts):
            embeddings = shard.embeddings_at(piece["row"].to_list())
            write_embeddings_to_file(shard, piece["song_id"].to_list(), piece["text_hash"].to_list(), embeddings)
        report.n_reused = plan.reused.height

    async def _send_all(self, shard: Shard, plan: FillPlan, report: FillReport) -> None:
        tokens = self.estimator.estimate(len(each.text.encode()) for each in plan.texts)
        requests = [
            (plan.texts[piece], sum(tokens[piece]))
            for piece in pack_requests(tokens, self.quota.max_request_texts, self.quota.max_request_tokens)
        ]
        todo = iter(requests)
        writing = asyncio.Lock()
        failed: list[Exception] = []

        async def work() -> None:
            # an error ends the range, but answers that are on their way are paid for: let them be stored
            for texts, n_tokens in todo:
                if failed or self.stop.is_set():
                    return
                try:
                    await self._send(shard, texts, n_tokens, report, writing)
                except Exception as error:  # noqa: BLE001 - raised below, when the others have ended
                    failed.append(error)
                self._tell(plan, report)

        self._tell(plan, report)
        await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(requests)))))
        if failed:
            raise next((error for error in failed if not isinstance(error, StoppedError)), failed[0])
        self.stop.check()

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
            self._refusals_in_a_row = 0
            report.n_tokens += batch.n_tokens
            async with writing:
                await asyncio.to_thread(_store, shard, texts, batch.embeddings)
            report.n_embedded += sum(len(each.song_ids) for each in texts)
        elif len(texts) > 1:
            for half in bisect(texts):
                await self._send(shard, half, n_tokens // 2 + 1, report, writing)
        else:
            async with writing:
                self._set_aside(shard, texts[0], refusal, report)

    def _set_aside(self, shard: Shard, text: Text, reason: str, report: FillReport) -> None:
        self._refusals_in_a_row += 1
        if self._refusals_in_a_row > MAX_REFUSALS_IN_A_ROW:
            raise ProviderError(
                f"{MAX_REFUSALS_IN_A_ROW} texts in a row were refused, so the fault is not the songs'. The provider "
                f"{reason}. Check the model, its dimensions and the account, then start the same command again"
            )
        shard.append_set_aside(text.song_ids, [text.text_hash] * len(text.song_ids), reason)
        report.set_aside.extend((song_id, reason) for song_id in text.song_ids)
        report.n_set_aside += len(text.song_ids)

    def _tell(self, plan: FillPlan, report: FillReport) -> None:
        total = sum(len(each.song_ids) for each in plan.texts)
        note = f"{plan.range.key}, ${self.budget.usd:,.4f} so far"
        if self.stop.is_set():
            note += "; stopping: answers on their way are still stored"
        self.progress(Progress("embed songs", report.n_embedded + len(report.set_aside), total, note=note))


def _store(shard: Shard, texts: Sequence[Text], embeddings: Float32Matrix) -> None:
    """Append an answer: each text's vector for every song that has the text."""
    rows = [(song_id, each.text_hash, place) for place, each in enumerate(texts) for song_id in each.song_ids]
    song_ids, text_hashes, places = zip(*rows, strict=True)
    write_embeddings_to_file(shard, song_ids, text_hashes, embeddings[list(places)])
