"""One row per range: what the source, its snapshot, the cache, the ledger and the table hold of it.

Every question about the state of ranges is answered from here. Counts and digests are read first: an index scan of the
source, the footers of snapshots, manifests, the ledger without its song_ids, the table's primary key. The song_ids of a
range are read only if its digests differ. When to add here: another column. Keep out: what follows from a figure.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from songvec_assets.cache.manifest import Manifest
from songvec_assets.errors import StoreError
from songvec_assets.songs.counts import IdSums, RangeCount
from songvec_assets.songs.missing import count_missing
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.plan import LoadSource, RangeState, compare
from songvec_assets.vectors.table import VectorTable

_COLUMNS: dict[str, type[pl.DataType]] = {
    "key": pl.String,
    "error": pl.String,
    "is_answered": pl.Boolean,
    "is_loaded": pl.Boolean,
    **dict.fromkeys(["n_source", "n_songs", "n_unexported", "n_cached", "n_loaded", "n_rows"], pl.Int64),
    **dict.fromkeys(["n_rejected", "n_missing", "n_orphans"], pl.Int64),
}
STATES = "unreadable", "behind", "cached", "loaded"


@dataclass(frozen=True)
class Inventory:
    """All ranges that hold anything, as they were when they were read.

    Attributes:
        files: the cache and the snapshots.
        frame: a row per range, in order. key; error (why the cache cannot be read; then nothing counts as cached);
            is_answered (whether each song of the snapshot has a vector or a reason); is_loaded. Counts of songs:
            n_source (in the source; null: not counted), n_songs (in the snapshot; null: it is missing or unreadable),
            n_unexported (n_source less n_songs), n_cached (with a vector), n_loaded (by the ledger), n_rows (in the
            table). If the table was read, and else null: n_rejected (by the export or the provider), n_missing
            (without a row and without a reason, those not exported included), n_orphans (loaded, not in the snapshot).
    """

    files: LoadSource
    frame: pl.DataFrame

    @property
    def behind(self) -> list[SongIdRange]:
        """The ranges that have songs without a vector or a reason, in order."""
        keys = self.frame.filter(pl.col("n_songs").is_not_null(), ~pl.col("is_answered"))["key"]
        # a range from before the stop was raised is replaced by the next export
        return [each for each in map(SongIdRange.from_key, keys) if each in self.files.tiling]

    @property
    def states(self) -> Counter[str]:
        """Number of ranges by state, each counted once.

        `unreadable`: in the cache; `behind`: songs lack a vector or a reason, or an export; `cached`: complete, and the
        table differs; `loaded`.
        """
        is_behind = ~pl.col("is_answered") | (pl.col("n_unexported") > 0)
        state = (
            pl.when(pl.col("error") != "").then(pl.lit("unreadable"))
            .when(is_behind).then(pl.lit("behind"))
            .when(pl.col("is_loaded")).then(pl.lit("loaded"))
            .otherwise(pl.lit("cached"))
        )  # fmt: skip
        return Counter(self.frame.select(state=state)["state"])

    @property
    def total(self) -> dict[str, int]:
        """The sum of each count."""
        return dict(self.frame.select(pl.col(pl.Int64).sum()).row(0, named=True))

    @property
    def coverage(self) -> pl.DataFrame:
        """What became of the songs of each snapshot, each song counted once: key, loaded, cached, rejected, missing."""
        # by counts: a song that is loaded counts as loaded until the next load, even if the snapshot rejects it by now
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
        return self.frame.filter(pl.col("error") != "")["error"].to_list()

    def name_rejected(self, n_songs: int) -> list[tuple[int, str]]:
        """song_id and reason of the first rejected songs."""
        named: list[tuple[int, str]] = []
        for key in self.frame.filter(pl.col("n_rejected") > 0)["key"]:
            if len(named) < n_songs:
                found = _read_rejected(self.files, SongIdRange.from_key(key))
                named += found.head(n_songs - len(named)).rows()
        return named


def read(
    files: LoadSource,
    text: str,
    server: str,
    table: VectorTable | None = None,
    counts: Mapping[SongIdRange, RangeCount] | None = None,
) -> Inventory:
    """Read the state of every range that holds anything. Changes nothing.

    Args:
        files: the cache and the snapshots.
        text: identity of how songs become texts; the cache must have been filled with the same.
        server: whose rejections count; a song that another server rejected is not answered.
        table: whose ledger and rows are read; None: neither is.
        counts: of the source; None: it is not counted.
    """
    states = {} if table is None else compare(table, files.cache, files.tiling)[0]
    rows = []
    for each in sorted({*files.snapshots.ranges(), *files.cache.ranges(), *states, *(counts or {})}):
        state = states.get(each) or RangeState(files.cache.summarize(each), None, IdSums())
        footer, done = files.snapshots.footer(each), state.cached.complete
        n_songs = footer.n_songs if footer.digest else None
        n_source = None if counts is None else counts.get(each, RangeCount()).n_songs
        n_unexported = max(0, (n_source or 0) - (n_songs or 0))
        is_answered = bool(done and done.fits(footer.digest, text, server))
        n_loaded = state.loaded.n_songs if state.loaded else 0
        differing: tuple[int | None, ...]
        if table is None:
            differing = None, None, None
        elif done and is_answered and state.is_loaded:
            differing = done.n_rejected, n_unexported, 0
        else:
            n_rejected, n_missing, n_orphans = _count_differing(files, table, each)
            differing = n_rejected, n_missing + n_unexported, n_orphans
        held = n_source, n_songs, n_unexported, state.cached.n_vectors, n_loaded, state.in_table.n_rows
        rows.append((each.key, state.cached.error, is_answered, state.is_loaded, *held, *differing))
    return Inventory(files, pl.DataFrame(rows, _COLUMNS, orient="row"))


def _count_differing(files: LoadSource, table: VectorTable, song_range: SongIdRange) -> tuple[int, int, int]:
    """Numbers of rejected, missing and orphaned songs, compared by song_id."""
    songs = files.snapshots.read(song_range, ["song_id"])["song_id"]
    rejected = _read_rejected(files, song_range)
    loaded = table.ledger.read_song_ids(song_range)
    answered = pl.concat([rejected["song_id"], loaded])
    return rejected.height, count_missing(songs, answered), count_missing(loaded, songs)


def _read_rejected(files: LoadSource, song_range: SongIdRange) -> pl.DataFrame:
    """Songs of a range that the export or the provider rejected: columns song_id and reason."""
    try:
        manifest = files.cache.read_manifest(song_range)
    except StoreError:  # the range counts as not cached, see `errors`
        manifest = Manifest()
    refused = [(each.song_id, each.reason) for each in manifest.rejected]
    provider = pl.DataFrame(refused, {"song_id": pl.Int32, "reason": pl.String}, orient="row")
    return pl.concat([files.snapshots.read_rejected(song_range), provider])
