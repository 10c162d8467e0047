"""Rows into a table: one binary COPY, or row batches where COPY is not allowed. Within the caller's transaction."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import psycopg2
import sqlalchemy as sa
from numpy.typing import NDArray
from pgvector import Vector
from psycopg2.extras import execute_values

from songvec_assets.cache.parts import CachedRows
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.postgres.sessions import widen_send_buffer
from songvec_assets.vectors.copy import CopyStream, encode_rows
from songvec_assets.vectors.table import TABLE, TableSpec

_PAGE_ROWS = 500


def store_rows(connection: sa.Connection, batches: Iterator[CachedRows], spec: TableSpec, table: str = TABLE) -> None:
    """Insert rows by COPY; an empty one finds out whether a pooler in between takes it, else by row batches.

    Args:
        connection: in a transaction.
        batches: rows whose song_ids are not in the table.
        spec: what the table holds.
        table: its name.
    """
    with raw_cursor(connection) as cursor:
        cursor.execute("SAVEPOINT before_copy")
        try:
            _copy(cursor, table, ())
        except (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ProtocolViolation):
            cursor.execute("ROLLBACK TO SAVEPOINT before_copy")
            for rows in batches:
                store_embeddings_batch(connection, rows.song_ids, rows.embeddings, spec, table)
            return
    store_embeddings_copy_bulk(connection, batches, spec, table)


def store_embeddings_copy_bulk(
    connection: sa.Connection, batches: Iterator[CachedRows], spec: TableSpec, table: str = TABLE
) -> None:
    """Insert rows through one binary COPY; see `store_rows` for the arguments."""
    chunks = encode_rows(((rows.song_ids, rows.embeddings) for rows in batches), spec.dimensions, spec.vector_type)
    with raw_cursor(connection) as cursor:
        widen_send_buffer(cursor.connection)
        _copy(cursor, table, chunks)


def _copy(cursor: Any, table: str, chunks: Iterable[bytes]) -> None:
    stream = CopyStream(chunks)
    try:
        cursor.copy_expert(f"COPY {table} (song_id, embedding) FROM STDIN (FORMAT binary)", stream)
    except psycopg2.Error:
        if stream.error is not None:
            raise stream.error from None
        raise


def store_embeddings_batch(
    connection: sa.Connection,
    song_ids: NDArray[np.int32],
    embeddings: NDArray[np.float32],
    spec: TableSpec,
    table: str = TABLE,
) -> None:
    """Insert or update rows by multi-row statements.

    Args:
        connection: in a transaction.
        song_ids: (n,).
        embeddings: (n, dimensions).
        spec: what the table holds.
        table: its name.
    """
    rows = ((song_id, Vector(vector).to_text()) for song_id, vector in zip(song_ids.tolist(), embeddings, strict=True))
    with raw_cursor(connection) as cursor:
        execute_values(
            cursor,
            f"INSERT INTO {table} (song_id, embedding) VALUES %s "
            "ON CONFLICT (song_id) DO UPDATE SET embedding = excluded.embedding, created_at = now()",
            rows,
            template=f"(%s, %s::{spec.vector_type})",
            page_size=_PAGE_ROWS,
        )
