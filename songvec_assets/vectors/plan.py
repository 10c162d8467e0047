"""What a table lacks compared with the cache: the ranges to load, damaged ones, and songs that a swap would lose.

Reads the ledger, the table's primary key, manifests and narrow columns, but no vector; changes nothing. When to add
here: another reason to load a range, or to refuse it. Keep out: the load itself (`load`), and the swap (`swap`).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import polars as pl

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.model_cache import ModelCache, RangeSummary
from songvec_assets.errors import DamagedCacheError, StoreError, TableMismatchError
from songvec_assets.progress import SILENT, RunContext
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.vectors.ledger import LedgerEntry
from songvec_assets.vectors.spec import SERVING
from songvec_assets.vectors.table import VectorTable

_WHOLE_RANGE_SHARE = 0.5


@dataclass(frozen=True)
class LoadSource:
    """What a table is loaded from.

    Attributes:
        cache: of the table's model.
        snapshots: say what songs there are; a load reads them only before a swap.
    """

    cache: ModelCache
    tiling: Tiling
    snapshots: Snapshots

    def ranges(self) -> list[SongIdRange]:
        """The ranges that are cached, as song_ids are divided now."""
        return [song_range for song_range in self.cache.ranges() if song_range in self.tiling]


@dataclass(frozen=True)
class RangeState:
    """What the cache, the ledger and the table have of a range.

    Attributes:
        cached: by the cache's manifest.
        loaded: by the ledger; None: it was never loaded.
        in_table: by the table's primary key.
    """

    cached: RangeSummary
    loaded: LedgerEntry | None
    in_table: IdSums

    @property
    def is_loaded(self) -> bool:
        """Whether all three have the same rows and no file is damaged; if one is, the load reports it."""
        is_recorded = self.loaded == LedgerEntry(self.cached.n_vectors, self.cached.digest)
        return is_recorded and self.in_table == self.cached.ids and not self.cached.is_damaged


@dataclass(frozen=True)
class LoadPlan:
    """What a table lacks compared with the cache.

    Attributes:
        models: of the loaded ranges.
        n_unmanaged: rows in ranges that were never loaded: somebody else wrote them, and they are left alone.
        unchanged: rows of each range with nothing to do.
        changed: rows of each range that differs.
        damaged: why ranges cannot be read.
        n_changed: rows that differ, over all ranges.
    """

    models: frozenset[str]
    n_unmanaged: int
    unchanged: dict[SongIdRange, int] = field(default_factory=dict)
    changed: dict[SongIdRange, int] = field(default_factory=dict)
    damaged: dict[SongIdRange, str] = field(default_factory=dict)
    n_changed: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of all ranges."""
        return sum(self.unchanged.values()) + sum(self.changed.values())


def compare(
    table: VectorTable, cache: ModelCache, tiling: Tiling, opens_files: bool = False
) -> tuple[dict[SongIdRange, RangeState], int]:
    """The state of each range, in order, by one scan of the table's primary key and one read of the ledger.

    Args:
        table: whose rows and ledger are looked at.
        cache: of its model.
        opens_files: see `ModelCache.summarize`.

    Returns:
        Every range that is cached, loaded or has rows; and the number of rows with a negative song_id.
    """
    ledger, (in_table, below) = table.ledger.read(), table.read_id_sums(tiling)
    ranges = sorted({*cache.ranges(), *ledger, *in_table})
    states = {
        each: RangeState(cache.summarize(each, opens_files), ledger.get(each), in_table.get(each, IdSums()))
        for each in ranges
    }
    return states, below.n_rows


def plan_load(table: VectorTable, source: LoadSource, run: RunContext = SILENT) -> LoadPlan:
    """Compare the cache with the ledger and the table's own song_ids.

    Raises:
        StoreError: the cache is empty: nothing was ever filled.
    """
    cache = source.cache
    ranges = source.ranges()
    if not ranges:
        raise StoreError(
            f"no embeddings are cached for model {cache.model!r} in {cache.storage}: fill the cache first, with "
            "`songvec run`",
            "cache.missing",
        )
    # each file is opened once: damage is found even if there is nothing to load
    states, n_below = compare(table, cache, source.tiling, opens_files=True)
    unmanaged = [each.in_table.n_rows for key, each in states.items() if each.loaded is None and key not in ranges]
    unchanged, changed, damaged = {}, {}, {}
    n_changed = 0
    for song_range in ranges:
        run.check_stop()
        state = states[song_range]
        n_rows = state.cached.n_vectors
        if state.cached.error:
            damaged[song_range] = state.cached.error
        elif state.is_loaded:
            unchanged[song_range] = n_rows
        else:
            changed[song_range] = n_rows
            differing = None
            if state.loaded is not None and state.in_table.n_rows:
                vectors, loaded = cache.open(song_range).rows, table.ledger.read_rows(song_range)
                differing = find_differing(loaded, vectors, state.in_table)
            n_changed += n_rows if differing is None else len(differing)
    models = frozenset(each.loaded.model for each in states.values() if each.loaded)
    return LoadPlan(models, n_below + sum(unmanaged), unchanged, changed, damaged, n_changed)


