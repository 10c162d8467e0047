"""What is exported, cached, loaded and indexed, by range: from footers, narrow columns and the ledger."""

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl
import pyarrow.parquet as pq

from songvec_assets.cache.shards import load_embeddings_from_cache
from songvec_assets.deployment import Deployment
from songvec_assets.songs.export import load_songs_from_parquet, snapshot_path, snapshot_ranges
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.ivfflat import IndexFacts, find_index
from songvec_assets.vectors.table import loaded_ranges


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
    """

    key: str
    n_songs: int
    n_cached: int
    n_set_aside: int
    n_loaded: int
    n_indexed: int

    @property
    def n_missing(self) -> int:
        """Songs with neither a row in the table nor a reason."""
        return max(0, self.n_songs - self.n_set_aside - self.n_loaded)


@dataclass(frozen=True)
class Status:
    """All ranges that hold anything.

    Attributes:
        ranges: in order.
        index: the index as it is, or None.
        set_aside: (song_id, reason), a few.
    """

    ranges: list[RangeStatus]
    index: IndexFacts | None
    set_aside: list[tuple[int, str]]

    @property
    def total(self) -> RangeStatus:
        """The sum over all ranges."""
        return _sum(self.ranges)


def measure_status(deployment: Deployment, max_set_aside: int = 20) -> Status:
    """Look at snapshots, shards and ledger.

    Args:
        deployment: whose.
        max_set_aside: songs set aside to name.
    """
    songs, cache, loaded = deployment.store.songs, deployment.cache, loaded_ranges(deployment.database)
    index = find_index(deployment.database)
    set_aside: list[tuple[int, str]] = []
    ranges = []
    for song_range in sorted({*snapshot_ranges(songs), *cache.ranges(), *loaded}):
        by_export = _read_set_aside(deployment, song_range)
        path = snapshot_path(songs, song_range)
        n_songs = pq.read_metadata(path).num_rows if path.exists() else 0
        _, live = load_embeddings_from_cache(cache, song_range)
        by_provider = live.filter(pl.col("reason").is_not_null()).select("song_id", "reason")
        for reasons in (by_export, by_provider):
            set_aside.extend(reasons.head(max_set_aside - len(set_aside)).rows())
        n_refused = by_provider.height
        ranges.append(
            RangeStatus(
                song_range.key,
                n_songs,
                live.height - n_refused,
                by_export.height + n_refused,
                loaded.get(song_range, 0),
                loaded.get(song_range, 0) if index else 0,
            )
        )
    return Status(ranges, index, set_aside)


def _read_set_aside(deployment: Deployment, song_range: SongIdRange) -> pl.DataFrame:
    songs = load_songs_from_parquet(snapshot_path(deployment.store.songs, song_range), ["song_id", "set_aside"])
    return songs.filter(pl.col("set_aside").is_not_null()).rename({"set_aside": "reason"})


def _sum(ranges: Iterable[RangeStatus]) -> RangeStatus:
    each = list(ranges)
    names = ("n_songs", "n_cached", "n_set_aside", "n_loaded", "n_indexed")
    return RangeStatus("all", *(sum(getattr(status, name) for status in each) for name in names))
