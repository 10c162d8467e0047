"""What a snapshot is: one Parquet file a range, its rows in the order of their song_ids, their identity in its footer.

Columns: song_id (int32), name, artist, lyrics and set_aside (strings); set_aside is null, or says why the song cannot
be embedded. Where songs come from is not known here.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from songvec_assets.errors import StoreError
from songvec_assets.files import replace_atomically
from songvec_assets.songs.ranges import SongIdRange, Tiling

SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field("song_id", pa.int32(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("artist", pa.string()),
        pa.field("lyrics", pa.string()),
        pa.field("set_aside", pa.string()),
    ]
)
# the newest time is under its second name: under the first one it may be in the future
_DIGEST, _SOURCE, _NEWEST = b"songvec.digest2", b"songvec.source", b"songvec.updated_at2"
_COMPARED_ROWS = 1024
_comparing = threading.Lock()
SIZE_CLASS_BYTES = 128
"""Songs are counted by their texts' sizes in classes of so many bytes."""


@dataclass(frozen=True)
class Footer:
    """What a snapshot says of its rows.

    Attributes:
        digest: their identity.
        source: the identity of the table and columns they came from.
        newest: the latest updated_at of all rows that was no future at the time, as text; None without such a column.
    """

    digest: str
    source: str
    newest: str | None = None


class Changes(NamedTuple):
    """Songs of a range against its snapshot before."""

    n_new: int
    n_changed: int
    n_gone: int


def snapshot_path(folder: Path, song_range: SongIdRange) -> Path:
    """Where a range's snapshot is."""
    return folder / f"{song_range.key}.parquet"


def snapshot_ranges(folder: Path) -> list[SongIdRange]:
    """The ranges that have a snapshot, in order."""
    return ranges_of(folder.glob("*.parquet"))


def ranges_of(paths: Iterable[Path]) -> list[SongIdRange]:
    """The ranges that files are named after, in order.

    Raises:
        StoreError: one is named otherwise.
    """
    try:
        return sorted(SongIdRange.from_key(path.stem) for path in paths)
    except ValueError as error:
        raise StoreError(f"a file that is not ours lies in the storage folder: {error}; move it away") from error


def remove_foreign_cuts(folder: Path, tiling: Tiling) -> None:
    """Remove snapshots of ranges that the present tiling does not have: the tail before its stop was raised."""
    for song_range in snapshot_ranges(folder):
        if tiling.range_of(song_range.start) != song_range:
            snapshot_path(folder, song_range).unlink()


def load_songs_from_parquet(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """One range's snapshot; see the module for its columns. No file is a range without songs.

    Raises:
        StoreError: the file is damaged: what it holds is not what was exported.
    """
    if not path.exists():
        empty = pl.DataFrame(pa.Table.from_batches([], SNAPSHOT_SCHEMA))
        return empty.select(columns) if columns else empty
    try:
        with _open(path) as file:
            return pl.DataFrame(file.read(columns))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{path} is damaged ({error}): remove it and materialize songs_parquet, which exports the range anew"
    )


def _open(path: Path) -> pq.ParquetFile:
    """A snapshot whose pages are held against their checksums as they are read."""
    return pq.ParquetFile(path, page_checksum_verification=True)


def read_footer(path: Path) -> Footer | None:
    """The footer of a snapshot; None where there is no file, or none that can be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    digest, source, newest = (metadata.get(key, b"").decode() for key in (_DIGEST, _SOURCE, _NEWEST))
    return Footer(digest, source, newest or None)


def snapshot_digest(path: Path) -> str | None:
    """The identity of a snapshot's rows, from its footer; None where it has none."""
    footer = read_footer(path)
    return footer.digest or None if footer else None


def count_songs(folder: Path, song_range: SongIdRange) -> int:
    """Songs of a snapshot, from its footer; 0 where there is none that can be read: reading it says what is wrong."""
    try:
        return int(pq.read_metadata(snapshot_path(folder, song_range)).num_rows)
    except (FileNotFoundError, pa.ArrowInvalid):
        return 0


def read_snapshot_ids(folder: Path, song_range: SongIdRange) -> tuple[pl.Series, pl.Series] | None:
    """The song_ids of a snapshot, and those that can be embedded, in order; None without one that can be read."""
    path = snapshot_path(folder, song_range)
    try:
        songs = load_songs_from_parquet(path, ["song_id", "set_aside"]) if path.exists() else None
    except StoreError:  # the export replaces it
        songs = None
    return None if songs is None else (songs["song_id"], songs.filter(pl.col("set_aside").is_null())["song_id"])


def digest_snapshots(folder: Path) -> str:
    """An identity of all snapshots, from their footers."""
    state = xxhash.xxh3_128()
    for song_range in snapshot_ranges(folder):
        state.update(f"{song_range.key} {snapshot_digest(snapshot_path(folder, song_range))}\n".encode())
    return state.hexdigest()


