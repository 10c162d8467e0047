"""One row per range: what the source, its snapshot, the cache, the ledger and the table have of it.

Everything that asks what state a range is in asks here. Counts and digests are read first: an index scan of the source,
the footers of snapshots, manifests, the ledger without its song_ids, the table's primary key. The song_ids of a range
are read only if its digests differ. When to add here: another fact of a range. Keep out: what follows from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from songvec_assets.errors import StoreError
from songvec_assets.songs.counts import IdSums, RangeCount
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Footer, load_songs_from_parquet, read_footer, snapshot_path, snapshot_ranges
from songvec_assets.vectors.load import LoadSource, RangeState, compare
from songvec_assets.vectors.table import VectorTable

_REJECTED = {"song_id": pl.Int32, "reason": pl.String}


@dataclass(frozen=True)
class Question:
    """What the answers depend on.

    Attributes:
        text: identity of how songs become texts.
        server: that is asked for vectors.
    """

    text: str
    server: str


@dataclass(frozen=True)
class RangeRow:
    """A range.

    Attributes:
        range: which.
        n_source: songs in the source; None: not asked.
        snapshot: footer of its snapshot; None: there is none that can be read.
        state: of cache, ledger and table.
        is_answered: whether the cache answers the snapshot in full.
    """

    range: SongIdRange
    n_source: int | None
    snapshot: Footer | None
    state: RangeState
    is_answered: bool

    @property
    def n_songs(self) -> int:
        """Songs in the snapshot."""
        return self.snapshot.n_songs if self.snapshot else 0

    @property
    def n_unexported(self) -> int:
        """Songs in the source beyond those of the snapshot, by count."""
        return max(0, (self.n_source or 0) - self.n_songs)

    @property
    def n_loaded(self) -> int:
        """Songs in the table, by its ledger."""
        return self.state.loaded.n_songs if self.state.loaded else 0

    @property
    def is_current(self) -> bool:
        """Whether source, snapshot, cache, ledger and table agree, as far as counts and digests say."""
        return self.is_answered and self.state.is_loaded


@dataclass(frozen=True)
class Inventory:
    """All ranges that hold anything, as they were when they were read.

    Attributes:
        source: the cache and the snapshots.
        rows: in the order of the ranges.
        table: that was looked at; None: none was.
        n_below: rows of the table with a negative song_id.
    """

    source: LoadSource
    rows: list[RangeRow]
    table: VectorTable | None = None
    n_below: int = 0

    @cached_property
    def frame(self) -> pl.DataFrame:
        """One row per range: key, n_source, n_songs, n_unexported, n_cached, n_rejected, n_loaded, n_rows (of the
        table), n_missing, n_orphans, is_answered, is_loaded; and the digests snapshot, cache and ledger."""
        rows = []
        for each in self.rows:
            counts = self.count_songs(each)
            rows.append(
                {
                    "key": each.range.key,
                    "n_source": each.n_source,
                    "n_songs": each.n_songs,
                    "n_unexported": each.n_unexported,
                    "n_cached": each.state.cached.n_vectors,
                    "n_rejected": counts.n_rejected,
                    "n_loaded": each.n_loaded,
                    "n_rows": each.state.in_table.n_rows,
                    "n_missing": counts.n_missing,
                    "n_orphans": counts.n_orphans,
                    "is_answered": each.is_answered,
                    "is_loaded": each.state.is_loaded,
                    "snapshot": each.snapshot.digest if each.snapshot else None,
                    "cache": each.state.cached.digest,
                    "ledger": each.state.loaded.digest if each.state.loaded else None,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def count_songs(self, row: RangeRow) -> "SongCounts":
        """What became of a range's songs; reads their ids if the digests leave it open."""
        done = row.state.cached.complete
        if row.is_current and done is not None:
            return SongCounts(done.n_rejected, row.n_unexported, 0)
        songs, rejected = self._read_songs(row.range), self.read_rejected(row.range)
        loaded = pl.Series([], dtype=pl.Int32) if self.table is None else self.table.ledger.read_song_ids(row.range)
        answered = pl.concat([rejected["song_id"], loaded])
        n_missing = songs.len() - int(songs.is_in(answered.implode()).sum())
        n_orphans = len(loaded) - int(loaded.is_in(songs.implode()).sum())
        return SongCounts(rejected.height, n_missing + row.n_unexported, n_orphans)

    def read_rejected(self, song_range: SongIdRange) -> pl.DataFrame:
        """Songs of a range that the export or the provider rejected: columns song_id and reason."""
        snapshot = load_songs_from_parquet(
            snapshot_path(self.source.songs_folder, song_range), ["song_id", "set_aside"]
        ).rename({"set_aside": "reason"})
        try:
            manifest = self.source.cache.read_manifest(song_range)
        except StoreError:  # the range counts as not cached; its `error` says why
            return snapshot.filter(pl.col("reason").is_not_null())
        refused = [(each.song_id, each.reason) for each in manifest.rejected]
        return pl.concat(
            [snapshot.filter(pl.col("reason").is_not_null()), pl.DataFrame(refused, _REJECTED, orient="row")]
        )

    def _read_songs(self, song_range: SongIdRange) -> pl.Series:
        return load_songs_from_parquet(snapshot_path(self.source.songs_folder, song_range), ["song_id"])["song_id"]


@dataclass(frozen=True)
class SongCounts:
    """Songs of a range.

    Attributes:
        n_rejected: that cannot be embedded, for a named reason.
        n_missing: with neither a row in the table nor a reason; those not exported yet too.
        n_orphans: rows in the table, as its ledger says, whose song is not in the snapshot.
    """

    n_rejected: int
    n_missing: int
    n_orphans: int


def read(
    source: LoadSource,
    question: Question,
    table: VectorTable | None = None,
    counts: Mapping[SongIdRange, RangeCount] | None = None,
) -> Inventory:
    """Look at every range that holds anything. Changes nothing.

    Args:
        source: the cache and the snapshots.
        question: what the cache is to answer.
        table: whose ledger and rows are looked at; None: neither is.
        counts: of the source; None: it is not asked.
    """
    if table is None:
        states, n_below = {each: _unloaded(source, each) for each in source.cache.ranges()}, 0
    else:
        states, n_below = compare(table, source.cache, source.tiling)
    rows = []
    for each in sorted({*snapshot_ranges(source.songs_folder), *states, *(counts or {})}):
        state = states.get(each) or _unloaded(source, each)
        footer = read_footer(snapshot_path(source.songs_folder, each))
        done = state.cached.complete
        is_answered = bool(done and footer and done.fits(footer.digest, question.text, question.server))
        n_source = None if counts is None else counts.get(each, RangeCount()).n_songs
        rows.append(RangeRow(each, n_source, footer, state, is_answered))
    return Inventory(source, rows, table, n_below)


def _unloaded(source: LoadSource, song_range: SongIdRange) -> RangeState:
    return RangeState(source.cache.summarize(song_range), None, IdSums())
