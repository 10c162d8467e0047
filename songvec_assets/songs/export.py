"""Postgres to Parquet: one snapshot file a range, rewritten only where its content changed.

A snapshot has the columns song_id (int32), name, artist, lyrics and set_aside (strings); set_aside is null, or says why
the song cannot be embedded. Memory is bounded by one range.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from songvec_assets.errors import DatabaseError, SourceError
from songvec_assets.files import replace_atomically
from songvec_assets.postgres.engine import Database, describe_database_error
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.source import RangeCount, SongsSource, count_ranges, count_unreachable_ids

ExportMode = Literal["all", "append"]

SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field("song_id", pa.int32(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("artist", pa.string()),
        pa.field("lyrics", pa.string()),
        pa.field("set_aside", pa.string()),
    ]
)
_DIGEST, _SOURCE, _WATERMARK = b"songvec.digest", b"songvec.source", b"songvec.updated_at"
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class RangeExport:
    """What happened to one range's snapshot: counts of songs against the snapshot before."""

    range: SongIdRange
    n_songs: int
    n_new: int = 0
    n_changed: int = 0
    n_gone: int = 0
    n_set_aside: int = 0
    written: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        ranges: every range that holds songs now or did before.
        set_aside: reason to number of songs, of those with an id that a range can hold.
        unreachable: the same of those with an id that none can hold.
    """

    ranges: list[RangeExport] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)
    unreachable: Counter[str] = field(default_factory=Counter)

    def total(self, name: str) -> int:
        """The sum of a count over all ranges."""
        return sum(getattr(each, name) for each in self.ranges)


def snapshot_path(folder: Path, song_range: SongIdRange) -> Path:
    """Where a range's snapshot is."""
    return folder / f"{song_range.key}.parquet"


def snapshot_ranges(folder: Path) -> list[SongIdRange]:
    """The ranges that have a snapshot, in order."""
    return sorted(SongIdRange.from_key(path.stem) for path in folder.glob("*.parquet"))


