"""What a sample of the vectors says: whether they are sound, how they shifted since an earlier load, how tables differ.

Never all of a large table is read. A provider that changes its model under its old name changes no count and no size:
it shows as a shift. When to add here: another figure that a sample of rows answers. Keep out: recall (`index/recall`)
and what follows from a figure (the checks). Lengths are norms of vectors; distances are in mean norms.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.embedding.wire import Float32Matrix, find_bad_vectors
from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.vectors.table import SERVING, STAGING, TableSpec, VectorTable, define_table

SAMPLE_ROWS = 1000

_PROFILES = "profiles"
"""Of two loads, whichever tables they went to: a change of all rows is a table of its own."""
_NORM_OFF_BY = 0.02
_NOISE_TIMES = 3.0
_SHARED_SONGS, _NEIGHBORS = 50, 10


@dataclass(frozen=True)
class VectorAudit:
    """A sample of the table's vectors.

    Attributes:
        n_sampled: rows looked at.
        bad_song_ids: those zero, not finite, or of another size.
        mean_norm: their mean norm; 1 for models that normalise; 0 for an empty table.
        mean: their mean vector, (dimensions,); empty where there is none.
    """

    n_sampled: int
    bad_song_ids: list[int]
    mean_norm: float
    mean: Float32Matrix = field(default_factory=lambda: np.empty(0, np.float32), compare=False, repr=False)


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
    return VectorAudit(len(rows), bad, float(np.linalg.norm(matrix, axis=1).mean()), matrix.mean(axis=0))


@dataclass(frozen=True)
class Profile:
    """A sample of the table as of one load.

    Attributes:
        version: of what is loaded.
        spec: what the table holds, in words.
        n_sampled: rows.
        mean_norm: their mean norm.
        mean: their mean vector.
    """

    version: str
    spec: str
    n_sampled: int
    mean_norm: float
    mean: list[float]


@dataclass(frozen=True)
class Drift:
    """The shift of the vectors between two loads.

    Attributes:
        norm: change of the mean norm, as a share.
        distance: between the mean vectors, in mean norms.
        allowed: distance that two samples of the same vectors hardly reach.
    """

    norm: float
    distance: float
    allowed: float

    @property
    def is_large(self) -> bool:
        """Whether the vectors are no longer those they were."""
        return abs(self.norm) > _NORM_OFF_BY or self.distance > self.allowed

    def describe(self) -> str:
        """One sentence."""
        words = (
            f"since the previous load, the mean norm changed by {self.norm:+.1%} and the mean vector moved by "
            f"{self.distance:.3f} norms (up to {self.allowed:.3f} is chance)"
        )
        return f"{words}: has the provider changed the model under its name?" if self.is_large else words


def measure_drift(database: Database, spec: TableSpec) -> Drift | None:
    """How far the last load shifted the vectors; None unless a load before it, of the same kind, was sampled.

    Takes a sample of the serving table if it changed since the last one, and keeps it for the next.
    """
    version = VectorTable(database).ledger.digest(spec)
    with database.get_connection() as connection:
        profiles = schema.read_record(connection, _PROFILES, list[Profile]) or []
    if not profiles or profiles[-1].version != version:
        audit = audit_vectors(database, spec)
        if not audit.n_sampled or audit.bad_song_ids:
            return None
        now = Profile(version, str(spec), audit.n_sampled, audit.mean_norm, np.round(audit.mean, 6).tolist())
        profiles = [*profiles[-1:], now]
        with database.get_connection() as connection:
            schema.write_fact(connection, _PROFILES, [asdict(each) for each in profiles])
    if len(profiles) < 2 or profiles[0].spec != profiles[1].spec:
        return None
    before, now = profiles
    distance = float(np.linalg.norm(np.subtract(now.mean, before.mean))) / before.mean_norm
    allowed = _NOISE_TIMES * math.sqrt(1 / before.n_sampled + 1 / now.n_sampled)
    return Drift(now.mean_norm / before.mean_norm - 1, distance, allowed)


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
