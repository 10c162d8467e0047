"""One Arrow IPC file a range and model: every vector that was paid for, appended and synced before it counts.

A shard is an append-only log of rows (song_id, text_hash, checksum, reason, embedding); a song's last row is the one
that holds. A row has an embedding, or a reason (the song is set aside), or neither (a tombstone: the song was deleted,
at the time in its text_hash). Whole record batches survive a crash at any byte: what follows the last whole one was
never acknowledged, and is cut off by the next writer. A checksum over each row finds what a disk changed.

Embeddings are float32, (n, dimensions). `format` has the bytes, `upkeep` compacts.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from songvec_assets.cache.format import (
    ShardIdentity,
    build_batch,
    find_message,
    find_sound_rows,
    read_batch,
    text_hashes_of,
)
from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.errors import StoreError
from songvec_assets.files import sync_folder
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import ranges_of
from songvec_assets.songs.text import TEXT_HASH_BYTES

DAMAGED = b"\xff" * TEXT_HASH_BYTES
"""Stands for the text_hash of a song whose row was found damaged: it is missing, not gone."""
_GONE_PREFIX = bytes(TEXT_HASH_BYTES - 8)
"""Stands in the text_hash of a song that was deleted, before the time (seconds since 1970, uint64, little endian)."""
_GONE = bytes(TEXT_HASH_BYTES)
"""The same as it was written before times were: the time is the file's."""
PIECE_ROWS = 2048
"""Rows read or written at a time where a shard is gone through."""


@dataclass(frozen=True)
class ShardRows:
    """Rows as they are read back.

    Attributes:
        song_ids: int32, (n,).
        text_hashes: (n,).
        checksums: uint64, (n,).
        embeddings: float32, (n, dimensions).
    """

    song_ids: NDArray[np.int32]
    text_hashes: NDArray[np.void]
    checksums: NDArray[np.uint64]
    embeddings: Float32Matrix

    def find_sound(self) -> NDArray[np.bool_]:
        """Which rows have a good vector, and a checksum that fits; (n,)."""
        return find_sound_rows(self.song_ids, self.text_hashes, self.checksums, self.embeddings)

    def take(self, places: slice | NDArray[np.int64]) -> "ShardRows":
        """Those at some places; a slice is a view, places are copied."""
        return ShardRows(
            self.song_ids[places], self.text_hashes[places], self.checksums[places], self.embeddings[places]
        )


@dataclass(frozen=True)
class ModelCache:
    """A model's shards: one folder.

    Attributes:
        folder: where they are; it may not exist yet.
        model: its name, as in every shard.
        dimensions: values a vector.
    """

    folder: Path
    model: str
    dimensions: int

    def path_of(self, song_range: SongIdRange) -> Path:
        """Where a range's shard is."""
        return self.folder / f"{song_range.key}.arrow"

    def mark_of(self, song_range: SongIdRange) -> Path:
        """Where a complete fill of a range is marked: it saves the next one the comparison."""
        return self.folder / f"{song_range.key}.json"

    def anew_of(self, song_range: SongIdRange) -> Path:
        """Where is kept what was asked of a range: that its songs be embedded again."""
        return self.folder / f"{song_range.key}.anew"

    def ranges(self) -> list[SongIdRange]:
        """The ranges that have a shard, in order."""
        return ranges_of(self.folder.glob("*.arrow"))


