"""One row per range: what the source, its snapshot, the cache, the ledger and the table have of it.

Everything that asks what state a range is in asks here. Counts and digests are read first: an index scan of the source,
the footers of snapshots, manifests, the ledger without its song_ids, the table's primary key. The song_ids of a range
are read only if its digests differ. When to add here: another fact of a range. Keep out: what follows from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from songvec_assets.cache.manifest import Manifest
from songvec_assets.errors import StoreError
from songvec_assets.songs.counts import IdSums, RangeCount
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Footer
from songvec_assets.vectors.plan import LoadSource, RangeState, compare
from songvec_assets.vectors.table import VectorTable


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


_SCHEMA: dict[str, type[pl.DataType]] = {
    "key": pl.String, "n_source": pl.Int64, "n_songs": pl.Int64, "n_unexported": pl.Int64, "n_cached": pl.Int64,
    "n_rejected": pl.Int64, "n_loaded": pl.Int64, "n_rows": pl.Int64, "n_missing": pl.Int64, "n_orphans": pl.Int64,
    "is_answered": pl.Boolean, "is_loaded": pl.Boolean, "snapshot": pl.String, "cache": pl.Binary, "ledger": pl.Binary,
}  # fmt: skip


@dataclass(frozen=True)
class Inventory:
    """All ranges that hold anything, as they were when they were read.

    Attributes:
        source: the cache and the snapshots.
        rows: in the order of the ranges.
        table: that was looked at; None: none was.
    """

    source: LoadSource
    rows: list[RangeRow]
    table: VectorTable | None = None

    @cached_property
    def frame(self) -> pl.DataFrame:
        """One row per range; reads the song_ids of those that counts and digests leave open.

        Returns:
            Columns key; n_source (null: not asked), n_songs (of the snapshot), n_unexported, n_cached, n_rejected (by
            the export or the provider), n_loaded (by the ledger), n_rows (of the table), n_missing (with neither a row
            nor a reason; those not exported yet too), n_orphans (loaded, and not in the snapshot); is_answered,
            is_loaded; and digests: snapshot, cache, ledger.
        """
        return pl.DataFrame([self._describe(each) for each in self.rows], _SCHEMA, orient="row")

    @property
    def errors(self) -> list[str]:
        """Why ranges of the cache cannot be read; they count as not cached."""
        return [each.state.cached.error for each in self.rows if each.state.cached.error]

    def name_rejected(self, n_songs: int) -> list[tuple[int, str]]:
        """song_id and reason of the first rejected songs."""
        named: list[tuple[int, str]] = []
        for row, n_rejected in zip(self.rows, self.frame["n_rejected"], strict=True):
            if n_rejected and len(named) < n_songs:
                named += self._read_rejected(row.range).head(n_songs - len(named)).rows()
        return named

    def _describe(self, row: RangeRow) -> tuple[Any, ...]:
        cached, loaded, n_songs = row.state.cached, row.state.loaded, row.n_songs
        n_unexported = max(0, (row.n_source or 0) - n_songs)
        if cached.complete is not None and row.is_answered and row.state.is_loaded:
            n_rejected, n_missing, n_orphans = cached.complete.n_rejected, 0, 0
        else:
            n_rejected, n_missing, n_orphans = self._count_exactly(row.range)
        return (
            row.range.key, row.n_source, n_songs, n_unexported, cached.n_vectors,
            n_rejected, loaded.n_songs if loaded else 0, row.state.in_table.n_rows, n_missing + n_unexported, n_orphans,
            row.is_answered, row.state.is_loaded, row.snapshot.digest if row.snapshot else None, cached.digest,
            loaded.digest if loaded else None,
        )  # fmt: skip

    def _count_exactly(self, song_range: SongIdRange) -> tuple[int, int, int]:
        songs = self.source.snapshots.read(song_range, ["song_id"])["song_id"]
        rejected = self._read_rejected(song_range)
        loaded = pl.Series([], dtype=pl.Int32) if self.table is None else self.table.ledger.read_song_ids(song_range)
        answered = pl.concat([rejected["song_id"], loaded])
        n_missing = int((~songs.is_in(answered.implode())).sum())
        return rejected.height, n_missing, int((~loaded.is_in(songs.implode())).sum())

    def _read_rejected(self, song_range: SongIdRange) -> pl.DataFrame:
        """Songs of a range that the export or the provider rejected: columns song_id and reason."""
        try:
            manifest = self.source.cache.read_manifest(song_range)
        except StoreError:  # the range counts as not cached, see `errors`
            manifest = Manifest()
        refused = [(each.song_id, each.reason) for each in manifest.rejected]
        provider = pl.DataFrame(refused, {"song_id": pl.Int32, "reason": pl.String}, orient="row")
        return pl.concat([self.source.snapshots.read_rejected(song_range), provider])


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
        states = {each: _unloaded(source, each) for each in source.cache.ranges()}
    else:
        states, _ = compare(table, source.cache, source.tiling)
    rows = []
    for each in sorted({*source.snapshots.ranges(), *states, *(counts or {})}):
        state = states.get(each) or _unloaded(source, each)
        footer = source.snapshots.footer(each)
        done = state.cached.complete
        is_answered = bool(done and footer and done.fits(footer.digest, question.text, question.server))
        n_source = None if counts is None else counts.get(each, RangeCount()).n_songs
        rows.append(RangeRow(each, n_source, footer, state, is_answered))
    return Inventory(source, rows, table)


def _unloaded(source: LoadSource, song_range: SongIdRange) -> RangeState:
    return RangeState(source.cache.summarize(song_range), None, IdSums())
