"""What is exported, cached, loaded and indexed, by range: from footers, narrow columns and the ledger."""

from dataclasses import dataclass, field, fields

import polars as pl

from songvec_assets.deployment import Deployment
from songvec_assets.embedding.budget import MonthSpending
from songvec_assets.errors import StoreError
from songvec_assets.postgres.schema import read_pgvector_caution
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import count_songs, load_songs_from_parquet, snapshot_path, snapshot_ranges
from songvec_assets.songs.source import count_ranges, count_unreachable_ids
from songvec_assets.vectors.ivfflat import IndexFacts, find_index
from songvec_assets.vectors.ledger import read_ledger, read_loaded_rows
from songvec_assets.vectors.recall import read_recall
from songvec_assets.vectors.table import describe_tables

_NOTHING_REJECTED = pl.DataFrame(schema={"song_id": pl.Int32, "reason": pl.String})


@dataclass(frozen=True)
class RangeStatus:
    """Songs of a range.

    Attributes:
        key: of the range; "all" for the sum.
        n_songs: in the snapshot.
        n_unexported: in the source beyond those of the snapshot, by count: the next export reads them.
        n_cached: with a vector in the cache.
        n_set_aside: that cannot be embedded, for a named reason.
        n_loaded: in the table, as its ledger says.
        n_indexed: loaded and covered by a valid index.
        n_missing: with neither a row in the table nor a reason; those not exported yet too.
        n_orphans: rows in the table, as its ledger says, whose song is not in the snapshot.
    """

    key: str
    n_songs: int
    n_unexported: int
    n_cached: int
    n_set_aside: int
    n_loaded: int
    n_indexed: int
    n_missing: int
    n_orphans: int


@dataclass(frozen=True)
class RangeCoverage:
    """What became of a range's songs, as far as footers, manifests and the ledger tell: each song counts once.

    Attributes:
        n_loaded: in the table.
        n_waiting: in the cache, and not in the table.
        n_set_aside: without a vector, for a named reason.
        n_missing: the others.
    """

    range: SongIdRange
    n_loaded: int
    n_waiting: int
    n_set_aside: int
    n_missing: int

    @property
    def n_songs(self) -> int:
        """All of them."""
        return self.n_loaded + self.n_waiting + self.n_set_aside + self.n_missing


@dataclass(frozen=True)
class Status:
    """All ranges that hold anything.

    Attributes:
        ranges: in order.
        tables: what each table that is there holds, by its name.
        index: the index as it is, or None.
        set_aside: (song_id, reason), a few.
        unreachable: reason to number of songs whose id is outside every range.
        recall: as measured last, in words; empty before.
        month_usd, month_reserved_usd: billed this month, and reserved for requests in flight, over all runs.
        unreadable: what is wrong with cache files that cannot be read; their ranges count as not cached.
        caution: why the source may hold more songs than this user sees; empty where it does not.
        pgvector: what is wrong with the server's version; empty where nothing is.
    """

    ranges: list[RangeStatus]
    tables: dict[str, str]
    index: IndexFacts | None
    set_aside: list[tuple[int, str]]
    unreachable: dict[str, int]
    recall: str
    month_usd: float
    month_reserved_usd: float
    caution: str = ""
    unreadable: list[str] = field(default_factory=list)
    pgvector: str = ""

    def describe(self) -> list[str]:
        """What there is beyond the ranges, a line each."""
        index = self.index
        return [
            *(f"Table {name}: {held}" for name, held in self.tables.items()),
            "Index: none yet" if index is None else
            f"Index: {index.lists:,} lists over {index.n_rows:,} rows, {index.n_bytes / 1e6:,.1f} MB, {index.probes} "
            f"probes, {self.recall or 'recall not measured'}; {index.n_changed:,} rows changed since",
            f"Spent this month: {MonthSpending(self.month_usd, self.month_reserved_usd).describe()}",
            *(f"Cannot be read: {words}" for words in self.unreadable),
            *(f"Set aside: song {song_id}: {reason}" for song_id, reason in self.set_aside),
            *(f"Set aside: {n_songs:,} × {reason}" for reason, n_songs in self.unreachable.items()),
            *([f"Not exported yet: {self.total.n_unexported:,} songs: `songvec run` exports them"]
              if self.total.n_unexported else []),
            *([f"Source: {self.caution}"] if self.caution else []),
            *([f"Server: {self.pgvector}"] if self.pgvector else []),
        ]  # fmt: skip

    @property
    def total(self) -> RangeStatus:
        """The sum over all ranges."""
        counts = [each.name for each in fields(RangeStatus) if each.name != "key"]
        return RangeStatus("all", **{name: sum(getattr(each, name) for each in self.ranges) for name in counts})