def load_songs_from_parquet(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """One range's snapshot; see the module for its columns. No file is a range without songs."""
    if not path.exists():
        empty = pl.DataFrame(pa.Table.from_batches([], SNAPSHOT_SCHEMA))
        return empty.select(columns) if columns else empty
    return pl.read_parquet(path, columns=columns)


def snapshot_digest(path: Path) -> str | None:
    """The identity of a snapshot's rows, from its footer; None where there is no file."""
    if not path.exists():
        return None
    return str((pq.read_schema(path).metadata or {}).get(_DIGEST, b"").decode()) or None


def count_songs(folder: Path, song_range: SongIdRange) -> int:
    """Songs of a snapshot, from its footer; 0 where there is none that can be read: reading it says what is wrong."""
    try:
        return int(pq.read_metadata(snapshot_path(folder, song_range)).num_rows)
    except (FileNotFoundError, pa.ArrowInvalid):
        return 0


def get_max_cached_song_id(folder: Path) -> int | None:
    """The highest song_id of all snapshots, or None where there are none."""
    for song_range in reversed(snapshot_ranges(folder)):
        statistics = pq.read_metadata(snapshot_path(folder, song_range))
        highest = [
            statistics.row_group(group).column(0).statistics.max
            for group in range(statistics.num_row_groups)
            if statistics.row_group(group).num_rows
        ]
        if highest:
            return int(max(highest))
    return None


def cache_songs_to_parquet(
    database: Database,
    source: SongsSource,
    folder: Path,
    tiling: Tiling,
    mode: ExportMode = "all",
    also: Iterable[SongIdRange] = (),
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> ExportReport:
    """Bring the snapshots to the state of the source table.

    Args:
        database: where the songs are.
        source: which table and columns.
        folder: of the snapshot files.
        tiling: how song_ids are cut into ranges.
        mode: `all` compares every range; `append` reads only above the highest song_id already there.
        also: ranges that get a snapshot even where they hold no song: an empty one says that their songs are gone.
        progress: told the songs read so far.
        stop: ends the export between two ranges; those done stay.

    Raises:
        SourceError, DatabaseError: a range could not be read; those before it are done.
        SettingsError: the open tail holds more songs than a range may.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_foreign_cuts(folder, tiling)
    counts = count_ranges(database, source, tiling)
    tiling.check_tail(tiling.tail, counts[tiling.tail].n_songs if tiling.tail in counts else 0)
    above = get_max_cached_song_id(folder) if mode == "append" else None
    report, kept = ExportReport(), set(also)
    if mode == "all":
        report.unreachable.update(count_unreachable_ids(database, source))
    wanted = sorted({*counts, *(() if mode == "append" else (*snapshot_ranges(folder), *kept))})
    wanted = [each for each in wanted if above is None or each.stop > above + 1]
    total, done = sum(counts[each].n_songs for each in wanted if each in counts), 0
    with _connect(database) as connection:
        for song_range in wanted:
            if stop:
                stop.check()
            count = counts.get(song_range, RangeCount(0))
            if not count.n_songs and song_range not in kept:
                exported = _remove_snapshot(folder, song_range)
            else:
                exported = _export_range(connection, source, folder, song_range, count, above)
            report.ranges.append(exported)
            report.set_aside.update(_count_set_aside(folder, song_range) if exported.n_set_aside else {})
            done += exported.n_songs
            progress(Progress("export songs", done, total))
    return report


def read_songs_from_postgres(
    connection: adbc.Connection,
    source: SongsSource,
    song_range: SongIdRange,
    above: int | None = None,
    updated_since: str | None = None,
) -> pa.Table:
    """Read a range's songs as Arrow, ordered by song_id.

    Args:
        connection: of ADBC.
        source: which table and columns.
        song_range: song_ids to read.
        above: only song_ids above this one.
        updated_since: only rows whose updated_at column is not before this time, or null.

    Returns:
        Columns song_id (int64), name, artist, lyrics.
    """
    lowest = song_range.start if above is None else max(song_range.start, above + 1)
    with connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
        cursor.execute(source.select_statement(lowest, song_range.stop, updated_since))
        return cursor.fetch_arrow_table()


def _export_range(
    connection: adbc.Connection,
    source: SongsSource,
    folder: Path,
    song_range: SongIdRange,
    count: RangeCount,
    above: int | None,
) -> RangeExport:
    path = snapshot_path(folder, song_range)
    metadata = (pq.read_schema(path).metadata or {}) if path.exists() else {}
    same_source = metadata.get(_SOURCE) == source.identity.encode()
    watermark = metadata.get(_WATERMARK, b"").decode() or None
    songs, newest = None, count.newest
    if above is not None and path.exists():
        songs = _merge(path, _to_snapshot(read_songs_from_postgres(connection, source, song_range, above), source))
        newest = watermark  # of the songs below nothing was read
    elif watermark and same_source:
        newer = read_songs_from_postgres(connection, source, song_range, updated_since=watermark)
        songs = _merge(path, _to_snapshot(newer, source))
        if songs.num_rows != count.n_songs:  # songs went, or a transaction came late: look at all of them
            songs = None
    if songs is None:
        songs = _to_snapshot(read_songs_from_postgres(connection, source, song_range), source)
    footer = {_DIGEST: _digest(songs), _SOURCE: source.identity.encode()}
    return _write_snapshot(
        path, song_range, songs, metadata, footer | ({_WATERMARK: newest.encode()} if newest else {})
    )


def _remove_snapshot(folder: Path, song_range: SongIdRange) -> RangeExport:
    path = snapshot_path(folder, song_range)
    n_gone = load_songs_from_parquet(path, ["song_id"]).height
    path.unlink(missing_ok=True)
    return RangeExport(song_range, 0, n_gone=n_gone, written=True)


def _to_snapshot(table: pa.Table, source: SongsSource) -> pa.Table:
    """Check a range's rows and name what cannot be embedded."""
    songs = pl.DataFrame(table)
    if songs["song_id"].n_unique() != songs.height:
        twice = songs["song_id"].filter(songs["song_id"].is_duplicated())[0]
        raise SourceError(
            f"column {source.song_id_column!r} of {source.table} must be unique, {twice} is there more than once: name "
            "another with SONGVEC_SONG_ID_COLUMN"
        )
    blank = {column: pl.col(column).fill_null("").str.strip_chars() == "" for column in ("name", "artist")}
    songs = songs.with_columns(
        pl.col("song_id").cast(pl.Int32),
        set_aside=pl.when(blank["name"])
        .then(pl.lit("the song has no name"))
        .when(blank["artist"])
        .then(pl.lit("the song has no artist"))
        .otherwise(pl.lit(None, dtype=pl.String)),
    )
    return songs.to_arrow().cast(SNAPSHOT_SCHEMA)


def _merge(path: Path, newer: pa.Table) -> pa.Table:
    """The snapshot on disk with newer rows in place of those of the same song_id."""
    before, after = load_songs_from_parquet(path), pl.DataFrame(newer)
    kept = before.join(after, on="song_id", how="anti")
    return pl.concat([kept, after]).sort("song_id").to_arrow().cast(SNAPSHOT_SCHEMA)


def _write_snapshot(
    path: Path, song_range: SongIdRange, songs: pa.Table, before: dict[bytes, bytes], footer: dict[bytes, bytes]
) -> RangeExport:
    n_set_aside = songs.num_rows - songs["set_aside"].null_count
    unchanged = footer[_DIGEST] == before.get(_DIGEST)
    if unchanged and (_WATERMARK not in footer or (_WATERMARK in before and footer[_SOURCE] == before.get(_SOURCE))):
        return RangeExport(song_range, songs.num_rows, n_set_aside=n_set_aside)
    changes = compare_snapshots(load_songs_from_parquet(path), pl.DataFrame(songs))
    with replace_atomically(path) as file:
        pq.write_table(songs.replace_schema_metadata(footer), file, compression="zstd", compression_level=1)
    return RangeExport(song_range, songs.num_rows, **changes, n_set_aside=n_set_aside, written=True)


def compare_snapshots(before: pl.DataFrame, after: pl.DataFrame) -> dict[str, int]:
    """Count what is new, changed and gone between two snapshots of a range."""
    columns = [column for column in after.columns if column != "song_id"]
    both = after.join(before, on="song_id", how="inner", suffix="_before")
    differs = pl.any_horizontal(pl.col(column).ne_missing(pl.col(f"{column}_before")) for column in columns)
    return {
        "n_new": after.height - both.height,
        "n_changed": both.filter(differs).height,
        "n_gone": before.height - both.height,
    }


def _digest(songs: pa.Table) -> bytes:
    """An identity of the rows: the same rows give the same digest, whatever their chunks."""
    state = xxhash.xxh3_128()
    for column in songs.combine_chunks().columns:
        array = column.combine_chunks()
        state.update(np.asarray(array.is_null()).tobytes())
        for buffer in array.buffers()[1:]:
            state.update(b"" if buffer is None else buffer)
    return state.hexdigest().encode()


def _count_set_aside(folder: Path, song_range: SongIdRange) -> dict[str, int]:
    reasons = load_songs_from_parquet(snapshot_path(folder, song_range), ["set_aside"])["set_aside"].drop_nulls()
    return dict(reasons.value_counts().rows())


def _remove_foreign_cuts(folder: Path, tiling: Tiling) -> None:
    """Remove snapshots of ranges that the present tiling does not have: the tail before its stop was raised."""
    tiles = set(tiling)
    for song_range in snapshot_ranges(folder):
        if song_range not in tiles:
            snapshot_path(folder, song_range).unlink()


@contextlib.contextmanager
def _connect(database: Database) -> Iterator[adbc.Connection]:
    try:
        with adbc.connect(database.adbc_uri) as connection:
            yield connection
    except adbc.Error as error:
        raise DatabaseError(describe_database_error(error)) from error
