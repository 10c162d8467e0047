"""Float32 matrices to Postgres' binary COPY format. Pure.

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
_CHUNK_BYTES = 1 << 20


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


def encode_rows(song_ids: NDArray[np.int32], embeddings: Float32Matrix, vector_type: str = "vector") -> Iterator[bytes]:
    """Encode rows, without header and trailer, in chunks of about a mebibyte.

    Args:
        song_ids: (n,).
        embeddings: (n, dimensions).
        vector_type: the column's type.
    """
    dtype = row_dtype(embeddings.shape[1], vector_type)
    n_rows = max(1, _CHUNK_BYTES // dtype.itemsize)
    for start in range(0, len(song_ids), n_rows):
        piece = slice(start, start + n_rows)
        rows = np.zeros(len(song_ids[piece]), dtype=dtype)
        rows["fields"], rows["id_len"] = 2, 4
        rows["song_id"], rows["embedding"] = song_ids[piece], embeddings[piece]
        rows["vec_len"] = dtype["embedding"].itemsize + 4
        rows["dim"] = embeddings.shape[1]
        yield rows.tobytes()


class CopyStream:
    """A file that psycopg2's `copy_expert` reads: header, chunks, trailer, without holding more than a chunk."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._parts = itertools.chain((HEADER,), chunks, (TRAILER,))
        self._buffer = memoryview(b"")
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; empty at the end. What the chunks raise is kept in `error`: psycopg2 hides it."""
        while not self._buffer:
            try:
                part = next(self._parts, None)
            except Exception as error:
                self.error = error
                raise
            if part is None:
                return b""
            self._buffer = memoryview(part)
        piece = self._buffer if size < 0 else self._buffer[:size]
        self._buffer = self._buffer[len(piece) :]
        return bytes(piece)
