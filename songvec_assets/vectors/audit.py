"""What the table and the index are like in fact: samples and the ledger, never all of a large table."""

import json
from dataclasses import dataclass, field

import numpy as np
from sqlalchemy import text

from songvec_assets.cache.shards import ModelCache
from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import has_tables
from songvec_assets.vectors.catalogue import find_index, find_lists, read_probes, set_probes
from songvec_assets.vectors.recall import RecallPoint, measure_recall_at, read_recall
from songvec_assets.vectors.table import TABLE, TableSpec, define_table, index_name, read_changes, table_exists

SAMPLE_ROWS = 1000
_INDEX_WORTH_FROM_ROWS = 50_000


@dataclass(frozen=True)
class VectorAudit:
    """A sample of the table's vectors.

    Attributes:
        n_sampled: rows looked at.
        bad_song_ids: those zero, not finite, or of another size.
        mean_norm: their mean length; 1 for models that normalise; 0 for an empty table.
        mean: their mean vector, (dimensions,); empty where there is none.
    """

    n_sampled: int
    bad_song_ids: list[int]
    mean_norm: float
    mean: Float32Matrix = field(default_factory=lambda: np.empty(0, np.float32), compare=False, repr=False)


@dataclass(frozen=True)
class IndexAudit:
    """What the planner makes of the index.

    Attributes:
        valid: whether it is there and whole.
        used: whether a search of ten neighbours takes it.
        n_rows: of the table, as the planner estimates them.
    """

    valid: bool
    used: bool
    n_rows: int

    @property
    def should_be_used(self) -> bool:
        """Whether the table is large enough for an index to be the better plan."""
        return self.n_rows >= _INDEX_WORTH_FROM_ROWS

    def describe(self) -> str:
        """One sentence."""
        if not self.valid:
            return "the index is missing or invalid: materialize ivfflat_index"
        if self.used:
            return f"the planner uses the index for {self.n_rows:,} rows"
        if self.should_be_used:
            return (
                f"the planner passes the index by for {self.n_rows:,} rows: ANALYZE the table, check enable_indexscan"
            )
        return f"{self.n_rows:,} rows are few: the planner rightly scans them all"


@dataclass(frozen=True)
class RecallAudit:
    """What searches find of the true ten nearest.

    Attributes:
        point: recall and latency at the probes that searches visit; None where there is no index.
        target: the recall wanted.
        n_changed: rows changed since the index was built.
    """

    point: RecallPoint | None
    target: float
    n_changed: int

    @property
    def reached(self) -> bool:
        """Whether the target is."""
        return self.point is not None and self.point.recall >= self.target

    def describe(self) -> str:
        """One sentence."""
        if self.point is None:
            return "there is no valid index to measure: materialize ivfflat_index"
        told = (
            f"recall@10 is {self.point.recall:.1%} at {self.point.probes:,} probes, the target {self.target:.0%}; "
            f"{self.n_changed:,} rows changed since the index was built"
        )
        return told if self.reached else f"{told}: materialize ivfflat_index, which takes more probes or builds anew"


def audit_vectors(database: Database, spec: TableSpec, n_rows: int = SAMPLE_ROWS) -> VectorAudit:
    """Look at about `n_rows` rows, spread over the whole table."""
    table = define_table(spec)
    with database.get_connection() as connection:
        total = int(connection.scalar(text("SELECT count(*) FROM song_embeddings")) or 0)
        if not total:
            return VectorAudit(0, [], 0.0)
        rows = connection.execute(
            text("""
                SELECT song_id, embedding FROM song_embeddings
                WHERE song_id IN (
                    SELECT song_id FROM (SELECT song_id, row_number() OVER (ORDER BY song_id) AS place FROM
                    song_embeddings) p WHERE place % :step = 0
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
    return VectorAudit(len(rows), bad, float(np.linalg.norm(matrix, axis=1).mean()), matrix.mean(axis=0))


def count_rows(database: Database) -> int:
    """Rows of the serving table; 0 where there is none."""
    with database.get_connection() as connection:
        if not table_exists(connection, TABLE):
            return 0
        return int(connection.scalar(text(f"SELECT count(*) FROM {TABLE}")) or 0)


def audit_models(database: Database) -> dict[str, int]:
    """The models in the serving table's ledger, as `name (dimensions)`, with their songs."""
    with database.get_connection() as connection:
        if not has_tables(connection):
            return {}
        rows = connection.execute(
            text("""
                SELECT model, dimensions, sum(n_songs)::bigint FROM songvec.loaded_ranges
                WHERE table_name = :table GROUP BY model, dimensions
            """),
            {"table": TABLE},
        )
        return {f"{model} ({dimensions})": n_songs for model, dimensions, n_songs in rows}


def audit_index(database: Database, spec: TableSpec) -> IndexAudit:
    """Ask the catalogue and the planner."""
    vector = json.dumps([1.0] + [0.0] * (spec.dimensions - 1))
    with database.get_connection() as connection:
        valid = find_lists(connection) is not None
        n_rows = int(connection.scalar(text("SELECT count(*) FROM song_embeddings")) or 0)
        set_probes(connection, read_probes(connection))
        plan = connection.scalar(
            text(
                "EXPLAIN (FORMAT JSON) SELECT song_id FROM song_embeddings "
                f"ORDER BY embedding <=> CAST(:vector AS {spec.vector_type}) LIMIT 10"
            ),
            {"vector": vector},
        )
    return IndexAudit(valid, f'"{index_name()}"' in json.dumps(plan), n_rows)


def audit_recall(database: Database, cache: ModelCache, spec: TableSpec, target: float) -> RecallAudit:
    """Take what was measured last of the index, or measure anew where rows changed since.

    Args:
        database: where the table is.
        cache: the shards that it was loaded from.
        spec: what it holds.
        target: the recall wanted.

    Raises:
        StoreError: the cache does not hold what is loaded.
    """
    index = find_index(database)
    if index is None:
        return RecallAudit(None, target, 0)
    with database.get_connection() as connection:
        last, n_changed = read_recall(connection), read_changes(connection)
    if last is not None and last.holds(n_changed):
        return RecallAudit(last.chosen, target, n_changed)
    return RecallAudit(measure_recall_at(database, cache, spec, index.probes), target, n_changed)
