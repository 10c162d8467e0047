"""What is exported, cached, loaded and indexed, by range: from footers, narrow columns and the ledger."""

from dataclasses import dataclass, field, fields

import polars as pl

from songvec_assets.deployment import Deployment
from songvec_assets.embedding.budget import MonthSpending
from songvec_assets.postgres.schema import read_pgvector_caution
from songvec_assets.songs.counts import count_ranges, count_unreachable_ids
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.vectors.table import IndexFacts, describe_tables


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
    """Every range that holds songs, in order."""
    ranges = []
    for row in deployment.read_inventory(deployment.table).frame.filter(pl.col("n_songs") > 0).iter_rows(named=True):
        n_loaded = min(row["n_loaded"], row["n_songs"])
        n_set_aside = min(row["n_rejected"], row["n_songs"] - n_loaded)
        n_left = row["n_songs"] - n_loaded - n_set_aside
        n_waiting = min(max(0, row["n_cached"] - n_loaded), n_left)
        song_range = SongIdRange.from_key(row["key"])
        ranges.append(RangeCoverage(song_range, n_loaded, n_waiting, n_set_aside, n_left - n_waiting))
    return ranges


def measure_status(deployment: Deployment, max_set_aside: int = 20) -> Status:
    """Look at the source's ids, and at all that is exported, cached, loaded and indexed.

    Args:
        deployment: whose.
        max_set_aside: rejected songs to name.
    """
    database, source, table = deployment.database, deployment.source, deployment.table
    # divided as the files are, which a raised stop does not change before the next export
    found = deployment.read_inventory(table, count_ranges(database, source, deployment.store.tiling))
    index = table.index
    counts = found.frame.with_columns(
        n_set_aside="n_rejected", n_indexed=pl.col("n_loaded") if index else pl.lit(0)
    ).select(each.name for each in fields(RangeStatus))
    with database.get_connection() as connection:
        recall = read_recall(connection, table)
    return Status(
        [RangeStatus(**row) for row in counts.iter_rows(named=True)],
        describe_tables(database),
        index,
        found.name_rejected(max_set_aside),
        dict(count_unreachable_ids(database, source)),
        recall.describe() if recall else "",
        *deployment.month_spending(),
        source.caution,
        found.errors,
        read_pgvector_caution(database),
    )
