"""Snapshots: one Parquet file per range, its rows in the order of song_id, a digest of its content in the footer.

Content: song_id (int32), name, artist, lyrics and rejected (strings); rejected is null, or the reason why the song has
no embedding. Hashes: source_hash (int64) is the server's hash of name, artist and lyrics; text_hash (16 bytes) and
truncated (Boolean) are of the text to embed, null for rejected songs. The digest covers the content alone. A snapshot
of an earlier version, which has other columns, is exported again.
When to add here: something else to keep of a song. Keep out: reading the source.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.text import TEXT_HASH_BYTES, TextSpec, render_texts
from songvec_assets.storage import Storage

SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field("song_id", pa.int32(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("name", "artist", "lyrics", "rejected")),
    ]
)
_TEXT_HASHES = [pa.field("text_hash", pa.binary(TEXT_HASH_BYTES)), pa.field("truncated", pa.bool_())]
FILE_SCHEMA = pa.schema([*SNAPSHOT_SCHEMA, pa.field("source_hash", pa.int64()), *_TEXT_HASHES])
_DIGEST, _TEXT, _COUNTS = b"songvec.digest2", b"songvec.text2", b"songvec.counts"
_SUFFIX = ".parquet"
_BATCH_ROWS = 4096
SIZE_CLASS_BYTES = 128
"""Width of the classes in which songs are counted by the size of their texts."""


@dataclass(frozen=True)
class Footer:
    """The metadata in a snapshot's footer.

    Attributes:
        digest: identity of the content; empty if there is no snapshot.
        text: identity of the settings by which texts were hashed and songs rejected; empty in earlier versions.
        n_songs: rows.
        rejected: number of rejected songs by reason.
        text_sizes: number of songs by size, see `count_text_sizes`.
    """

    digest: str = ""
    text: str = ""
    n_songs: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    text_sizes: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, songs: pa.Table, text: str) -> "Footer":
        """The footer of these songs."""
        reasons = Counter[str](songs["rejected"].drop_null().to_pylist())
        return cls(digest_songs(songs), text, songs.num_rows, reasons, count_text_sizes(songs))


class Changes(NamedTuple):
    """Numbers of songs that a range gained, changed and lost."""

    n_new: int = 0
    n_changed: int = 0
    n_deleted: int = 0


NO_CHANGES = Changes()


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of a store, each an object `<key of its range>.parquet`.

    Attributes:
        storage: of the snapshots; a range without a snapshot is a range without songs.
    """

    storage: Storage

    def __contains__(self, song_range: SongIdRange) -> bool:
        return _key(song_range) in self.storage

    def ranges(self) -> list[SongIdRange]:
        """The ranges that have a snapshot, in order.

        Raises:
            StoreError: a file has another name.
        """
        names = [Path(name) for name in self.storage.list_objects()]
        try:
            return sorted(SongIdRange.from_key(name.stem) for name in names if name.suffix == _SUFFIX)
        except ValueError as error:
            raise StoreError(
                f"a file that is not ours lies in the storage folder: {error}; move it away", "store.foreign-file"
            ) from error

    def read(
        self,
        song_range: SongIdRange,
        columns: list[str] | None = None,
        song_ids: Sequence[int] | pl.Series | None = None,
    ) -> pl.DataFrame:
        """The songs of a range; see the module for the columns.

        Args:
            song_range: which.
            columns: to read, including song_id; None: those of the content.
            song_ids: only these songs, in the order of the file; None: all.

        Raises:
            StoreError: the file is damaged.
        """
        columns = columns or SNAPSHOT_SCHEMA.names
        empty = FILE_SCHEMA.empty_table().select(columns)
        if song_range not in self:
            return pl.DataFrame(empty)
        try:
            file = self._open(song_range)
            if not {*columns} <= {*file.schema_arrow.names}:
                raise StoreError(
                    f"{self.storage.describe(_key(song_range))} was written by an earlier version: materialize "
                    "songs_parquet, which exports the range again"
                )
            if song_ids is None:
                return pl.DataFrame(file.read(columns))
            wanted = pl.Series(song_ids, dtype=pl.Int32).to_arrow()
            batches = file.iter_batches(_BATCH_ROWS, columns=columns) if len(wanted) else ()
            found = [batch.filter(pc.is_in(batch["song_id"], wanted)) for batch in batches]
            return pl.DataFrame(pa.Table.from_batches(found, empty.schema))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(song_range, error) from error

    def _open(self, song_range: SongIdRange) -> pq.ParquetFile:
        """Open a snapshot; pages are checked against their checksums when they are read."""
        return pq.ParquetFile(pa.BufferReader(self.storage.open(_key(song_range))), page_checksum_verification=True)

    def _damaged(self, song_range: SongIdRange, why: Exception | str) -> StoreError:
        return StoreError(
            f"{self.storage.describe(_key(song_range))} is damaged ({why}): remove it and materialize songs_parquet, "
            "which exports the range again",
            "store.damaged",
        )

    def try_to_read(self, song_range: SongIdRange, columns: list[str]) -> pl.DataFrame | None:
        """As `read`, for the export, which replaces damaged snapshots; None if there is no readable snapshot."""
        try:
            return self.read(song_range, columns) if song_range in self else None
        except StoreError:
            return None

    def read_rejected(self, song_range: SongIdRange) -> pl.DataFrame:
        """The rejected songs of a range: columns song_id and reason."""
        songs = self.read(song_range, ["song_id", "rejected"])
        return songs.rename({"rejected": "reason"}).drop_nulls("reason")

    def read_embeddable(self, song_range: SongIdRange) -> pl.Series:
        """The song_ids of a range that are not rejected, in order."""
        return self.read(song_range, ["song_id", "rejected"]).filter(pl.col("rejected").is_null())["song_id"]

    def read_text_hashes(self, song_range: SongIdRange, spec: TextSpec) -> pl.DataFrame:
        """The hash of the text of each song that is not rejected.

        Args:
            song_range: which.
            spec: how songs become texts; if it differs from that of the snapshot, all texts are rendered.

        Returns:
            Columns song_id (Int32), text_hash (Binary, 16 bytes) and truncated (Boolean), in the order of song_id.

        Raises:
            StoreError: the file is damaged, or of an earlier version.
        """
        if self.footer(song_range).text != spec.identity:
            return self.render(song_range, spec, self.read_embeddable(song_range)).drop("text")
        return self.read(song_range, ["song_id", "text_hash", "truncated"]).drop_nulls("text_hash")

    def render(self, song_range: SongIdRange, spec: TextSpec, song_ids: pl.Series) -> pl.DataFrame:
        """The texts of some songs, rendered, see `render_texts`.

        Args:
            song_range: which.
            spec: how songs become texts.
            song_ids: of songs that are not rejected.

        Raises:
            StoreError: the file is damaged, or a text does not have the hash that the snapshot keeps.
        """
        texts = render_texts(self.read(song_range, song_ids=song_ids), spec)
        if texts.height and self.footer(song_range).text == spec.identity:
            hashes = self.read(song_range, ["song_id", "text_hash"], song_ids)
            if texts.join(hashes, on=["song_id", "text_hash"], how="anti").height:
                raise self._damaged(song_range, "texts do not have the hashes that the file keeps")
        return texts

    def footer(self, song_range: SongIdRange) -> Footer:
        """The footer of a snapshot; an empty one if the file cannot be read: reading the songs then gives the error."""
        try:
            file = pq.read_metadata(pa.BufferReader(self.storage.open(_key(song_range))))
        except (FileNotFoundError, pa.ArrowInvalid):
            return Footer()
        digest, text, counts = ((file.metadata or {}).get(key, b"").decode() for key in (_DIGEST, _TEXT, _COUNTS))
        reasons, sizes = json.loads(counts) if counts else ({}, [])
        return Footer(digest, text, file.num_rows, Counter(reasons), Counter(dict(sizes)))

    def digest_all(self) -> str:
        """An identity of all snapshots, from their footers."""
        state = xxhash.xxh3_128()
        for song_range in self.ranges():
            state.update(f"{song_range.key} {self.footer(song_range).digest}\n".encode())
        return state.hexdigest()

    def find_max_song_id(self) -> int | None:
        """The highest song_id of all snapshots, or None if there are none."""
        for song_range in reversed(self.ranges()):
            song_ids = self.read(song_range, ["song_id"])["song_id"]
            if len(song_ids):
                return int(song_ids[-1])
        return None

    def write(self, song_range: SongIdRange, songs: pa.Table, footer: Footer) -> None:
        """Write a range's songs durably, or nothing.

        Args:
            song_range: which.
            songs: of FILE_SCHEMA.
            footer: of these songs.
        """
        counts = json.dumps([footer.rejected, sorted(footer.text_sizes.items())])
        with self.storage.write(_key(song_range)) as file:
            pq.write_table(
                songs.replace_schema_metadata({_DIGEST: footer.digest, _TEXT: footer.text, _COUNTS: counts}),
                file,
                compression="zstd",
                compression_level=1,
                # names and lyrics rarely repeat: a dictionary for them would cost a twentieth of the time
                use_dictionary=["artist", "rejected"],
                write_statistics=False,
                write_page_checksum=True,
            )

    def delete(self, song_range: SongIdRange) -> None:
        """Delete a range's snapshot."""
        self.storage.delete(_key(song_range))

    def delete_other_ranges(self, tiling: Tiling) -> None:
        """Delete snapshots of ranges that the tiling does not have: an earlier tail, after the stop was raised."""
        for song_range in self.ranges():
            if tiling.range_of(song_range.start) != song_range:
                self.delete(song_range)

    def merge(self, song_range: SongIdRange, newer: pa.Table, song_ids: pl.Series) -> pa.Table:
        """The stored songs, with newer rows replacing those of the same song_id.

        Args:
            song_range: which.
            newer: of FILE_SCHEMA.
            song_ids: that the range has now; other rows are dropped.

        Returns:
            Of FILE_SCHEMA, in the order of song_id.

        Raises:
            pa.ArrowException, OSError: the snapshot is damaged.
        """
        newer = newer.filter(pc.is_in(newer["song_id"], song_ids.to_arrow()))
        newer_ids, pieces, start = newer["song_id"].to_numpy(), [], 0
        kept = song_ids.filter(~song_ids.is_in(newer_ids)).to_arrow()
        # in batches, so that the range is in memory only once. Threads gain nothing here, and take 30 MB
        for batch in self._open(song_range).iter_batches(_BATCH_ROWS, use_threads=False):
            stop = int(np.searchsorted(newer_ids, batch["song_id"][-1].as_py(), side="right"))
            before = pa.Table.from_batches([batch.filter(pc.is_in(batch["song_id"], kept))]).cast(FILE_SCHEMA)
            both = pa.concat_tables([before, newer.slice(start, stop - start)])
            pieces.append(both.sort_by("song_id") if start < stop else both)
            start = stop
        return pa.concat_tables([*pieces, newer.slice(start)])