def get_max_cached_song_id(folder: Path) -> int | None:
    """The highest song_id of all snapshots, or None where there are none."""
    for song_range in reversed(snapshot_ranges(folder)):
        path = snapshot_path(folder, song_range)
        try:
            statistics = pq.read_metadata(path)
        except pa.ArrowException as error:
            raise _damaged(path, error) from error
        highest = [
            statistics.row_group(group).column(0).statistics.max
            for group in range(statistics.num_row_groups)
            if statistics.row_group(group).num_rows
        ]
        if highest:
            return int(max(highest))
    return None


def write_snapshot(path: Path, songs: pa.Table, footer: Footer) -> None:
    """Write a range's songs, whole and durable or not at all."""
    metadata = {_DIGEST: footer.digest, _SOURCE: footer.source} | ({_NEWEST: footer.newest} if footer.newest else {})
    with replace_atomically(path) as file:
        pq.write_table(
            songs.replace_schema_metadata(metadata),
            file,
            compression="zstd",
            compression_level=1,
            # names and lyrics hardly repeat: looking for it costs a twentieth of the time
            use_dictionary=["artist", "set_aside"],
            write_statistics=["song_id"],
            write_page_checksum=True,
        )


def merge_songs(path: Path, newer: pa.Table) -> pa.Table:
    """The snapshot on disk with newer rows in place of those of the same song_id.

    Raises:
        pa.ArrowException, OSError: it is damaged.
    """
    with _open(path) as file:
        both = pa.concat_tables([file.read().replace_schema_metadata(), newer])
    song_ids = both["song_id"].to_numpy()
    order = np.argsort(song_ids, kind="stable")
    return both.take(order[np.append(np.diff(song_ids[order]) != 0, True)] if len(order) else order)


def compare_snapshot(path: Path, songs: pa.Table) -> Changes:
    """Count what is new, changed and gone in a range against its snapshot on disk, a few rows at a time.

    A snapshot that is damaged is none: it is about to be replaced. One at a time, whoever calls: the old songs are read
    beside the new ones, and what reading took goes back.
    """
    song_ids = songs["song_id"].to_numpy()
    n_before = n_both = n_changed = 0
    try:
        with _comparing, _open(path) as file:
            # a thread a column gains nothing here, and takes 30 MB
            for batch in file.iter_batches(_COMPARED_ROWS, use_threads=False):
                ends = batch.column("song_id")[0].as_py(), batch.column("song_id")[-1].as_py() + 1
                start, stop = np.searchsorted(song_ids, ends)
                both = _join(pl.DataFrame(batch), pl.DataFrame(songs.slice(start, stop - start)))
                n_before, n_both, n_changed = n_before + batch.num_rows, n_both + len(both), n_changed + int(both.sum())
    except FileNotFoundError:
        pass
    except (pa.ArrowInvalid, OSError):
        n_before = n_both = n_changed = 0
    pa.default_memory_pool().release_unused()
    return Changes(songs.num_rows - n_both, n_changed, n_before - n_both)


def _join(before: pl.DataFrame, after: pl.DataFrame) -> pl.Series:
    """Whether each song of both differs."""
    both = after.join(before, on="song_id", how="inner", suffix="_before")
    columns = [column for column in after.columns if column != "song_id"]
    return both.select(
        differs=pl.any_horizontal(pl.col(column).ne_missing(pl.col(f"{column}_before")) for column in columns)
    ).to_series()


def count_text_sizes(songs: pa.Table) -> Counter[int]:
    """How many songs have a name, artist and lyrics of so many times SIZE_CLASS_BYTES, in UTF-8, rounded down."""
    sizes = sum(pc.fill_null(pc.binary_length(songs[name]), 0).to_numpy() for name in ("name", "artist", "lyrics"))
    classes, counts = np.unique(sizes // SIZE_CLASS_BYTES, return_counts=True)
    return Counter(dict(zip(classes.tolist(), counts.tolist(), strict=True)))


def digest_songs(songs: pa.Table) -> str:
    """An identity of the rows: the same rows give the same digest, whatever their chunks. Copies no text.

    Args:
        songs: of SNAPSHOT_SCHEMA; no bytes under its nulls.
    """
    state = xxhash.xxh3_128()
    for column in songs.columns:
        for chunk in column.chunks:
            state.update(np.asarray(chunk.is_null()).data)
        if pa.types.is_string(column.type):
            ends = np.cumsum(pc.fill_null(pc.binary_length(column), 0).to_numpy(), dtype=np.int64)
            state.update(np.append([0], ends).astype(np.int32).data)
        for chunk in column.chunks:
            state.update(_values(chunk))
    return state.hexdigest()


def _values(chunk: pa.Array) -> memoryview:
    """The bytes of a chunk's values, without a copy."""
    _, *buffers = chunk.buffers()
    start, stop = chunk.offset, chunk.offset + len(chunk)
    if pa.types.is_string(chunk.type):
        if not len(chunk) or buffers[1] is None:
            return memoryview(b"")
        offsets = np.frombuffer(buffers[0], np.int32)
        start, stop, width = offsets[start], offsets[stop], 1
    else:
        width = chunk.type.byte_width
    return memoryview(buffers[-1])[start * width : stop * width]
