"""Audits of loaded tables: bad vectors, whether the planner uses the index, recall, and how two tables differ.

A large table is never read as a whole. When to add here: another question about a table or its index. Keep out: what
follows from an answer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.vectors.index.catalog import uses_index
from songvec_assets.vectors.index.neighbors import NEIGHBORS
from songvec_assets.vectors.index.probes import NearestSearch, find_nearest
from songvec_assets.vectors.index.recall import RecallReport, read_recall
from songvec_assets.vectors.index.recall_searches import RecallSearches
from songvec_assets.vectors.spec import SERVING, STAGING, TableSpec
from songvec_assets.vectors.table import VectorTable

SAMPLE_ROWS = 1000

_SHARED_SONGS = 50
_INDEX_WORTH_FROM_ROWS = 50_000


def _sample(tables: str, n_rows: int, n_songs: int) -> str:
    """About n_songs song_ids of a table or a join of n_rows, spread over all of it; all if there are no more."""
    # numbering the rows in order would take three times as long as this look at each key
    every = max(1, n_rows // n_songs)
    return f"SELECT song_id FROM {tables} WHERE (hashint4(song_id) & 2147483647) % {every} = 0"


@dataclass(frozen=True)
class VectorAudit:
    """A sample of the table's vectors.

    Attributes:
        n_sampled: rows.
        bad_song_ids: of vectors that are zero or of another size; pgvector itself refuses values that are not finite.
        mean_norm: their mean length; 1 for models that normalise; 0 for an empty table.
    """

    n_sampled: int
    bad_song_ids: list[int]
    mean_norm: float


def audit_vectors(database: Database, spec: TableSpec, n_rows: int, n_sampled: int = SAMPLE_ROWS) -> VectorAudit:
    """Check about `n_sampled` of the serving table's `n_rows` rows, spread over all of it."""
    statement = text(f"""
        SELECT count(*), coalesce(array_agg(song_id) FILTER (WHERE norm = 0 OR size <> :size), '{{}}'),
            coalesce(avg(norm), 0)
        FROM (
            SELECT song_id, vector_norm(embedding::vector) AS norm, vector_dims(embedding::vector) AS size
            FROM {SERVING} WHERE song_id IN ({_sample(SERVING, n_rows, n_sampled)})
        ) AS sampled
    """)
    with database.get_connection() as connection:
        if not VectorTable(database).exists(connection):
            return VectorAudit(0, [], 0.0)
        return VectorAudit(*connection.execute(statement, {"size": spec.dimensions}).one())