def _key(song_range: SongIdRange) -> str:
    return f"{song_range.key}{_SUFFIX}"


def load_songs_from_parquet(
    path: Path, columns: list[str] | None = None, song_ids: Sequence[int] | pl.Series | None = None
) -> pl.DataFrame:
    """Read one range's snapshot by its path; see `Snapshots.read`."""
    return Snapshots(Storage(path.parent)).read(SongIdRange.from_key(path.stem), columns, song_ids)


def get_max_cached_song_id(folder: Path) -> int | None:
    """The highest song_id of all snapshots of a folder, or None if there are none."""
    return Snapshots(Storage(folder)).find_max_song_id()


def add_text_hashes(songs: pa.Table, spec: TextSpec) -> pa.Table:
    """Add the hashes of the texts; in batches, since rendered texts take several times the memory of songs."""
    columns = pl.DataFrame(songs.select(SNAPSHOT_SCHEMA.names))
    accepted = columns.filter(pl.col("rejected").is_null())
    pieces = [accepted[:0], *accepted.iter_slices(_BATCH_ROWS)]
    rendered = pl.concat([render_texts(piece, spec).drop("text") for piece in pieces])
    joined = columns.select("song_id").join(rendered, on="song_id", how="left", maintain_order="left")
    # from lists: the arrays of polars have other types
    hashes = [pa.array(joined[each.name].to_list(), each.type) for each in _TEXT_HASHES]
    return pa.table([*songs.select(FILE_SCHEMA.names[: -len(hashes)]).columns, *hashes], schema=FILE_SCHEMA)


