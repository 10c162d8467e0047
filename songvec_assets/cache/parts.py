"""The format of a part: an immutable Arrow IPC file of songs with their vectors and checksums. Pure.

Columns: song_id (int32), text_hash (16 bytes), checksum (uint64, XXH3 of the whole row) and embedding (float32, fixed
size). The schema's metadata has the format, the part's identity, and a digest of the identity and the three narrow
columns, which is checked when a part is opened; a vector is checked with its row's checksum when it is read.
When to add here: another column or another format version. Keep out: where parts are, and which rows are valid.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TEXT_HASH_BYTES

PIECE_ROWS = 2048
"""Maximum rows of a record batch, and of each step that reads or writes rows: 16 MB of vectors of 2,000 values."""
SMALL_ROWS = PIECE_ROWS // 8
"""A part with fewer rows is small: a range with many of these is written again."""

_FORMAT = "1"
UNREADABLE = (pa.ArrowException, OSError, EOFError, KeyError, TypeError, ValueError)
"""The errors that damaged files raise."""
_HEAD_BYTES = 8
"""Bytes of an Arrow IPC file before its stream of messages."""
_TEXT_HASH = np.dtype(f"V{TEXT_HASH_BYTES}")

TextHashes = Sequence[bytes] | NDArray[np.void]


class DamagedPartError(Exception):
    """A part is damaged; the message says what is wrong.

    Attributes:
        sound: its rows that are intact by their checksums.
    """

    def __init__(self, problem: str, batches: "Sequence[StoredRows]" = ()) -> None:
        super().__init__(problem)
        self.sound: list[StoredRows] = []
        for each in batches:
            rows = each.load()
            good = rows.find_sound()
            if good.any():  # intact batches stay where they are
                self.sound.append(each if good.all() else rows.take(np.flatnonzero(good)))


@dataclass(frozen=True)
class PartIdentity:
    """What all rows of a part have in common.

    Attributes:
        model_id: the name that the vectors are identified by.
        dimensions: values per vector.
        range: of the song_ids.
    """

    model_id: str
    dimensions: int
    range: SongIdRange

    def __str__(self) -> str:
        return f"{self.model_id}, {self.dimensions} dimensions, range {self.range.key}"

    @property
    def row_bytes(self) -> int:
        """Size of a row in a part: its values, song_id, text_hash and checksum."""
        return 4 * self.dimensions + 4 + TEXT_HASH_BYTES + 8

    def schema(self, digest: str = "") -> pa.Schema:
        """The Arrow schema of a part with this digest in its metadata."""
        fields = [
            pa.field("song_id", pa.int32(), nullable=False),
            pa.field("text_hash", pa.binary(TEXT_HASH_BYTES), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
            pa.field("embedding", pa.list_(pa.field("item", pa.float32(), nullable=False), self.dimensions), False),
        ]
        return pa.schema(fields, {"songvec": self._metadata(digest)})

    def _metadata(self, digest: str) -> str:
        given = {"format": _FORMAT, "model_id": self.model_id, "dimensions": self.dimensions, "range": self.range.key}
        return json.dumps(given | {"digest": digest})

    def digest(self, rows: "Rows") -> str:
        """A digest of this identity and the narrow columns of a part."""
        state = xxhash.xxh3_64(self._metadata("").encode())
        for column in (rows.song_ids.astype("<i4"), rows.text_hashes, rows.checksums.astype("<u8")):
            state.update(column.tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class Rows:
    """The narrow columns of rows: all but the vectors.

    Attributes:
        song_ids: int32, (n,).
        text_hashes: (n,).
        checksums: uint64, (n,).
    """

    song_ids: NDArray[np.int32]
    text_hashes: NDArray[np.void]
    checksums: NDArray[np.uint64]

    @classmethod
    def of_frame(cls, rows: pl.DataFrame) -> "Rows":
        """The narrow columns of stored rows, from columns song_id, text_hash and checksum."""
        hashes = np.frombuffer(b"".join(rows["text_hash"].to_list()), dtype=_TEXT_HASH)
        return cls(rows["song_id"].to_numpy(), hashes, rows["checksum"].to_numpy())

    def __len__(self) -> int:
        return len(self.song_ids)


class StoredRows(Rows):
    """Rows of a part, with vectors that are read when they are used."""

    def vectors_at(self, positions: slice | NDArray[np.int64]) -> Float32Matrix:
        """The vectors at some positions, in their order."""
        raise NotImplementedError

    def load(self) -> "CachedRows":
        """All rows, with their vectors."""
        return self.take(slice(None))

    def take(self, positions: slice | NDArray[np.int64]) -> "CachedRows":
        """The rows at some positions; if the vectors are mapped, a slice is a view. Positions are copied."""
        narrow = self.song_ids[positions], self.text_hashes[positions], self.checksums[positions]
        return CachedRows(*narrow, self.vectors_at(positions))


@dataclass(frozen=True)
class CachedRows(StoredRows):
    """Rows that were read, with their vectors.

    Attributes:
        embeddings: float32, (n, dimensions).
    """

    embeddings: Float32Matrix

    @classmethod
    def of(cls, song_ids: Sequence[int], text_hashes: TextHashes, embeddings: Float32Matrix) -> "CachedRows":
        """New rows, with computed checksums."""
        ids, hashes = np.asarray(song_ids, dtype=np.int32), np.asarray(text_hashes, dtype=_TEXT_HASH)
        return cls(ids, hashes, checksum_rows(ids, hashes, embeddings), embeddings)

    def find_sound(self) -> NDArray[np.bool_]:
        """Which rows have a usable vector and a matching checksum; (n,)."""
        # first: it reads a cold file without the interpreter's lock, which the checksums hold
        bad = find_bad_vectors(self.embeddings)
        sound: NDArray[np.bool_] = checksum_rows(self.song_ids, self.text_hashes, self.embeddings) == self.checksums
        sound[bad] = False
        return sound

    def vectors_at(self, positions: slice | NDArray[np.int64]) -> Float32Matrix:
        return self.embeddings[positions]

    def load(self) -> "CachedRows":
        return self


def checksum_rows(
    song_ids: NDArray[np.int32], text_hashes: TextHashes, embeddings: Float32Matrix
) -> NDArray[np.uint64]:
    """A 64-bit checksum (XXH3) per row, over song_id, text_hash and the vector's bytes; (n,)."""
    digest = xxhash.xxh3_64_intdigest
    prefixes = np.empty(len(song_ids), dtype=[("song_id", "<i4"), ("text_hash", _TEXT_HASH)])
    prefixes["song_id"] = song_ids
    prefixes["text_hash"] = np.asarray(text_hashes, dtype=_TEXT_HASH)
    seeds = map(digest, prefixes.view(f"V{prefixes.itemsize}").tolist())
    return np.fromiter(map(digest, embeddings, seeds), dtype=np.uint64, count=len(song_ids))


