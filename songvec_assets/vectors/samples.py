"""What a sample of the vectors says: whether they are sound, and how the staging table differs from the serving one.

A large table is never read as a whole. When to add here: another figure that a sample of rows answers. Keep out: recall
(`index/recall`) and what follows from a figure (the checks).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.embedding.wire import find_bad_vectors
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.vectors.table import SERVING, STAGING, TableSpec, VectorTable, define_table

SAMPLE_ROWS = 1000

_SHARED_SONGS, _NEIGHBORS = 50, 10


@dataclass(frozen=True)
class VectorAudit:
    """A sample of the table's vectors.

    Attributes:
        n_sampled: rows looked at.
        bad_song_ids: those zero, not finite, or of another size.
        mean_norm: their mean norm; 1 for models that normalise; 0 for an empty table.
    """

    n_sampled: int
    bad_song_ids: list[int]
    mean_norm: float


def audit_vectors(database: Database, spec: TableSpec, n_rows: int = SAMPLE_ROWS) -> VectorAudit:
    """Look at about `n_rows` rows of the serving table, spread over all of it."""
    table = define_table(spec)
    total = VectorTable(database).count_rows()
    if not total:
        return VectorAudit(0, [], 0.0)
    with database.get_connection() as connection:
        rows = connection.execute(
            text(f"""
                SELECT song_id, embedding FROM {SERVING}
                WHERE song_id IN (
                    SELECT song_id
                    FROM (SELECT song_id, row_number() OVER (ORDER BY song_id) AS place FROM {SERVING}) p
                    WHERE place % :step = 0
                )
            """).columns(table.c.song_id, table.c.embedding),
            {"step": max(1, total // n_rows)},
        ).all()
    song_ids = [song_id for song_id, _ in rows]
    vectors = [np.asarray(getattr(vector, "to_numpy", lambda v=vector: v)(), dtype=np.float32) for _, vector in rows]
    wrong_size = [song_id for song_id, vector in zip(song_ids, vectors, strict=True) if len(vector) != spec.dimensions]
    if wrong_size:
        return VectorAudit(len(rows), wrong_size, 0.0)
    matrix = np.stack(vectors)
    bad = [song_ids[row] for row in find_bad_vectors(matrix)]
    return VectorAudit(len(rows), bad, float(np.linalg.norm(matrix, axis=1).mean()))


@dataclass(frozen=True)
class Comparison:
    """The serving table and the staging table.

    Attributes:
        n_serving, n_staged: rows.
        n_sampled: songs whose neighbors were looked at.
        overlap: mean share of a song's ten nearest that both tables agree on; two models need not agree on much.
        recall_serving, recall_staged: as measured last, in words.
    """

    n_serving: int
    n_staged: int
    n_sampled: int
    overlap: float
    recall_serving: str
    recall_staged: str

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.n_staged:,} rows, {self.n_serving:,} before; {self.recall_staged}, before: {self.recall_serving}; "
            f"{self.n_sampled:,} songs share {self.overlap:.0%} of their ten nearest with the table before"
        )


def compare_tables(database: Database) -> Comparison:
    """Compare the staging table with the serving one. Both are indexed."""
    tables = VectorTable(database, SERVING), VectorTable(database, STAGING)
    n_serving, n_staged = (sum(entry.n_songs for entry in table.ledger.read().values()) for table in tables)
    with database.get_connection() as connection:
        sample = _sample_shared_songs(connection)
        before, after = (find_neighbors(connection, table, sample) for table in tables)
        recalls = [read_recall(connection, table) for table in tables]
    shared = [len(before[song_id] & after[song_id]) / max(1, len(before[song_id])) for song_id in sample]
    words = [recall.describe() if recall else "recall not measured" for recall in recalls]
    return Comparison(n_serving, n_staged, len(sample), sum(shared) / len(shared) if shared else 0.0, *words)


def _sample_shared_songs(connection: sa.Connection) -> list[int]:
    """Songs of both tables, spread over all song_ids."""
    rows = connection.scalars(
        text(f"""
            SELECT song_id FROM (
                SELECT song_id, row_number() OVER (ORDER BY song_id) AS place, count(*) OVER () AS n_rows
                FROM {SERVING} JOIN {STAGING} USING (song_id)
            ) AS shared
            WHERE place % greatest(1, n_rows / :n_songs) = 0 LIMIT :n_songs
        """),
        {"n_songs": _SHARED_SONGS},
    )
    return list(rows)


def find_neighbors(connection: sa.Connection, table: VectorTable, song_ids: list[int]) -> dict[int, set[int]]:
    """The ten nearest others of some songs, as a table's searches find them."""
    statement = text(f"""
        SELECT song_id FROM {table.name} WHERE song_id <> :song_id
        ORDER BY embedding <=> (SELECT embedding FROM {table.name} WHERE song_id = :song_id) LIMIT {_NEIGHBORS}
    """)

    def fetch(song_id: int) -> Sequence[int]:
        return connection.scalars(statement, {"song_id": song_id}).all()

    return {song_id: set(table.search(connection, partial(fetch, song_id), _NEIGHBORS)) for song_id in song_ids}