def measure_coverage(deployment: Deployment) -> list[RangeCoverage]:
    """Every range that holds songs, in order. Reads no column of a file whose range is complete."""
    songs, cache, ledger = deployment.store.songs, deployment.cache, read_ledger(deployment.database)
    ranges = []
    for song_range in snapshot_ranges(songs):
        n_songs, done = count_songs(songs, song_range), cache.find_completion(song_range)
        if done is not None:
            n_cached, n_set_aside = done.n_vectors, done.n_rejected
        else:
            shard = cache.open(song_range)
            n_cached, n_set_aside = shard.rows.height, shard.rejected.height
        n_loaded = min(ledger[song_range].n_songs if song_range in ledger else 0, n_songs)
        n_set_aside = min(n_set_aside, n_songs - n_loaded)
        n_waiting = min(max(0, n_cached - n_loaded), n_songs - n_loaded - n_set_aside)
        n_missing = n_songs - n_loaded - n_set_aside - n_waiting
        if n_songs:
            ranges.append(RangeCoverage(song_range, n_loaded, n_waiting, n_set_aside, n_missing))
    return ranges


def measure_status(deployment: Deployment, max_set_aside: int = 20) -> Status:
    """Look at the source's ids, snapshots, shards and ledger.

    Args:
        deployment: whose.
        max_set_aside: songs set aside to name.
    """
    songs, cache = deployment.store.songs, deployment.cache
    unreadable: list[str] = []
    index = find_index(deployment.database)
    set_aside: list[tuple[int, str]] = []
    ranges = []
    source = deployment.source
    # cut as the files are, which a raised stop does not change before the next export
    counts = count_ranges(deployment.database, source, deployment.store.tiling)
    for song_range in sorted({*counts, *snapshot_ranges(songs), *cache.ranges(), *read_ledger(deployment.database)}):
        snapshot = load_songs_from_parquet(snapshot_path(songs, song_range), ["song_id", "set_aside"])
        try:
            shard = cache.open(song_range)
            n_cached, rejected = shard.rows.height, shard.rejected.select("song_id", "reason")
        except StoreError as error:
            n_cached, rejected = 0, _NOTHING_REJECTED
            unreadable.append(str(error))
        with deployment.database.get_connection("web") as connection:
            rows = read_loaded_rows(connection, song_range)
        loaded = pl.Series(dtype=pl.Int32) if rows is None else rows["song_id"]
        refused = pl.concat(
            [
                snapshot.filter(pl.col("set_aside").is_not_null()).rename({"set_aside": "reason"}),
                rejected,
            ]
        )
        answered = pl.concat([refused["song_id"], loaded])
        n_unexported = max(0, counts[song_range].n_songs - snapshot.height) if song_range in counts else 0
        n_missing = snapshot.filter(~pl.col("song_id").is_in(answered.to_list())).height
        set_aside.extend(refused.head(max_set_aside - len(set_aside)).rows())
        ranges.append(
            RangeStatus(
                key=song_range.key,
                n_songs=snapshot.height,
                n_unexported=n_unexported,
                n_cached=n_cached,
                n_set_aside=refused.height,
                n_loaded=len(loaded),
                n_indexed=len(loaded) if index else 0,
                n_missing=n_missing + n_unexported,
                n_orphans=len(loaded) - int(loaded.is_in(snapshot["song_id"].implode()).sum()),
            )
        )
    unreachable = count_unreachable_ids(deployment.database, source)
    with deployment.database.get_connection() as connection:
        recall = read_recall(connection)
    tables, month = describe_tables(deployment.database), deployment.month_spending()
    words = recall.describe() if recall else ""
    pgvector = read_pgvector_caution(deployment.database)
    return Status(
        ranges, tables, index, set_aside, dict(unreachable), words, *month, source.caution, unreadable, pgvector
    )