def write_part(file: BinaryIO, identity: PartIdentity, rows: Rows, pieces: Iterable[Float32Matrix]) -> None:
    """Write a part; memory is bounded by one piece.

    Args:
        rows: the narrow columns of all rows.
        pieces: their vectors, in order; each (up to PIECE_ROWS, dimensions).
    """
    schema = identity.schema(identity.digest(rows))
    with pa.ipc.new_file(file, schema) as writer:
        start = 0
        for piece in pieces:
            stop = start + len(piece)
            hashes = pa.py_buffer(np.ascontiguousarray(rows.text_hashes[start:stop]))
            values = pa.array(np.ascontiguousarray(piece, dtype="<f4").reshape(-1))
            columns = [
                pa.array(rows.song_ids[start:stop]),
                pa.Array.from_buffers(pa.binary(TEXT_HASH_BYTES), stop - start, [None, hashes]),
                pa.array(rows.checksums[start:stop]),
                pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            start = stop


def read_identity(file: Any) -> PartIdentity | None:
    """The identity in a part's metadata; None if the part does not open. Of a file, only its end is read."""
    try:
        return _identity_of(json.loads(pa.ipc.open_file(file).schema.metadata[b"songvec"]))
    except UNREADABLE:
        return None


def _identity_of(metadata: dict[str, Any]) -> PartIdentity:
    return PartIdentity(metadata["model_id"], metadata["dimensions"], SongIdRange.from_key(metadata["range"]))


def open_part(content: pa.Buffer, identity: PartIdentity, name: str) -> list[CachedRows]:
    """The record batches of a part, mapped; reads the narrow columns, but no vector.

    Args:
        identity: that it must have.
        name: of the part, for messages.

    Raises:
        DamagedPartError: it is damaged.
        StoreError: it is intact, but of another model, size or range.
    """
    problem = ""
    # if the end of the file is damaged or missing, the batches before it are read as a stream
    for opener, start in ((pa.ipc.open_file, 0), (pa.ipc.open_stream, _HEAD_BYTES)):
        try:
            reader = opener(content.slice(start))
            metadata = json.loads(reader.schema.metadata[b"songvec"])
            found, digest, layout = _identity_of(metadata), metadata["digest"], metadata["format"]
            if not reader.schema.equals(found.schema()):
                raise ValueError("its columns are not a part's")
            break
        except UNREADABLE as error:
            problem = problem or f"it does not open ({error})"
    else:
        raise DamagedPartError(problem)
    if layout != _FORMAT:
        raise StoreError(
            f"{name} has format {layout}, expected {_FORMAT}: another version of songvec wrote it. "
            "Work with that version",
            "store.other-version",
        )
    batches: list[CachedRows] = []
    try:
        stored = map(reader.get_batch, range(reader.num_record_batches)) if opener is pa.ipc.open_file else reader
        batches.extend(_read_batch(batch, found) for batch in stored)
    except UNREADABLE as error:
        problem = problem or f"a batch does not open ({error})"
    if not problem and found.digest(join_rows(batches)) != digest:
        problem = "song_ids, text hashes or checksums do not match their digest"
    if found != identity and not problem:
        raise StoreError(
            f"{name} holds {found}, expected {identity}: restore it from a backup; or move it away, and its songs are "
            "embedded again",
            "store.foreign-file",
        )
    if problem:
        raise DamagedPartError(problem, batches if found == identity else [])
    return batches


def join_rows(batches: Sequence[Rows]) -> Rows:
    """The narrow columns of several batches, concatenated."""
    nothing = np.empty(0, np.int32), np.empty(0, _TEXT_HASH), np.empty(0, np.uint64)
    narrow = [nothing, *((each.song_ids, each.text_hashes, each.checksums) for each in batches)]
    return Rows(*map(np.concatenate, zip(*narrow, strict=True)))


def _read_batch(batch: pa.RecordBatch, identity: PartIdentity) -> CachedRows:
    # otherwise a flipped bit in a length or an offset would cause reads outside of the file
    batch.validate(full=True)
    song_ids, text_hashes, checksums, vectors = batch.columns
    if any(column.null_count or column.offset for column in batch.columns):
        raise ValueError("it has nulls")
    values: Float32Matrix = vectors.values.to_numpy(zero_copy_only=True)
    hashes = np.frombuffer(text_hashes.buffers()[1], dtype=_TEXT_HASH, count=batch.num_rows)
    matrix = values.reshape(batch.num_rows, identity.dimensions)
    return CachedRows(song_ids.to_numpy(), hashes, checksums.to_numpy(), matrix)