def find_differing(loaded: pl.DataFrame | None, vectors: pl.DataFrame, in_table: IdSums) -> pl.Series | None:
    """The songs of a range whose rows are to be deleted, written or both; None: the range is to be written as a whole.

    Args:
        loaded: song_id and checksum, by the ledger; None: the range was never loaded.
        vectors: the same columns of the cache, among others.
        in_table: sums of the table's song_ids. If the ledger's differ, somebody else changed the table.
    """
    if loaded is None or IdSums.of(loaded["song_id"]) != in_table:
        return None
    both = pl.concat([loaded, vectors.select(loaded.columns)])
    differing = both.unique(keep="none")
    n_kept, n_rows = (both.height - differing.height) // 2, max(loaded.height, vectors.height)
    return None if n_rows - n_kept > _WHOLE_RANGE_SHARE * n_rows else differing["song_id"].unique()


def check_whole(cached: CachedRange, loaded: pl.DataFrame | None = None) -> None:
    """Refuse a range that lost rows: else its songs would be taken for deleted.

    Its manifest names the files that must be there, and the songs whose rows were found damaged. Without a manifest,
    each loaded song must be in a file.

    Raises:
        DamagedCacheError: it lost rows.
    """
    n_lost = 0
    if loaded is not None:
        found = loaded["song_id"].is_in(cached.rows["song_id"].implode())
        lost = loaded["song_id"].is_in([*cached.manifest.damaged]) if cached.files.manifest else pl.lit(True)
        n_lost = loaded.filter(~found & lost).height
    if cached.damaged or n_lost:
        named = "; ".join(f"{name}: {why}" for name, why in cached.damaged.items()) or "none"
        raise DamagedCacheError(
            f"{cached.folder} was changed on disk: {len(cached.damaged):,} files cannot be read ({named}), and "
            f"the vectors of {n_lost:,} loaded songs are lost. The range was not loaded: run `songvec "
            f"run --ranges {cached.range.key}`, which embeds again what is lost, and loads it"
        )


def check_missing(
    serving: VectorTable,
    source: LoadSource,
    name: str,
    ranges: Collection[SongIdRange],
    read_song_ids: Callable[[SongIdRange], set[int] | None],
    run: RunContext,
) -> None:
    """Refuse to replace the serving table if songs that it has would be lost.

    Songs are compared by song_id, not by range: the stop may have been raised since they were loaded. A song is not
    missing if it was deleted from the source, or rejected by the export or the provider. In a range without a snapshot,
    every song counts as missing.

    Args:
        serving: the table that would be replaced.
        source: what the replacement is loaded from.
        name: of the replacement, or of what it is made from, for the message.
        ranges: that the replacement has.
        read_song_ids: the songs that the replacement has of a range; None: all.
        run: ends the comparison between two ranges.

    Raises:
        TableMismatchError: names some of the songs and their ranges.
    """
    missing: list[int] = []
    cached = source.cache.ranges()
    exported = source.snapshots.ranges()
    for song_range in sorted(serving.ledger.read()):
        run.check_stop()
        songs = set(serving.ledger.read_song_ids(song_range))
        for each in filter(song_range.overlaps, ranges):
            found = read_song_ids(each)
            songs = {song_id for song_id in songs if song_id not in each} if found is None else songs - found
        if not songs:
            continue
        for each in filter(song_range.overlaps, cached):
            songs -= {rejection.song_id for rejection in source.cache.read_manifest(each).rejected}
        known = [*filter(song_range.overlaps, exported)]
        kept = set[int]().union(*map(source.snapshots.read_embeddable, known))
        missing += [song_id for song_id in songs if song_id in kept or not any(song_id in each for each in known)]
    if missing:
        missing.sort()
        keys = [each.key for each in sorted({source.tiling.range_of(song_id) for song_id in missing})]
        raise TableMismatchError(
            f"{name} lacks {len(missing):,} songs that {SERVING} has and that were not deleted from the source "
            f"(song_id {', '.join(map(str, missing[:5]))}, …; range {', '.join(keys[:5])}, …): {SERVING} was not "
            f"replaced. Export and fill these ranges for {source.cache.model}, then start the same command again; "
            "`songvec swap` does all of it, and names the ranges that fail",
            "table.swap-blocked",
        )


def read_loadable(source: LoadSource, song_range: SongIdRange) -> set[int] | None:
    """The songs that a load of a range would write; None: the range is damaged, which the load reports."""
    try:
        cached = source.cache.open(song_range)
        check_whole(cached)
    except (StoreError, DamagedCacheError):
        return None
    return set(cached.rows["song_id"])
