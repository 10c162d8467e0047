"""What a table lacks against the cache: from the ledger, the table's own counts and the shards' narrow columns."""

from dataclasses import dataclass, field, replace

import polars as pl
import sqlalchemy as sa

from songvec_assets.cache.shards import CachedRange, ModelCache
from songvec_assets.errors import DamagedShardError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import StopSignal
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.ledger import (
    LedgerEntry,
    TableRows,
    read_ledger,
    read_loaded_rows,
    read_range_rows,
    read_table_rows,
)
from songvec_assets.vectors.table import TABLE

_WHOLE_RANGE_SHARE = 0.5


@dataclass(frozen=True)
class Backlog:
    """What a table lacks against the cache.

    Attributes:
        unchanged: rows of each range with nothing to do.
        changed: rows of each range that differs.
        n_changed: rows of all ranges that differ.
        damaged: what is wrong with the shards that cannot be read.
        n_foreign: rows of ranges that nothing was ever loaded of: somebody else's, and left alone.
    """

    unchanged: dict[SongIdRange, int] = field(default_factory=dict)
    changed: dict[SongIdRange, int] = field(default_factory=dict)
    n_changed: int = 0
    damaged: list[str] = field(default_factory=list)
    n_foreign: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of all ranges."""
        return sum(self.unchanged.values()) + sum(self.changed.values())


def compare_with_cache(
    database: Database, cache: ModelCache, tiling: Tiling, stop: StopSignal, table: str = TABLE
) -> Backlog:
    """Hold the cache against the ledger and the table's own counts. Reads no vector.

    Raises:
        StoreError: the cache is empty: nothing was ever filled.
    """
    tiles = set(tiling)
    ranges = [song_range for song_range in cache.ranges() if song_range in tiles]
    if not ranges:
        raise StoreError(
            f"no embeddings are cached for model {cache.model!r} in {cache.storage}: fill the cache first, with "
            "`songvec run`, or with `dagster asset materialize --select '*' --partition-range FIRST...LAST`"
        )
    ledger = read_ledger(database, table)
    rows, below = read_table_rows(database, tiling, table)
    n_foreign = below.n_rows + sum(rows[each].n_rows for each in rows if each not in ledger and each not in ranges)
    backlog, n_changed = Backlog(n_foreign=n_foreign), 0
    for song_range in ranges:
        stop.check()
        try:
            shard = cache.open(song_range)
            vectors = shard.rows
        except StoreError as error:
            backlog.damaged.append(str(error))
            continue
        entry = ledger.get(song_range)
        there = rows.get(song_range, TableRows())
        # a damaged file is named, also where all rows of it could be read
        if not shard.damaged and entry == LedgerEntry.of(vectors) and there == TableRows.of(vectors["song_id"]):
            backlog.unchanged[song_range] = vectors.height
            continue
        backlog.changed[song_range] = vectors.height
        is_known = entry is not None and there.n_rows > 0
        n_changed += _count_changed(database, song_range, vectors, table) if is_known else vectors.height
    return replace(backlog, n_changed=n_changed)


def _count_changed(database: Database, song_range: SongIdRange, vectors: pl.DataFrame, table: str) -> int:
    with database.get_connection() as connection:
        loaded = read_loaded_rows(connection, song_range, table)
        stale = find_stale_rows(connection, song_range, vectors, loaded, table)
    return vectors.height if stale is None else len(stale.written_anew)


def check_whole(shard: CachedRange, loaded: pl.DataFrame | None) -> None:
    """Refuse a range that lost rows: that a song is not in it does not say that the song was deleted.

    Its manifest names the files that must be there, and songs whose rows were found damaged. Without a manifest each
    loaded song must be in a file.
    """
    n_lost = 0
    if loaded is not None:
        found = loaded["song_id"].is_in(shard.rows["song_id"].implode())
        lost = loaded["song_id"].is_in([*shard.manifest.damaged]) if shard.is_read else pl.lit(True)
        n_lost = loaded.filter(~found & lost).height
    if shard.damaged or n_lost:
        named = "; ".join(f"{name}: {why}" for name, why in shard.damaged.items()) or "none"
        raise DamagedShardError(
            f"{shard.describe} was changed on disk: {len(shard.damaged):,} files cannot be read ({named}), and "
            f"the vectors of {n_lost:,} loaded songs are lost. The range was not loaded: materialize embedding_cache "
            f"for {shard.range.key}, which embeds again what is lost, then load again"
        )


@dataclass(frozen=True)
class StaleRows:
    """What changed of a range: song_ids whose rows stay, and of those that go or are written anew."""

    kept: list[int]
    written_anew: list[int]


def find_stale_rows(
    connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame, loaded: pl.DataFrame | None, table: str
) -> StaleRows | None:
    """Hold what the ledger says is loaded of a range against the cache; None: write the whole range."""
    if loaded is None or TableRows.of(loaded["song_id"]) != read_range_rows(connection, song_range, table):
        return None
    kept = loaded.join(vectors, on=["song_id", "checksum"], how="semi")["song_id"]
    n_rows = max(loaded.height, vectors.height)
    if n_rows - len(kept) > _WHOLE_RANGE_SHARE * n_rows:
        return None
    # the new songs' ids too: a foreign row may be in their place
    songs = pl.concat([loaded["song_id"], vectors["song_id"]]).unique()
    return StaleRows(kept.to_list(), songs.filter(~songs.is_in(kept.implode())).to_list())
