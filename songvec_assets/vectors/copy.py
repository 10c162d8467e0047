"""Float32 matrices to Postgres' binary COPY format, encoded as they are sent. Pure.

When to add here: another type of column. Keep out: connections, and which rows (`load`).

Layout of a row, big-endian (PostgreSQL documentation, COPY, "Binary Format"; pgvector's vector_send and halfvec_send;
read 2026-11): int16 number of fields; for each field int32 length and its bytes; a vector is int16 dimensions, int16
unused, then its values. Every row has the same size, so one numpy record lays out a whole chunk.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.wire import Float32Matrix

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
_VALUE_TYPES = {"vector": ">f4", "halfvec": ">f2"}
# chunks stay in a core's cache while numpy, psycopg2 and the socket copy them on
_CHUNK_BYTES = 1 << 17


def row_dtype(dimensions: int, vector_type: str = "vector") -> "np.dtype[np.void]":
    """The record of one row (song_id integer, embedding vector or halfvec)."""
    return np.dtype(
        [
            ("fields", ">i2"),
            ("id_len", ">i4"),
            ("song_id", ">i4"),
            ("vec_len", ">i4"),
            ("dim", ">u2"),
            ("unused", ">u2"),
            ("embedding", _VALUE_TYPES[vector_type], (dimensions,)),
        ]
    )


def encode_rows(
    batches: Iterable[tuple[NDArray[np.int32], Float32Matrix]], dimensions: int, vector_type: str
) -> Iterator[bytes]:
    """Encode rows, without header and trailer, in chunks of up to 128 KiB; a larger row is a chunk.

    Args:
        batches: song_ids, (n,), and embeddings, (n, dimensions).
        dimensions: values per vector.
        vector_type: the column's type.
    """
    dtype = row_dtype(dimensions, vector_type)
    native = dtype["embedding"].base.newbyteorder("=")
    buffer = np.zeros(max(1, _CHUNK_BYTES // dtype.itemsize), dtype=dtype)
    buffer["fields"], buffer["id_len"] = 2, 4
    buffer["vec_len"] = dtype["embedding"].itemsize + 4
    buffer["dim"] = dimensions
    for song_ids, embeddings in batches:
        for start in range(0, len(song_ids), len(buffer)):
            piece = slice(start, start + len(buffer))
            rows = buffer[: len(song_ids[piece])]
            # rounding and byte order in two passes: numpy does both at once value by value, at half the speed
            rows["song_id"], rows["embedding"] = song_ids[piece], embeddings[piece].astype(native, copy=False)
            yield rows.tobytes()


class CopyStream:
    """A file that psycopg2's `copy_expert` reads: header, chunks, trailer, each made when it is read.

    A thread that made them ahead was no faster: the socket's buffer keeps the server busy meanwhile.

    Attributes:
        error: what the chunks raised, or None. psycopg2 hides it.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._parts = itertools.chain((HEADER,), chunks, (TRAILER,))
        self.error: BaseException | None = None

    def read(self, _size: int = -1) -> bytes:
        """The next chunk, of any size: psycopg2 takes more than it asks for. Empty at the end.

        Raises:
            Whatever the chunks raise.
        """
        try:
            return next(filter(None, self._parts), b"")
        except BaseException as error:
            self.error = error
            raise
