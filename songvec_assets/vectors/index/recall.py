"""Recall and latency of searches at several numbers of probes, measured.

Recall is the share of the true ten nearest rows that a search finds. Searches run on the server as those of
`search/nearest`, but always by the index. Times are milliseconds per round trip. When to add here: another figure of
the same searches. Keep out: what is searched for and the exact answers (`neighbors`).
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import DatabaseError, StoreError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.vectors.index.catalog import BuiltIndex
from songvec_assets.vectors.index.neighbors import (
    NEIGHBORS,
    ExactNeighbors,
    LoadedRows,
    find_exact_neighbors,
    sample_queries,
)
from songvec_assets.vectors.index.probes import SMALL_TABLE_ROWS, find_smallest, set_probes
from songvec_assets.vectors.table import VectorTable

STEP = "measure recall"
DEFAULT_TARGET = 0.95
_ENOUGH = 0.99
_MOST_UNSEEN = _UNMEASURED_SHARE = 0.01


@dataclass(frozen=True)
class RecallPoint:
    """Searches at one number of probes.

    Attributes:
        probes: lists visited.
        recall: the lower of the two that follow.
        recall_of_rows: share of the ten nearest found, if the query is a row of the table.
        recall_of_synthetic: the same, if nothing in the table is like the query.
        ms_median, ms_p99: round trip of a search whose pages are in memory.
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
        n_queries: rows and synthetic ones together.
        n_rows: of the table.
        target: recall to reach.
        points: by probes, ascending.
        probes: the smallest that reach the target; all lists if the table is small, or if none do.
        n_changed: rows changed since the index was built, when this was measured.
    """

    n_queries: int
    n_rows: int
    target: float
    points: tuple[RecallPoint, ...]
    probes: int
    n_changed: int

    @property
    def chosen(self) -> RecallPoint:
        """The measurement at the chosen probes."""
        return next(point for point in self.points if point.probes == self.probes)

    @property
    def recall(self) -> float:
        """The recall at the chosen probes."""
        return self.chosen.recall

    @property
    def reached(self) -> bool:
        """Whether the target was reached."""
        return self.recall >= self.target

    def holds(self, n_changed: int) -> bool:
        """Whether the report is still true: up to 1 % changed rows move recall by no more than the sampling error.

        Args:
            n_changed: rows changed since the index was built.
        """
        return n_changed - self.n_changed <= _UNMEASURED_SHARE * self.n_rows

    def describe(self) -> str:
        """One line."""
        short = "" if self.reached else f", under the target of {self.target:.0%}"
        return f"recall {self.recall:.1%} at {self.probes:,} probes{short}"


def read_recall(connection: sa.Connection, table: VectorTable) -> RecallReport | None:
    """The recall of the current index, as measured last, or None."""
    report = table.read(connection, "recall", RecallReport)
    is_whole = report is not None and any(point.probes == report.probes for point in report.points)
    return report if is_whole else None


def write_recall(connection: sa.Connection, table: VectorTable, report: RecallReport) -> None:
    """Record a measurement, and let searches visit the probes that it chose."""
    table.write(connection, "recall", asdict(report))
    table.write(connection, "probes", report.probes)


def measure_recall(
    table: VectorTable,
    cache: ModelCache,
    lists: int,
    target: float = DEFAULT_TARGET,
    kept: int | None = None,
    run: RunContext = SILENT,
) -> RecallReport:
    """Measure over the powers of two until recall is beyond doubt, then narrow down the smallest probes that reach it.

    Args:
        table: with its index.
        cache: the cache that it was loaded from.
        lists: of the index.
        target: recall to reach, for both kinds of queries.
        kept: probes that searches use now; they are chosen again if they reach the target.
        run: notified of the rows, then of the searches; a stop ends it between two batches or searches.

    Raises:
        StoreError: the cache does not hold what is loaded, so that exact neighbors are not known.
        DatabaseError: the planner does not use the index, even if sequential scans are off.
    """
    with table.database.get_connection() as connection:
        n_changed = table.read_changes(connection)
    searches, probes = Searches.over(table, cache, run), 1
    while searches.measure(probes).recall < max(target, _ENOUGH) and probes < lists:
        probes = min(2 * probes, lists)
    if searches.exact.n_found <= SMALL_TABLE_ROWS:
        chosen = searches.measure(lists).probes
    elif kept is not None and searches.measure(min(kept, lists)).recall >= target:
        chosen = min(kept, lists)
    else:
        chosen = find_smallest(lambda probes: searches.measure(probes).recall >= target, set(searches.points), lists)
    report = searches.report(target, chosen, n_changed)
    run.report(Progress(STEP, searches.n_done, searches.n_done, unit="searches", note=report.describe()))
    return report


def measure_and_record(
    table: VectorTable, cache: ModelCache, lists: int, target: float, run: RunContext, kept: int | None = None
) -> tuple[RecallReport | None, str]:
    """Measure and record; returns the report and a sentence. If the cache lacks rows, nothing is measured: no error."""
    try:
        report = measure_recall(table, cache, lists, target, kept, run)
    except StoreError as error:
        return None, f"recall was not measured: {error}"
    with table.database.get_connection() as connection:
        write_recall(connection, table, report)
        built = table.read(connection, "index", BuiltIndex) or BuiltIndex()
        if built.target != target:  # the first since the build: decay is compared with it
            table.write(connection, "index", asdict(replace(built, target=target, probes=report.probes)))
    return report, report.describe()


@dataclass
class Searches:
    """The same searches at several numbers of probes; each number is measured once: `Searches.over(…).measure(8)`.

    Attributes:
        table: with its index.
        exact: what is searched for, see `sample_queries`, and the true neighbors.
        run: notified of each search; a stop ends them.
        points: what was measured, by probes.
        n_done: searches so far.
    """

    table: VectorTable
    exact: ExactNeighbors
    run: RunContext
    points: dict[int, RecallPoint] = field(default_factory=dict)
    n_done: int = 0

    @classmethod
    def over(cls, table: VectorTable, cache: ModelCache, run: RunContext = SILENT) -> "Searches":
        """Draw queries and find their exact neighbors.

        Raises:
            StoreError: the cache does not hold what is loaded.
        """
        rows = LoadedRows.of(table, cache)
        exact = find_exact_neighbors(rows, sample_queries(rows), run)
        if not exact.n_found or rows.n_rows - exact.n_found > _MOST_UNSEEN * rows.n_rows:
            raise StoreError(
                f"the cache in {cache.storage} holds {exact.n_found:,} of the {rows.n_rows:,} rows that the ledger of "
                f"table {table.name} names, so recall cannot be measured: fill the cache and load it, then materialize "
                "ivfflat_index",
                "cache.missing",
            )
        return cls(table, exact, run)

    def report(self, target: float, probes: int, n_changed: int) -> RecallReport:
        """The report of all measurements, with the chosen probes."""
        points = tuple(self.points[each] for each in sorted(self.points))
        return RecallReport(len(self.exact.queries), self.exact.n_found, target, points, probes, n_changed)

    @cached_property
    def _literals(self) -> list[str]:
        return [to_literal(vector) for vector in self.exact.queries]

    @property
    def _statement(self) -> str:
        return f"SELECT song_id FROM {self.table.name} ORDER BY embedding <=> %s LIMIT {NEIGHBORS}"

    def measure(self, probes: int) -> RecallPoint:
        """Run every query, then time every other one again, whose pages are in memory by then.

        Raises:
            DatabaseError: the planner does not use the index, even if sequential scans are off.
        """
        if probes not in self.points:
            with self.table.database.get_connection() as connection:
                set_probes(connection, probes)
                connection.execute(sa.text("SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = on"))
                self._check_plan(connection)
                found, _ = self._search_all(connection, probes, self._literals)
                _, times = self._search_all(connection, probes, self._literals[::2])
            shares = self.exact.count_hits(found) / max(1, self.exact.n_wanted)
            of_rows, of_synthetic = shares.reshape(2, -1).mean(axis=1).tolist()
            median, p99 = np.percentile(times, [50, 99]).tolist()
            self.points[probes] = RecallPoint(probes, min(of_rows, of_synthetic), of_rows, of_synthetic, median, p99)
        return self.points[probes]

    def _search_all(
        self, connection: sa.Connection, probes: int, literals: list[str]
    ) -> tuple[list[list[int]], list[float]]:
        found, times = [], []
        with raw_cursor(connection) as cursor:
            for vector in literals:
                self.run.check_stop()
                started = time.perf_counter()
                cursor.execute(self._statement, (vector,))
                found.append([song_id for (song_id,) in cursor])
                times.append(1000 * (time.perf_counter() - started))
                self.n_done += 1
                self.run.report(Progress(STEP, self.n_done, 0, unit="searches", note=f"{probes:,} probes"))
        return found, times

    def _check_plan(self, connection: sa.Connection) -> None:
        with raw_cursor(connection) as cursor:
            cursor.execute(f"EXPLAIN (FORMAT JSON) {self._statement}", (self._literals[0],))
            plan = json.dumps(cursor.fetchone()[0])
        if f'"{self.table.index_name}"' not in plan:
            raise DatabaseError(
                f"expected the planner to take {self.table.index_name} with enable_seqscan off, it does not: "
                "materialize ivfflat_index, which builds a valid one",
                "index.failed",
            )


def to_literal(vector: Float32Matrix) -> str:
    """A vector as the server reads it; every float32 comes back unchanged."""
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
