"""What is exported, cached, loaded and indexed, by range: from footers, narrow columns and the ledger."""

from dataclasses import dataclass, fields

import polars as pl

from songvec_assets.cache.shards import load_embeddings_from_cache
from songvec_assets.deployment import Deployment
from songvec_assets.songs.snapshots import load_songs_from_parquet, snapshot_path, snapshot_ranges
from songvec_assets.songs.source import count_unreachable_ids
from songvec_assets.vectors.ivfflat import IndexFacts, find_index
from songvec_assets.vectors.ledger import read_ledger, read_loaded_rows
from songvec_assets.vectors.table import describe_tables


@dataclass(frozen=True)
class RangeStatus:
    """Songs of a range.

    Attributes:
        key: of the range; "all" for the sum.
        n_songs: in the snapshot.
        n_cached: with a vector in the cache.
        n_set_aside: that cannot be embedded, for a named reason.
        n_loaded: in the table, as its ledger says.
        n_indexed: loaded and covered by a valid index.
        n_missing: with neither a row in the table nor a reason.
    """

    key: str
    n_songs: int
    n_cached: int
    n_set_aside: int
    n_loaded: int
    n_indexed: int
    n_missing: int


@dataclass(frozen=True)
class Status:
    """All ranges that hold anything.

    Attributes:
        ranges: in order.
        tables: what each table that is there holds, by its name.
        index: the index as it is, or None.
        set_aside: (song_id, reason), a few.
        unreachable: reason to number of songs whose id is outside every range.
    """

    ranges: list[RangeStatus]
    tables: dict[str, str]
    index: IndexFacts | None
    set_aside: list[tuple[int, str]]
    unreachable: dict[str, int]

    @property
    def total(self) -> RangeStatus:
        """The sum over all ranges."""
        counts = [field.name for field in fields(RangeStatus) if field.name != "key"]
        return RangeStatus("all", **{name: sum(getattr(each, name) for each in self.ranges) for name in counts})


def measure_status(deployment: Deployment, max_set_aside: int = 20) -> Status:
    """Look at snapshots, shards and ledger.

    Args:
        deployment: whose.
        max_set_aside: songs set aside to name.
    """
    songs, cache = deployment.store.songs, deployment.cache
    index = find_index(deployment.database)
    set_aside: list[tuple[int, str]] = []
    ranges = []
    for song_range in sorted({*snapshot_ranges(songs), *cache.ranges(), *read_ledger(deployment.database)}):
        snapshot = load_songs_from_parquet(snapshot_path(songs, song_range), ["song_id", "set_aside"])
        live = load_embeddings_from_cache(cache, song_range)[1]
        with deployment.database.get_connection("web") as connection:
            rows = read_loaded_rows(connection, song_range)
        loaded = pl.Series(dtype=pl.Int32) if rows is None else rows["song_id"]
        refused = pl.concat(
            [
                snapshot.filter(pl.col("set_aside").is_not_null()).rename({"set_aside": "reason"}),
                live.filter(pl.col("reason").is_not_null()).select("song_id", "reason"),
            ]
        )
        answered = pl.concat([refused["song_id"], loaded])
        set_aside.extend(refused.head(max_set_aside - len(set_aside)).rows())
        ranges.append(
            RangeStatus(
                key=song_range.key,
                n_songs=snapshot.height,
                n_cached=live["reason"].null_count(),
                n_set_aside=refused.height,
                n_loaded=len(loaded),
                n_indexed=len(loaded) if index else 0,
                n_missing=snapshot.filter(~pl.col("song_id").is_in(answered.to_list())).height,
            )
        )
    unreachable = count_unreachable_ids(deployment.database, deployment.source)
    return Status(ranges, describe_tables(deployment.database), index, set_aside, dict(unreachable))
