"""The same searches at several numbers of probes, within a time limit: how much they find and how long they take.

Recall is the share of the true ten nearest rows that a search finds. Searches run on the server as those of
`search/nearest`, but always by the index. Twenty queries decide if a number of probes is far from the target; near it
there are more, until the interval is far from it or narrow, or the time is up. Times are milliseconds per round
trip. When to add here: another figure of the same searches. Keep out: what follows from it (`recall`).
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import DatabaseError, StoreError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.catalog import BuiltIndex, uses_index
from songvec_assets.vectors.index.interval import estimate_share
from songvec_assets.vectors.index.neighbors import (
    NEIGHBORS,
    ExactNeighbors,
    Found,
    LoadedRows,
    find_exact_neighbors,
    sample_queries,
)
from songvec_assets.vectors.index.probes import set_probes
from songvec_assets.vectors.ledger import LedgerEntry
from songvec_assets.vectors.table import VectorTable

STEP = "measure recall"
_MOST_MISSING = 0.01
_FIRST_QUERIES, _NARROW, _FAR = 20, 0.015, 1.5
_LIMIT_S, _LIMIT_OF_BUILD = 14.0, 0.19
"""Measuring takes up to 15 s, or a fifth of the build's time if that is more: the search under way is waited for."""


@dataclass(frozen=True)
class RecallPoint:
    """Searches at one number of probes.

    Attributes:
        probes: lists visited.
        recall: the lower of the two kinds.
        low, high: its interval of 95 %, see `interval`. Both are 1 if every list was visited: nothing can be missed.
        n_queries: of both kinds.
        recall_of_rows: share of the ten nearest found, if the query is a row of the table.
        recall_of_synthetic: the same, if nothing in the table is like the query.
        ms_median, ms_p99: round trip of a search; of the first twenty queries.
    """

    probes: int
    recall: float
    low: float
    high: float
    n_queries: int
    recall_of_rows: float
    recall_of_synthetic: float
    ms_median: float
    ms_p99: float

    def is_clear(self, target: float) -> bool:
        """Whether further queries are not worth it: the target is far from the interval, or that is narrow.

        Each look at an interval is an occasion to stop by chance. Therefore the target has to be half as far again
        from the recall as the end of the interval.
        """
        is_above = self.recall - target >= _FAR * (self.recall - self.low)
        is_below = target - self.recall > _FAR * (self.high - self.recall)
        return is_above or is_below or self.high - self.low <= 2 * _NARROW


@dataclass(frozen=True)
class Prepared:
    """Queries and their exact neighbors, which do not depend on the index.

    Attributes:
        ledger: of the table when they were sought: if it has changed, they are sought again.
        exact: what was found.
    """

    ledger: dict[SongIdRange, LedgerEntry]
    exact: ExactNeighbors


def prepare(table: VectorTable, cache: ModelCache, run: RunContext) -> "Future[Prepared]":
    """Begin to find the exact neighbors in another thread: for a table of seconds, while its index is built."""

    def find() -> Prepared:
        ledger, rows = table.ledger.read(), LoadedRows.of(table, cache)
        # silent: the build's progress is shown
        return Prepared(ledger, find_exact_neighbors(rows, sample_queries(rows), RunContext(stop=run.stop)))

    thread = ThreadPoolExecutor(1, "songvec-neighbors")
    prepared = thread.submit(find)
    thread.shutdown(wait=False)
    return prepared