@dataclass(frozen=True)
class IndexAudit:
    """Whether the planner uses the index.

    Attributes:
        valid: whether the index exists and is valid.
        used: whether a search for ten neighbors uses it.
        n_rows: of the table.
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
            return "the index is missing or invalid: run `songvec index`"
        if self.used:
            return f"the planner uses the index for {self.n_rows:,} rows"
        if self.should_be_used:
            return f"the planner does not use the index for {self.n_rows:,} rows: run ANALYZE, check enable_indexscan"
        return f"{self.n_rows:,} rows are few: the planner scans them all, which is faster"


def audit_index(database: Database, spec: TableSpec, n_rows: int) -> IndexAudit:
    """Ask the catalog and the planner about the index of the serving table, which has `n_rows` rows."""
    table, vector = VectorTable(database), [1.0] + [0.0] * (spec.dimensions - 1)
    with database.get_connection() as connection:
        valid = table.find_index(connection) is not None
        search = NearestSearch.read(connection, table, of_songs=True)
        search.set_knobs(connection, table.read_probes(connection) or 1)
        candidates = table.read_candidates(connection) or NEIGHBORS
        parameters = {"vector": json.dumps(vector), "limit": NEIGHBORS, "candidates": candidates}
        with raw_cursor(connection) as cursor:
            is_used = uses_index(cursor, table.index_name, search.statement, parameters)
    return IndexAudit(valid, is_used, n_rows)


def audit_recall(table: VectorTable, cache: ModelCache, target: float) -> RecallReport | None:
    """The recall as measured last, or measured again if rows changed since; None: there is no valid index.

    Args:
        cache: the cache that it was loaded from.
        target: recall to reach.

    Raises:
        StoreError: the cache does not hold what is loaded.
    """
    index = table.index
    if index is None:
        return None
    with table.database.get_connection() as connection:
        report = read_recall(connection, table)
    if report is None or not report.holds(index.n_changed):
        searches = RecallSearches.over(table, cache)
        searches.reaches(index.probes, target)
        report = RecallReport.of(searches, target, index.probes)
    return replace(report, target=target, n_changed=index.n_changed)


@dataclass(frozen=True)
class QualityChange:
    """How well the nearest songs of the two tables answer labelled queries.

    Attributes:
        n_queries: labelled.
        serving, staged: mean nDCG@10.
        low, high: 95 % interval of staged - serving, by the paired bootstrap.
        trouble: why it could not be measured; empty if it was.
    """

    n_queries: int = 0
    serving: float = 0.0
    staged: float = 0.0
    low: float = 0.0
    high: float = 0.0
    trouble: str = ""

    @property
    def warning(self) -> str:
        """What to do if the staging table is significantly worse, or nothing is known; empty otherwise."""
        if self.trouble:
            return f"the labelled queries could not be compared: {self.trouble}"
        back = "`songvec swap --rollback` makes the previous table serve again, if it was kept"
        return f"searches became worse: {self.describe()}: {back}" if self.high < 0 else ""

    def describe(self) -> str:
        """The figures."""
        return (
            f"nDCG@10 of {self.n_queries:,} labelled queries {self.staged:.3f}, before: {self.serving:.3f} "
            f"(95 % interval of the difference {self.low:+.3f} to {self.high:+.3f})"
        )


@dataclass(frozen=True)
class Comparison:
    """The serving table and the staging table.

    Attributes:
        n_serving, n_staged: rows.
        n_sampled: songs whose neighbors were compared.
        overlap: mean share of a song's ten nearest that both tables have in common; for two models it may be small.
        recall_serving, recall_staged: as measured last, in words.
        quality: on labelled queries; None: there are none.
    """

    n_serving: int
    n_staged: int
    n_sampled: int
    overlap: float
    recall_serving: str
    recall_staged: str
    quality: QualityChange | None = None

    def describe(self) -> str:
        """One line."""
        quality = f"; {self.quality.describe()}" if self.quality and not self.quality.trouble else ""
        return (
            f"{self.n_staged:,} rows, {self.n_serving:,} before; {self.recall_staged}, before: {self.recall_serving}; "
            f"{self.n_sampled:,} songs share {self.overlap:.0%} of their ten nearest with the previous table{quality}"
        )


def compare_tables(database: Database, judge: Callable[[], QualityChange] | None) -> Comparison:
    """Compare the staging table with the serving one. Both are indexed.

    Args:
        judge: compares them on labelled queries; None: there are none.
    """
    tables = VectorTable(database, SERVING), VectorTable(database, STAGING)
    n_serving, n_staged = (table.ledger.count_songs() for table in tables)
    both = f"{SERVING} JOIN {STAGING} USING (song_id)"
    shared = text(f"{_sample(both, min(n_serving, n_staged), _SHARED_SONGS)} LIMIT {_SHARED_SONGS}")
    with database.get_connection() as connection:
        sample = list(connection.scalars(shared))
        before, after = (find_neighbors(connection, table, sample) for table in tables)
        recalls = [read_recall(connection, table) for table in tables]
    shares = [len(before[song_id] & after[song_id]) / max(1, len(before[song_id])) for song_id in sample]
    recall_serving, recall_staged = (recall.describe() if recall else "recall not measured" for recall in recalls)
    overlap, quality = sum(shares) / max(1, len(shares)), judge() if judge else None
    return Comparison(n_serving, n_staged, len(sample), overlap, recall_serving, recall_staged, quality)


def find_neighbors(connection: sa.Connection, table: VectorTable, song_ids: list[int]) -> dict[int, set[int]]:
    """The ten nearest others of some songs, as a table's searches find them."""
    statement = text(f"SELECT song_id, embedding::text FROM {table.name} WHERE song_id = ANY (:song_ids)")
    neighbors = {}
    for song_id, vector in connection.execute(statement, {"song_ids": song_ids}).all():
        found = find_nearest(table, connection, vector, NEIGHBORS + 1)
        neighbors[song_id] = set([each for each in found if each != song_id][:NEIGHBORS])
    return neighbors


def find_nearest_songs(table: VectorTable, vectors: Float32Matrix) -> list[list[int]]:
    """The ten nearest songs of some vectors, (n, dimensions), as a table's searches find them."""
    with table.database.get_connection() as connection:
        return [[*find_nearest(table, connection, json.dumps(each.tolist()), NEIGHBORS)] for each in vectors]
