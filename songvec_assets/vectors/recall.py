"""Recall, measured: how many of the true ten nearest rows searches find, and how fast, over a sweep of probes.

Searches run as `search` runs them, through the server, but never past the index. Times are milliseconds of a round
trip.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.cache.shards import ModelCache
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import DatabaseError, StoreError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.postgres.schema import read_fact
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.vectors.catalogue import set_probes
from songvec_assets.vectors.neighbours import (
    NEIGHBOURS,
    ExactNeighbours,
    LoadedRows,
    Queries,
    find_exact_neighbours,
    sample_queries,
)
from songvec_assets.vectors.sizes import SMALL_TABLE_ROWS
from songvec_assets.vectors.table import TABLE, TableSpec, fact_key, index_name, read_changes

STEP = "measure recall"
DEFAULT_TARGET = 0.95
_ENOUGH = 0.99
_MOST_UNSEEN = _UNMEASURED_SHARE = 0.01


@dataclass(frozen=True)
class RecallPoint:
    """Searches at one number of probes.

    Attributes:
        probes: lists visited.
        recall: the lower of the two that follow: whatever people ask is to be found.
        recall_of_rows: share of the ten nearest found, where the query is a row of the table.
        recall_of_synthetic: the same, where it is like nothing in the table.
        ms_median, ms_p99: a search's round trip, once its pages were read.
    """

    probes: int
    recall: float
    recall_of_rows: float
    recall_of_synthetic: float
    ms_median: float
    ms_p99: float


@dataclass(frozen=True)
class RecallReport:
    """What was measured.

    Attributes:
        n_queries: rows and made-up ones together.
        n_rows: of the table, that they were held against.
        target: the recall wanted.
        points: by probes, ascending.
        probes: the smallest that reach the target; all lists where the table is small, or where none do.
        n_changed: rows that had changed by then since the index was built.
    """

    n_queries: int
    n_rows: int
    target: float
    points: tuple[RecallPoint, ...]
    probes: int
    n_changed: int

    @property
    def chosen(self) -> RecallPoint:
        """At the chosen probes."""
        return next(point for point in self.points if point.probes == self.probes)

    @property
    def recall(self) -> float:
        """At the chosen probes."""
        return self.chosen.recall

    @property
    def reached(self) -> bool:
        """Whether the target was."""
        return self.recall >= self.target

    def holds(self, n_changed: int) -> bool:
        """Whether so few rows changed that it still tells: fewer do not move it by more than the sample's own error.

        Args:
            n_changed: rows changed since the index was built.
        """
        return n_changed - self.n_changed <= _UNMEASURED_SHARE * self.n_rows

    def describe(self) -> str:
        """One line."""
        short = "" if self.reached else f", under the target of {self.target:.0%}"
        return f"recall {self.recall:.1%} at {self.probes:,} probes{short}"

    def to_fact(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_fact(cls, fact: dict[str, Any]) -> "RecallReport":
        """The inverse of `to_fact`."""
        return cls(**(fact | {"points": tuple(RecallPoint(**point) for point in fact["points"])}))


def read_recall(connection: sa.Connection, table: str = TABLE) -> RecallReport | None:
    """Recall as measured last of the index that is there, or None."""
    fact = read_fact(connection, fact_key("recall", table))
    return None if fact is None else RecallReport.from_fact(fact)


def measure_recall(
    database: Database,
    cache: ModelCache,
    spec: TableSpec,
    lists: int,
    target: float = DEFAULT_TARGET,
    *,
    table: str = TABLE,
    kept: int | None = None,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> RecallReport:
    """Measure over the powers of two until recall is beyond doubt, then narrow down the smallest probes that reach it.

    Args:
        database: where the table is, with its index.
        cache: the shards that it was loaded from.
        spec: what it holds.
        lists: of the index.
        target: the recall wanted, of both kinds of queries.
        table: its name.
        kept: probes that searches use now, chosen again where they reach the target.
        progress: told the rows, then the searches.
        stop: ends it between two batches or searches.

    Raises:
        StoreError: the cache does not hold what is loaded, so that nothing exact is known.
        DatabaseError: the planner does not take the index even where it should.
    """
    with database.get_connection() as connection:
        n_changed = read_changes(connection, table)
    sweep = _Sweep.over(database, cache, spec, table, progress, stop)
    probes = 1
    while sweep.measure(probes).recall < max(target, _ENOUGH) and probes < lists:
        probes = min(2 * probes, lists)
    if sweep.exact.n_found <= SMALL_TABLE_ROWS:
        chosen = sweep.measure(lists).probes
    elif kept is not None and sweep.measure(min(kept, lists)).recall >= target:
        chosen = min(kept, lists)
    else:
        chosen = find_smallest(lambda probes: sweep.measure(probes).recall >= target, set(sweep.points), lists)
    points = tuple(sweep.points[probes] for probes in sorted(sweep.points))
    report = RecallReport(len(sweep.queries.vectors), sweep.exact.n_found, target, points, chosen, n_changed)
    progress(Progress(STEP, sweep.n_searches, sweep.n_searches, unit="searches", note=report.describe()))
    return report


def measure_recall_at(
    database: Database,
    cache: ModelCache,
    spec: TableSpec,
    probes: int,
    *,
    table: str = TABLE,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> RecallPoint:
    """Measure at one number of probes; see `measure_recall`."""
    return _Sweep.over(database, cache, spec, table, progress, stop).measure(probes)


def find_smallest(reaches: Callable[[int], bool], tried: set[int], lists: int) -> int:
    """Halve the gap between the most probes that fail and the fewest that do not; recall grows with probes.

    Args:
        reaches: whether so many probes reach the target.
        tried: that were measured; all lists among them where none reaches it.
        lists: of the index.
    """
    high = min((probes for probes in tried if reaches(probes)), default=None)
    if high is None:
        return lists
    low = max((probes for probes in tried if probes < high), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


@dataclass
class _Sweep:
    """Searches at several numbers of probes; each is measured once."""

    database: Database
    table: str
    queries: Queries
    exact: ExactNeighbours
    statement: str
    progress: ReportProgress
    stop: StopSignal
    points: dict[int, RecallPoint] = field(default_factory=dict)
    n_searches: int = 0

    @classmethod
    def over(
        cls,
        database: Database,
        cache: ModelCache,
        spec: TableSpec,
        table: str,
        progress: ReportProgress,
        stop: StopSignal | None,
    ) -> "_Sweep":
        """Draw queries and find their exact neighbours."""
        stop = stop or StopSignal()
        rows = LoadedRows.of(database, cache, table)
        queries = sample_queries(rows)
        exact = find_exact_neighbours(rows, queries.vectors, progress, stop)
        if not exact.n_found or rows.n_rows - exact.n_found > _MOST_UNSEEN * rows.n_rows:
            raise StoreError(
                f"the cache in {cache.storage} holds {exact.n_found:,} of the {rows.n_rows:,} rows that the ledger of "
                f"table {table} names, so recall cannot be measured: fill the cache and load it, then materialize "
                "ivfflat_index"
            )
        statement = f"SELECT song_id FROM {table} ORDER BY embedding <=> %s::{spec.vector_type} LIMIT {NEIGHBOURS}"
        return cls(database, table, queries, exact, statement, progress, stop)

    @cached_property
    def _literals(self) -> list[str]:
        return [to_literal(vector) for vector in self.queries.vectors]

    def measure(self, probes: int) -> RecallPoint:
        """Search for every query, then for every other one again, whose pages were read by then: those are timed."""
        if probes not in self.points:
            with self.database.get_connection() as connection:
                set_probes(connection, probes)
                connection.execute(text("SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = on"))
                self._check_plan(connection)
                found, _ = self._search_all(connection, probes, self._literals)
                _, times = self._search_all(connection, probes, self._literals[::2])
            shares = self.exact.count_hits(found) / max(1, self.exact.n_wanted)
            of_rows, of_synthetic = (
                float(part.mean()) for part in (shares[: self.queries.n_rows], shares[self.queries.n_rows :])
            )
            median, p99 = np.percentile(times, [50, 99])
            recall = min(of_rows, of_synthetic)
            self.points[probes] = RecallPoint(probes, recall, of_rows, of_synthetic, float(median), float(p99))
        return self.points[probes]

    def _search_all(
        self, connection: sa.Connection, probes: int, literals: list[str]
    ) -> tuple[list[list[int]], list[float]]:
        found, times = [], []
        with raw_cursor(connection) as cursor:
            for vector in literals:
                self.stop.check()
                started = time.perf_counter()
                cursor.execute(self.statement, (vector,))
                found.append([song_id for (song_id,) in cursor])
                times.append(1000 * (time.perf_counter() - started))
                self.n_searches += 1
                self.progress(Progress(STEP, self.n_searches, 0, unit="searches", note=f"{probes:,} probes"))
        return found, times

    def _check_plan(self, connection: sa.Connection) -> None:
        with raw_cursor(connection) as cursor:
            cursor.execute(f"EXPLAIN (FORMAT JSON) {self.statement}", (self._literals[0],))
            plan = json.dumps(cursor.fetchone()[0])
        if f'"{index_name(self.table)}"' not in plan:
            raise DatabaseError(
                f"expected the planner to take {index_name(self.table)} with enable_seqscan off, it does not: "
                "materialize ivfflat_index, which builds a valid one"
            )


def to_literal(vector: Float32Matrix) -> str:
    """A vector as the server reads it; every float32 comes back as it was."""
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