@dataclass
class Searches:
    """The same searches at several numbers of probes: `Searches.over(…).measure(8)`.

    Attributes:
        table: with its index.
        exact: what is searched for, see `sample_queries`, and the true neighbors.
        lists: of the index.
        exact_from: probes that miss nothing: all lists, if vectors are not rounded to `halfvec`.
        n_changed: rows changed since it was built.
        limit_s: for all of it, from `began_at` on; then no further search starts, but for two at new probes.
        run: notified of each search; a stop ends them.
        began_at: `time.monotonic()`.
        n_done: searches so far.
    """

    table: VectorTable
    exact: ExactNeighbors
    lists: int
    exact_from: float
    n_changed: int
    limit_s: float
    run: RunContext
    began_at: float
    n_done: int = 0
    _found: dict[int, list[Found]] = field(default_factory=dict)
    _times: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def over(
        cls,
        table: VectorTable,
        cache: ModelCache,
        run: RunContext = SILENT,
        ahead: "Future[Prepared] | None" = None,
    ) -> "Searches":
        """Draw queries and find their exact neighbors, in half of the time.

        Args:
            table: with its index.
            cache: that it was loaded from.
            run: notified of the rows; a stop ends it.
            ahead: see `prepare`; None: nothing was prepared.

        Raises:
            StoreError: the cache does not hold what is loaded.
        """
        began_at = time.monotonic()
        with table.database.get_connection() as connection:
            lists, n_changed = table.read_lists(connection) or 1, table.read_changes(connection)
            built, spec = table.read(connection, "index", BuiltIndex) or BuiltIndex(), table.read_spec(connection)
        limit_s = max(_LIMIT_S, _LIMIT_OF_BUILD * built.seconds)
        prepared = ahead.result() if ahead else None
        if prepared and prepared.ledger == table.ledger.read():
            exact = prepared.exact
        else:
            rows = LoadedRows.of(table, cache)
            exact = find_exact_neighbors(rows, sample_queries(rows), run, began_at + limit_s / 2)
        if not exact.n_read or exact.n_missing > _MOST_MISSING * exact.n_rows:
            raise StoreError(
                f"the cache in {cache.storage} holds {exact.n_rows - exact.n_missing:,} of the {exact.n_rows:,} rows "
                f"that the ledger of table {table.name} names, so recall cannot be measured: fill the cache and load "
                "it, then run `songvec index`",
                "cache.missing",
            )
        exact_from = lists if spec and spec.vector_type == "vector" else math.inf
        return cls(table, exact, lists, exact_from, n_changed, limit_s, run, began_at)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began_at

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return self.seconds >= self.limit_s

    @property
    def tried(self) -> set[int]:
        """The numbers of probes that were measured."""
        return set(self._found)

    def reaches(self, probes: int, target: float) -> bool:
        """Whether so many probes reach the target; the number of queries doubles until that is clear.

        False if they were not measured before the time was up.
        """
        if self.is_late and probes not in self._found:
            return False
        point = self.measure(probes)
        while not point.is_clear(target) and point.n_queries < len(self.exact.queries) and not self.is_late:
            point = self.measure(probes, 2 * point.n_queries)
        return point.recall >= target

    def measure(self, probes: int, n_queries: int = _FIRST_QUERIES) -> RecallPoint:
        """Run the first n queries, unless they were run.

        Raises:
            DatabaseError: the planner does not use the index, even if sequential scans are off.
        """
        n_queries, found = min(n_queries, len(self.exact.queries)), self._found.setdefault(probes, [])
        if self.exact.share < 1 and n_queries > _FIRST_QUERIES and probes < max(self._found):
            # of a sample, the widest search says which rows are among the true ten
            self.measure(max(self._found), n_queries)
        if len(found) < n_queries:
            with self.table.database.get_connection() as connection:
                set_probes(connection, probes)
                connection.execute(sa.text("SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = on"))
                with raw_cursor(connection) as cursor:
                    self._check_plan(cursor)
                    for query in range(len(found), n_queries):
                        if found and query % 2 == 0 and self.is_late:
                            break  # with as many queries of one kind as of the other
                        found.append(self._find_complete(query, probes) or self._search(cursor, query, probes))
        return self.judge(probes)

    def _find_complete(self, query: int, probes: int) -> Found | None:
        """What fewer probes found, if that is all: more probes visit the same lists and others, and find it again.

        Not for the first queries, whose times count, nor of a sample, where it is not known what is all.
        """
        if query < _FIRST_QUERIES or self.exact.share < 1:
            return None
        by_fewer = (found[query] for fewer, found in self._found.items() if fewer < probes and query < len(found))
        return next((found for found in by_fewer if len(set(self.exact.judge(query, found, {}))) == 1), None)

    def _search(self, cursor: Any, query: int, probes: int) -> Found:
        self.run.check_stop()
        started = time.perf_counter()
        cursor.execute(self._statement, (self._literals[query],))
        found = dict(cursor.fetchall())
        if query < _FIRST_QUERIES:
            self._times.setdefault(probes, []).append(1000 * (time.perf_counter() - started))
        self.n_done += 1
        self.run.report(Progress(STEP, self.n_done, 0, unit="searches", note=f"{probes:,} probes"))
        return found

    def judge(self, probes: int) -> RecallPoint:
        """What was measured at a number of probes."""
        judged = np.array([self.exact.judge(*each, self._others(each[0])) for each in enumerate(self._found[probes])])
        kinds = of_rows, of_synthetic = [estimate_share(*judged[first::2].T) for first in (0, 1)]
        recall, low, high = (min(getattr(kind, name) for kind in kinds) for name in ("share", "low", "high"))
        if recall == 1 and probes >= self.exact_from:
            low = high = 1.0
        median, p99 = np.percentile(self._times[probes], [50, 99]).tolist()
        n_queries = len(judged)
        return RecallPoint(probes, recall, low, high, n_queries, of_rows.share, of_synthetic.share, median, p99)

    def _others(self, query: int) -> Found:
        if self.exact.share >= 1:
            return {}  # the exact neighbors are all known
        return {
            song_id: distance
            for found in self._found.values()
            for song_id, distance in (found[query] if query < len(found) else {}).items()
        }

    @cached_property
    def _literals(self) -> list[str]:
        return [to_literal(vector) for vector in self.exact.queries]

    @property
    def _statement(self) -> str:
        distance = "embedding <=> %s AS distance"
        return f"SELECT song_id, {distance} FROM {self.table.name} ORDER BY distance LIMIT {NEIGHBORS}"

    def _check_plan(self, cursor: Any) -> None:
        if not uses_index(cursor, self.table.index_name, self._statement, self._literals[0]):
            raise DatabaseError(
                f"expected the planner to take {self.table.index_name} with enable_seqscan off, it does not: "
                "run `songvec index`, which builds a valid one",
                "index.failed",
            )


def to_literal(vector: Float32Matrix) -> str:
    """A vector as the server reads it; every float32 comes back unchanged."""
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
