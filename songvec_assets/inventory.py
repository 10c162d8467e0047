"""One row per range: what the source, its snapshot, the cache, the ledger and the table hold of it.

Every question about the state of ranges is answered from here. Counts and digests are read first: an index scan of the
source, the footers of snapshots, manifests, the ledger without its song_ids, the table's primary key. The song_ids of a
range are read only if its digests differ. When to add here: another column. Keep out: what follows from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from songvec_assets.cache.manifest import Manifest
from songvec_assets.errors import StoreError
from songvec_assets.songs.counts import IdSums, RangeCount
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.plan import LoadSource, RangeState, compare
from songvec_assets.vectors.table import VectorTable

_COUNTS = {"n_rejected": pl.Int64, "n_missing": pl.Int64, "n_orphans": pl.Int64}
_COLUMNS: dict[str, type[pl.DataType]] = {
    "key": pl.String, "n_source": pl.Int64, "n_songs": pl.Int64, "n_cached": pl.Int64, "n_loaded": pl.Int64,
    "n_rows": pl.Int64, "is_answered": pl.Boolean, "is_loaded": pl.Boolean, "error": pl.String, **_COUNTS,
}  # fmt: skip


@dataclass(frozen=True)
class Inventory:
    """All ranges that hold anything, as they were when they were read.

    Attributes:
        source: the cache and the snapshots.
        table: whose rows and ledger were read; None: none.
        known: a row per range, in order: key; n_source (songs of the source; null: not counted), n_songs (of the
            snapshot; null: there is none that can be read), n_cached (songs with a vector), n_loaded (by the ledger),
            n_rows (of the table); is_answered (whether the cache answers the snapshot in full), is_loaded; error (why
            the cache cannot be read: then nothing counts as cached); and n_rejected, n_missing and n_orphans of
            `frame`, null where they take a look at song_ids.
    """

    source: LoadSource
    table: VectorTable | None
    known: pl.DataFrame

    @property
    def behind(self) -> list[SongIdRange]:
        """The ranges whose snapshot is not answered in full by the cache, in order."""
        keys = self.known.filter(pl.col("n_songs").is_not_null(), ~pl.col("is_answered"))["key"]
        ranges = {*self.source.tiling}
        # a range from before the stop was raised is replaced by the next export
        return [each for each in map(SongIdRange.from_key, keys) if each in ranges]

    @cached_property
    def frame(self) -> pl.DataFrame:
        """The same with every count; reads the song_ids of those ranges that counts and digests leave open.

        Returns:
            The columns of `known`, without nulls in n_songs and n_unexported; n_unexported: songs of the source beyond
            those of the snapshot, by count; n_rejected: by the export or the provider; n_missing: with neither a row
            nor a reason, those not exported yet included; n_orphans: loaded, and not in the snapshot.
        """
        unclear = self.known.filter(pl.col("n_missing").is_null())["key"]
        counted = [(key, *self._count(SongIdRange.from_key(key))) for key in unclear]
        found = self.known.update(pl.DataFrame(counted, {"key": pl.String, **_COUNTS}, orient="row"), on="key")
        n_songs = pl.col("n_songs").fill_null(0)
        n_unexported = (pl.col("n_source").fill_null(0) - n_songs).clip(0)
        return found.with_columns(
            n_songs=n_songs, n_unexported=n_unexported, n_missing=pl.col("n_missing") + n_unexported
        )

    @property
    def total(self) -> dict[str, int]:
        """The sum of each count of `frame`."""
        return dict(self.frame.select(pl.col(pl.Int64).sum()).row(0, named=True))

    @property
    def coverage(self) -> pl.DataFrame:
        """What became of the songs of each snapshot, each song counted once: key, loaded, cached, rejected, missing."""
        # by counts: a loaded song counts as that until the next load, whatever the snapshot says of it by now
        left = pl.col("n_songs") - pl.col("loaded") - pl.col("rejected")
        return (
            self.frame.filter(pl.col("n_songs") > 0)
            .with_columns(loaded=pl.min_horizontal("n_loaded", "n_songs"))
            .with_columns(rejected=pl.min_horizontal("n_rejected", pl.col("n_songs") - pl.col("loaded")))
            .with_columns(cached=pl.min_horizontal((pl.col("n_cached") - pl.col("loaded")).clip(0), left))
            .select("key", "loaded", "cached", "rejected", missing=left - pl.col("cached"))
        )

    @property
    def errors(self) -> list[str]:
        """Why ranges of the cache cannot be read; they count as not cached."""
        return self.known.filter(pl.col("error") != "")["error"].to_list()

    def name_rejected(self, n_songs: int) -> list[tuple[int, str]]:
        """song_id and reason of the first rejected songs."""
        named: list[tuple[int, str]] = []
        for key in self.frame.filter(pl.col("n_rejected") > 0)["key"]:
            if len(named) < n_songs:
                named += self._read_rejected(SongIdRange.from_key(key)).head(n_songs - len(named)).rows()
        return named

    def _count(self, song_range: SongIdRange) -> tuple[int, int, int]:
        """Rejected, missing and orphaned songs, by song_id."""
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
    text: str,
    server: str,
    table: VectorTable | None = None,
    counts: Mapping[SongIdRange, RangeCount] | None = None,
) -> Inventory:
    """Read the state of every range that holds anything. Changes nothing.

    Args:
        source: the cache and the snapshots.
        text: identity of how songs become texts, which the cache is to answer.
        server: that is asked for vectors: songs that another one rejected are not answered.
        table: whose ledger and rows are read; None: neither is.
        counts: of the source; None: it is not counted.
    """
    states = {} if table is None else compare(table, source.cache, source.tiling)[0]
    rows = []
    for each in sorted({*source.snapshots.ranges(), *source.cache.ranges(), *states, *(counts or {})}):
        state = states.get(each) or RangeState(source.cache.summarize(each), None, IdSums())
        footer, done = source.snapshots.footer(each), state.cached.complete
        is_answered = bool(done and footer and done.fits(footer.digest, text, server))
        rows.append(
            (
                each.key,
                None if counts is None else counts.get(each, RangeCount()).n_songs,
                footer.n_songs if footer else None,
                state.cached.n_vectors,
                state.loaded.n_songs if state.loaded else 0,
                state.in_table.n_rows,
                is_answered,
                state.is_loaded,
                state.cached.error,
                *((done.n_rejected, 0, 0) if done and is_answered and state.is_loaded else (None, None, None)),
            )
        )
    return Inventory(source, table, pl.DataFrame(rows, _COLUMNS, orient="row"))