def count_changes(before: pl.DataFrame | None, after: pl.DataFrame) -> Changes:
    """Count songs that are new, changed and deleted.

    Args:
        before: columns song_id and source_hash; None: there was no snapshot.
        after: the same columns.
    """
    if before is None:
        return Changes(n_new=after.height)
    both = after.join(before, on="song_id", how="inner", suffix="_before")
    n_changed = int((both["source_hash"] != both["source_hash_before"]).sum())
    return Changes(after.height - both.height, n_changed, before.height - both.height)


def count_text_sizes(songs: pa.Table) -> Counter[int]:
    """Number of songs by the size of name, artist and lyrics in UTF-8, in units of SIZE_CLASS_BYTES, rounded down."""
    sizes = sum(pc.fill_null(pc.binary_length(songs[name]), 0).to_numpy() for name in ("name", "artist", "lyrics"))
    classes, counts = np.unique(sizes // SIZE_CLASS_BYTES, return_counts=True)
    return Counter(dict(zip(classes.tolist(), counts.tolist(), strict=True)))


def digest_songs(songs: pa.Table) -> str:
    """A digest of the content; it does not depend on how the table is chunked. Copies no text.

    Args:
        songs: with the columns of SNAPSHOT_SCHEMA, and no bytes under nulls.
    """
    state = xxhash.xxh3_128()
    for column in songs.select(SNAPSHOT_SCHEMA.names).columns:
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
