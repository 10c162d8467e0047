"""Parts as they are opened: mapped whole from a disk; from an object store by ranged reads, the vectors when used.

Of an object, opening reads its first and last bytes, and of each batch the metadata and the narrow columns. Their place
follows from the footer, and their digest shows that it was the right one; if not, the object is read as a whole.
When to add here: another way to read less of a part. Keep out: the format (`parts`).
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from songvec_assets.cache.parts import UNREADABLE, CachedRows, PartIdentity, StoredRows, join_rows, open_part
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.songs.text import TEXT_HASH_BYTES
from songvec_assets.storage import Opened
from songvec_assets.threads import DaemonThreads

_TAIL_BYTES = 1 << 16
"""More than the footer of a part of 2,000 batches."""
_END = struct.Struct("<i6s")
"""Length of the footer, and the magic bytes."""
_BLOCK = struct.Struct("<qi4xq")
"""Of a batch: where its metadata begins, the length of the metadata, and that of the columns."""
_NARROW_BYTES = 4 + TEXT_HASH_BYTES + 8


@dataclass(frozen=True)
class RemoteRows(StoredRows):
    """Rows of a batch whose vectors are in an object store.

    Attributes:
        start: where the vectors begin.
        dimensions: values per vector.
    """

    content: Opened
    start: int
    dimensions: int

    def vectors_at(self, positions: slice | NDArray[np.int64]) -> Float32Matrix:
        rows, n_bytes = np.arange(len(self))[positions], 4 * self.dimensions
        if not len(rows):
            return np.empty((0, self.dimensions), np.float32)
        wanted = np.unique(rows)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
        spans = [(self.start + int(run[0]) * n_bytes, self.start + (int(run[-1]) + 1) * n_bytes) for run in runs]
        pieces = [np.frombuffer(each, "<f4").reshape(-1, self.dimensions) for each in self.content.read(spans)]
        found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return found if len(found) == len(rows) and (rows == wanted).all() else found[np.searchsorted(wanted, rows)]


def open_stored(content: Opened, identity: PartIdentity, name: str) -> Sequence[StoredRows]:
    """The record batches of a part; reads no vector. See `open_part`.

    Raises:
        DamagedPartError, StoreError: see `open_part`.
    """
    if content.mapped is None:
        try:
            return _open_remote(content, identity)
        except (*UNREADABLE, IndexError, struct.error):
            # it is damaged, or of another version: the errors are those of the format
            [whole] = content.read([(0, content.size)])
    else:
        whole = content.mapped
    return open_part(whole, identity, name)


def _open_remote(content: Opened, identity: PartIdentity) -> list[RemoteRows]:
    """The batches of an intact part.

    Raises:
        UNREADABLE, IndexError, struct.error: it is not one.
    """
    [tail] = content.read([(max(content.size - _TAIL_BYTES, 0), content.size)])
    n_footer, magic = _END.unpack_from(tail, tail.size - _END.size)
    if magic != b"ARROW1":
        raise ValueError("it has no end")
    blocks = _read_blocks(tail.slice(tail.size - _END.size - n_footer, n_footer).to_pybytes())
    if not all(0 < offset < offset + n_metadata + n_body <= content.size for offset, n_metadata, n_body in blocks):
        raise ValueError("its footer names places outside of it")
    [head] = content.read([(0, blocks[0][0])])
    schema = pa.ipc.read_schema(pa.BufferReader(head.slice(8)))
    if not schema.equals(identity.schema()):
        raise ValueError("its columns are not a part's")
    spans = [(offset, _find_vectors(offset + n_metadata, n_body, identity)) for offset, n_metadata, n_body in blocks]
    batches = [
        _read_narrow(content, narrow.slice(n_metadata), stop, identity)
        for (_, n_metadata, _), (_, stop), narrow in zip(blocks, spans, content.read(spans), strict=True)
    ]
    if identity.digest(join_rows(batches)) != json.loads(schema.metadata[b"songvec"])["digest"]:
        raise ValueError("its narrow columns do not match their digest")
    return batches


def _read_blocks(footer: bytes) -> list[tuple[int, int, int]]:
    """The batches that a footer lists: the fourth field of the table `Footer` in Arrow's File.fbs (FlatBuffers)."""
    (table,) = struct.unpack_from("<I", footer)
    (to_fields,) = struct.unpack_from("<i", footer, table)
    (at,) = struct.unpack_from("<H", footer, table - to_fields + 4 + 2 * 3)
    (to_vector,) = struct.unpack_from("<I", footer, table + at)
    first = table + at + to_vector
    (n_blocks,) = struct.unpack_from("<I", footer, first)
    return [_BLOCK.unpack_from(footer, first + 4 + number * _BLOCK.size) for number in range(n_blocks)]


def _find_vectors(body: int, n_bytes: int, identity: PartIdentity) -> int:
    """Where the vectors of a batch begin: its columns follow each other, each padded to 8 bytes."""
    n_rows = n_bytes // (_NARROW_BYTES + 4 * identity.dimensions)
    start = _padded(4 * n_rows) + (_NARROW_BYTES - 4) * n_rows
    if start + _padded(4 * n_rows * identity.dimensions) != n_bytes:
        raise ValueError("its columns have another layout")
    return body + start


def _padded(n_bytes: int) -> int:
    return (n_bytes + 7) // 8 * 8


def _read_narrow(content: Opened, narrow: pa.Buffer, start: int, identity: PartIdentity) -> RemoteRows:
    # padding of up to 4 bytes is less than a row
    n_rows, hash_type = narrow.size // _NARROW_BYTES, np.dtype(f"V{TEXT_HASH_BYTES}")
    at = _padded(4 * n_rows)
    # copied: the buffer may be a view of an answer that has vectors, too
    song_ids = np.frombuffer(narrow, "<i4", n_rows).copy()
    hashes = np.frombuffer(narrow, hash_type, n_rows, at).copy()
    checksums = np.frombuffer(narrow, "<u8", n_rows, at + TEXT_HASH_BYTES * n_rows).copy()
    return RemoteRows(song_ids, hashes, checksums, content, start, identity.dimensions)


def read_ahead(reads: Iterable[Callable[[], CachedRows]]) -> Iterator[CachedRows]:
    """Rows, one after the other; the next ones are read while a caller uses the last ones."""
    with DaemonThreads(1) as pool:
        ahead: Future[CachedRows] | None = None
        for read in reads:
            following = pool.submit(read)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
