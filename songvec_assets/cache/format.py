"""The bytes of a shard: its schema, its rows as record batches, their checksums, and finding whole batches again. Pure.

An Arrow IPC stream without its end marker, so that appending a batch is appending bytes. A batch's embeddings are all
there or all null; null ones take no room.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TEXT_HASH_BYTES

_CONTINUATION = b"\xff\xff\xff\xff"
_SCAN_BYTES = 1 << 20
_TEXT_HASH = np.dtype(f"V{TEXT_HASH_BYTES}")

_TextHashes = Sequence[bytes] | NDArray[np.void]


@dataclass(frozen=True)
class ShardIdentity:
    """What every row of a shard has in common; written into the file, refused where it differs."""

    model: str
    dimensions: int
    range: SongIdRange

    def __str__(self) -> str:
        return f"{self.model}, {self.dimensions} dimensions, range {self.range.key}"

    @property
    def schema(self) -> pa.Schema:
        """The file's Arrow schema, this identity in its metadata."""
        return pa.schema(
            [
                pa.field("song_id", pa.int32(), nullable=False),
                pa.field("text_hash", pa.binary(TEXT_HASH_BYTES), nullable=False),
                pa.field("checksum", pa.uint64(), nullable=False),
                pa.field("reason", pa.string()),
                pa.field("embedding", pa.list_(pa.float32())),
            ],
            metadata={"model": self.model, "dimensions": str(self.dimensions), "range": self.range.key},
        )

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> "ShardIdentity":
        """The inverse of `schema`.

        Raises:
            KeyError, TypeError, ValueError: the schema is not a shard's.
        """
        metadata = schema.metadata
        song_range = SongIdRange.from_key(metadata[b"range"].decode())
        return cls(metadata[b"model"].decode(), int(metadata[b"dimensions"]), song_range)


def build_batch(
    identity: ShardIdentity,
    song_ids: Sequence[int],
    text_hashes: Sequence[bytes],
    reasons: Sequence[str | None],
    embeddings: Float32Matrix | None,
    checksums: NDArray[np.uint64] | None = None,
) -> pa.RecordBatch:
    """Rows as one batch.

    Args:
        identity: of the shard.
        song_ids, text_hashes, reasons: (n,).
        embeddings: (n, dimensions), or None: no row has one.
        checksums: (n,) of rows that were stored before; None computes them.
    """
    ids = np.asarray(song_ids, dtype=np.int32)
    if embeddings is None:
        vectors = pa.nulls(len(ids), pa.list_(pa.float32()))
    else:
        embeddings = np.ascontiguousarray(embeddings, dtype="<f4")
        offsets = np.arange(len(ids) + 1, dtype=np.int32) * identity.dimensions
        vectors = pa.ListArray.from_arrays(pa.array(offsets), pa.array(embeddings.reshape(-1)))
    if checksums is None:
        checksums = checksum_rows(ids, text_hashes, embeddings)
    columns = [
        pa.array(ids),
        pa.array(text_hashes, pa.binary(TEXT_HASH_BYTES)),
        pa.array(checksums),
        pa.array(reasons, pa.string()),
        vectors,
    ]
    return pa.record_batch(columns, schema=identity.schema)


def checksum_rows(
    song_ids: NDArray[np.int32], text_hashes: _TextHashes, embeddings: Float32Matrix | None
) -> NDArray[np.uint64]:
    """A 64-bit checksum (XXH3) a row, over song_id, text_hash and the vector's bytes."""
    digest = xxhash.xxh3_64_intdigest
    prefixes = np.empty(len(song_ids), dtype=[("song_id", "<i4"), ("text_hash", _TEXT_HASH)])
    prefixes["song_id"] = song_ids
    prefixes["text_hash"] = np.asarray(text_hashes, dtype=_TEXT_HASH)
    seeds = map(digest, prefixes.view(f"V{prefixes.itemsize}").tolist())
    checksums = seeds if embeddings is None else map(digest, embeddings, seeds)
    return np.fromiter(checksums, dtype=np.uint64, count=len(song_ids))


def find_sound_rows(
    song_ids: NDArray[np.int32], text_hashes: _TextHashes, checksums: NDArray[np.uint64], embeddings: Float32Matrix
) -> NDArray[np.bool_]:
    """Which rows have a good vector, and a checksum that fits; (n,)."""
    # first, as it reads a cold file without holding the interpreter, which the checksums do
    bad = find_bad_vectors(embeddings)
    sound: NDArray[np.bool_] = checksum_rows(song_ids, text_hashes, embeddings) == checksums
    sound[bad] = False
    return sound


def read_batch(content: pa.Buffer, position: int, identity: ShardIdentity) -> tuple[pa.RecordBatch, int] | None:
    """The batch whose message begins at `position`, and where it ends; None where there is no sound one."""
    stream = pa.BufferReader(content.slice(position))
    try:
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(stream), identity.schema)
        # a flipped bit in a length or an offset would otherwise read outside of the file
        batch.validate(full=True)
    except (pa.ArrowException, EOFError, OSError):
        return None
    if pa.ipc.get_record_batch_size(batch) != stream.tell():
        return None  # a flipped bit in its length, too: it would swallow the batches that follow
    vectors = batch.column("embedding")
    n_vectors = batch.num_rows - vectors.null_count
    offsets = vectors.offsets.to_numpy()
    if n_vectors not in (0, batch.num_rows) or (n_vectors and (np.diff(offsets) != identity.dimensions).any()):
        return None
    if not n_vectors and not np.array_equal(_checksum_without_vectors(batch), batch.column("checksum").to_numpy()):
        return None  # no vector is read later to hold it against: a song must not be gone because of a flipped bit
    return batch, position + stream.tell()


def _checksum_without_vectors(batch: pa.RecordBatch) -> NDArray[np.uint64]:
    return checksum_rows(batch.column("song_id").to_numpy(), text_hashes_of(batch), None)


def text_hashes_of(batch: pa.RecordBatch) -> NDArray[np.void]:
    """The text_hashes, mapped, of a stored batch; (n,)."""
    return np.frombuffer(batch.column("text_hash").buffers()[1], dtype=_TEXT_HASH, count=batch.num_rows)


def find_message(content: pa.Buffer, position: int) -> int:
    """Where the next message may begin: at a continuation marker, aligned to 8 bytes; the end where there is none."""
    view = memoryview(content)
    while position < content.size:
        offset = bytes(view[position : position + _SCAN_BYTES]).find(_CONTINUATION)
        if offset < 0:
            position += _SCAN_BYTES - len(_CONTINUATION) + 1
        elif (position + offset) % 8:
            position += offset + 1
        else:
            return position + offset
    return int(content.size)