class Shard:
    """A range's shard. Many may read it; one writer at a time: hold the range's lock.

    Args:
        path: the file; it may not exist yet.
        identity: what it must hold.

    Raises:
        StoreError: the file holds another model, size or range.
    """

    def __init__(self, path: Path, identity: ShardIdentity) -> None:
        self.path = path
        self.identity = identity
        self._batches: list[pa.RecordBatch] = []
        self.n_bytes_skipped = 0
        self._size = self._size_on_disk = 0
        self._stale = False
        self.read()

    @property
    def n_bytes(self) -> int:
        """Size of the file, as it was last read or written."""
        return self._size_on_disk

    @property
    def n_rows(self) -> int:
        """Rows ever appended."""
        return sum(batch.num_rows for batch in self.batches())

    @property
    def n_bytes_damaged(self) -> int:
        """Bytes that are no sound batch: a torn write at the end, which the next append cuts off, or damage between."""
        return self.n_bytes_skipped + self._size_on_disk - self._size

    def all_rows(self) -> pl.DataFrame:
        """Every row ever appended, in the file's order. Reads no vector.

        Returns:
            Columns song_id (Int32), text_hash (Binary), checksum (UInt64), reason (String), has_vector (Boolean) and
            row (Int64, the row's place in the file).
        """
        batches = self.batches()
        schema = pa.schema([self.identity.schema.field(index) for index in range(4)])
        narrow = pa.Table.from_batches([batch.select(schema.names) for batch in batches], schema)
        has_vector = [np.asarray(batch.column("embedding").is_valid()) for batch in batches]
        return pl.DataFrame(narrow).with_columns(
            pl.col("text_hash").cast(pl.Binary),
            has_vector=pl.Series(np.concatenate(has_vector) if batches else [], dtype=pl.Boolean),
            row=pl.int_range(pl.len()),
        )

    def live_rows(self, since: int = 0) -> pl.DataFrame:
        """Each song's last row, songs that are gone left out, ordered by song_id. Reads no vector.

        Args:
            since: place of the first row to look at.

        Returns:
            The columns of `all_rows` but has_vector: a row without a reason has one.
        """
        rows = self.all_rows().slice(since).sort("song_id", maintain_order=True)
        is_last = pl.col("song_id").ne_missing(pl.col("song_id").shift(-1))
        return rows.filter(is_last, pl.col("has_vector") | pl.col("reason").is_not_null()).drop("has_vector")

    def retained_rows(self, since_s: float) -> pl.DataFrame:
        """Of songs that were deleted at this time or later, the last row with a vector, then all their tombstones.

        A tombstone without a time gets the file's: a compaction would renew that.

        Args:
            since_s: seconds since 1970.

        Returns:
            The columns of `all_rows`; empty where no song that had a vector was deleted.
        """
        rows = self.all_rows()
        last = rows.unique("song_id", keep="last").filter(~pl.col("has_vector"), pl.col("reason").is_null())
        deleted = last.filter(pl.col("text_hash") == _GONE)
        if deleted.height:
            dated = deleted.with_columns(text_hash=pl.lit(_tombstone(self.path.stat().st_mtime)))
            last = pl.concat([last.filter(pl.col("text_hash") != _GONE), dated])
        deleted_at = [
            int.from_bytes(each[len(_GONE_PREFIX) :], "little") if each.startswith(_GONE_PREFIX) else -1
            for each in last["text_hash"]
        ]
        recent = last.filter(pl.Series(deleted_at, dtype=pl.Float64) >= since_s)
        vectors = rows.filter("has_vector").join(recent, on="song_id", how="semi").unique("song_id", keep="last")
        tombstones = recent.join(vectors, on="song_id", how="semi")
        return pl.concat([vectors.sort("song_id"), tombstones.sort("song_id")])

    def deleted_song_ids(self) -> pl.Series:
        """The songs whose last row is the tombstone of a deletion."""
        last = self.all_rows().unique("song_id", keep="last")
        return last.filter(pl.col("text_hash").bin.starts_with(_GONE_PREFIX))["song_id"]

    def find_sound(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of some rows with a vector that is good, and whose checksum fits. Reads their vectors."""
        sound = [pl.Series([], dtype=pl.Boolean)]
        for piece in rows.iter_slices(PIECE_ROWS):
            song_ids, checksums = piece["song_id"].to_numpy(), piece["checksum"].to_numpy()
            embeddings = self.embeddings_at(piece["row"].to_list())
            sound.append(pl.Series(find_sound_rows(song_ids, piece["text_hash"].to_list(), checksums, embeddings)))
        return rows.filter(pl.concat(sound))

    def batches(self) -> list[pa.RecordBatch]:
        """The stored batches, mapped, not read."""
        if self._stale:
            self.read()
        return self._batches

    def matrix(self, batch: pa.RecordBatch) -> Float32Matrix:
        """The vectors, mapped, of a stored batch that has them."""
        values: Float32Matrix = batch.column("embedding").values.to_numpy(zero_copy_only=True)
        return values.reshape(batch.num_rows, self.identity.dimensions)

    def embeddings_at(self, rows: Sequence[int]) -> Float32Matrix:
        """The vectors at a few of `live_rows`' places, in the order asked for."""
        starts = np.cumsum([0, *(batch.num_rows for batch in self.batches())])
        embeddings = np.empty((len(rows), self.identity.dimensions), dtype=np.float32)
        for place, row in enumerate(rows):
            batch = int(np.searchsorted(starts, row, side="right")) - 1
            embeddings[place] = self.matrix(self._batches[batch])[row - starts[batch]]
        return embeddings

    def append_set_aside(self, song_ids: Sequence[int], text_hashes: Sequence[bytes], reason: str) -> None:
        """Append songs that the provider refuses, with its reason."""
        self.append(song_ids, text_hashes, reason, None)

    def append_gone(self, song_ids: Sequence[int]) -> None:
        """Append that songs were deleted just now: their earlier rows no longer hold."""
        self.append(song_ids, [_tombstone(time.time())] * len(song_ids), None, None)

    def append_damaged(self, song_ids: Sequence[int]) -> None:
        """Append that songs' rows were found damaged: the next fill embeds those songs anew."""
        self.append(song_ids, [DAMAGED] * len(song_ids), None, None)

    def told_song_ids(self) -> pl.Series:
        """The songs of which the shard says anything but that it was damaged: also those that are gone."""
        return self.all_rows().unique("song_id", keep="last").filter(pl.col("text_hash") != DAMAGED)["song_id"]

    def append(
        self,
        song_ids: Sequence[int],
        text_hashes: Sequence[bytes],
        reason: str | None,
        embeddings: Float32Matrix | None,
    ) -> None:
        """Append rows of one kind as one batch; when this returns they are on disk. No rows are no write.

        Raises:
            StoreError: somebody else wrote the file since: the lock was lost. Nothing is written. Or the disk refused.
        """
        if not len(song_ids):
            return
        reasons = [reason] * len(song_ids)
        message = build_batch(self.identity, song_ids, text_hashes, reasons, embeddings).serialize()
        is_new = self._size == 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._write(message, is_new)
        except OSError as error:
            # what was half written is no other process's: the next append cuts it off
            self._size_on_disk = self.path.stat().st_size if self.path.exists() else 0
            raise StoreError(
                f"could not write {self.path}: {error}. What was stored before is kept: make room, or give access, and "
                "start the same command again"
            ) from error
        if is_new:
            sync_folder(self.path.parent)
        self._stale = True

    def _write(self, message: pa.Buffer, is_new: bool) -> None:
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if os.fstat(file.fileno()).st_size != self._size_on_disk:
                raise StoreError(
                    f"{self.path} was changed by another process while this one filled it: its lock was lost, as when "
                    "the database restarts. Start the same command again; what both have stored is kept"
                )
            # what a crash left behind the last whole batch would hide all that follows
            file.truncate(self._size)
            file.seek(self._size)
            if is_new:
                file.write(self.identity.schema.serialize())
            file.write(message)
            file.flush()
            os.fsync(file.fileno())
            self._size = self._size_on_disk = file.tell()

    def read(self) -> None:
        """Map the file and take its whole batches; damaged stretches between them are passed over."""
        self._batches, self._stale = [], False
        self._size = self._size_on_disk = self.n_bytes_skipped = 0
        header = self.identity.schema.serialize().to_pybytes()
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        content = pa.memory_map(str(self.path)).read_buffer()
        self._size_on_disk = int(content.size)
        beginning = bytes(memoryview(content)[: len(header)])
        if not header.startswith(beginning):
            found = read_identity(self.path)
            if found is not None and found != self.identity:
                raise StoreError(
                    f"{self.path} holds {found}, expected {self.identity}: restore it from a backup; or move it away, "
                    "and its songs are embedded anew"
                )
            # the same identity in other bytes: written by another version of Arrow
            self._size = find_message(content, 8) if found else 0
        elif len(beginning) < len(header):
            return  # not even a whole schema: nothing in it was ever acknowledged
        else:
            self._size = len(header)
        position = self._size
        while position < content.size:
            found_batch = read_batch(content, position, self.identity)
            if found_batch is None:
                position = find_message(content, position + 8)
            else:
                self._batches.append(found_batch[0])
                self.n_bytes_skipped += position - self._size
                self._size = position = found_batch[1]
        if not self._size:
            raise StoreError(
                f"{self.path} holds something damaged or foreign, and not one sound row of {self.identity}: restore it "
                "from a backup; or move it away, and its songs are embedded anew"
            )


def load_embeddings_from_cache(cache: ModelCache, song_range: SongIdRange) -> tuple[Shard, pl.DataFrame]:
    """Open a range's shard.

    Returns:
        The shard and its `live_rows`; a range without a file has none.
    """
    shard = Shard(cache.path_of(song_range), ShardIdentity(cache.model, cache.dimensions, song_range))
    return shard, shard.live_rows()


def write_embeddings_to_file(
    shard: Shard, song_ids: Sequence[int], text_hashes: Sequence[bytes], embeddings: Float32Matrix
) -> None:
    """Append songs with their vectors to a shard; when this returns they are on disk.

    Raises:
        ValueError: a vector is zero, not finite, or of another size: nothing is written.
    """
    expected = (len(song_ids), shard.identity.dimensions)
    if embeddings.shape != expected or find_bad_vectors(embeddings):
        raise ValueError(f"expected finite vectors other than zero of shape {expected}, got shape {embeddings.shape}")
    shard.append(song_ids, text_hashes, None, embeddings)


def read_embeddings_from_file(shard: Shard, rows: pl.Series) -> Iterator[ShardRows]:
    """Read vectors, a stored batch at a time and in the file's order.

    Args:
        shard: the shard.
        rows: places as `live_rows` gives them, of rows that have a vector.
    """
    wanted = np.sort(rows.to_numpy())
    first = 0
    for batch in shard.batches():
        begin, end = np.searchsorted(wanted, (first, first + batch.num_rows))
        here = wanted[begin:end] - first
        first += batch.num_rows
        if len(here) == 0:
            continue
        song_ids, checksums = batch.column("song_id").to_numpy(), batch.column("checksum").to_numpy()
        stored = ShardRows(song_ids, text_hashes_of(batch), checksums, shard.matrix(batch))
        # whole batches are handed on as they are mapped; picking rows copies
        yield stored if len(here) == batch.num_rows else stored.take(here)


def _tombstone(time_s: float) -> bytes:
    """What stands in place of the text_hash of a song that was deleted at this time."""
    return _GONE_PREFIX + int(time_s).to_bytes(8, "little")


def read_identity(path: Path) -> ShardIdentity | None:
    """What a shard says it holds; None where its beginning is not whole."""
    try:
        with pa.memory_map(str(path)) as source:
            return ShardIdentity.from_schema(pa.ipc.open_stream(source).schema)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def lock_name(song_range: SongIdRange) -> str:
    """The lock that whoever writes a range's shard holds."""
    return f"fill {song_range.key}"
