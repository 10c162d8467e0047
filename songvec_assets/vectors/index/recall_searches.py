"""The same searches at several numbers of probes, within a time limit: how much they find and how long they take.

Recall is the share of the true ten nearest rows that a search finds. Searches run on the server by the statement of
`songvec.search`, but always by the index, and find songs that were deleted since, too. Twenty queries decide if a
number of probes is far from the target; near it there are more, until the interval is far from it or narrow, or the
time is up. Times are milliseconds per round trip. When to add here: another figure of the same searches. Keep out: what
follows from it (`recall`).
"""

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import DatabaseError, StoreError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.vectors.index.bits import read_drift
from songvec_assets.vectors.index.catalog import BuiltIndex, choose_knobs, uses_index
from songvec_assets.vectors.index.interval import estimate_share
from songvec_assets.vectors.index.kinds import IVFFLAT, KINDS, MOST_EF_SEARCH, IndexKind
from songvec_assets.vectors.index.neighbors import (
    NEIGHBORS,
    Distances,
    ExactNeighbors,
    LoadedRows,
    Prepared,
    find_exact_neighbors,
    sample_queries,
)
from songvec_assets.vectors.index.probes import NearestSearch
from songvec_assets.vectors.table import VectorTable

STEP = "measure recall"
_MOST_MISSING = 0.01
FIRST_QUERIES, _NARROW, _FAR = 20, 0.015, 1.5
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


@dataclass
class RecallSearches:
    """The same searches at several numbers of probes: `RecallSearches.over(…).measure(8)`.

    Attributes:
        exact: what is searched for, see `sample_queries`, and the true neighbors.
        kind: of the index.
        lists: of the index; of a graph, its greatest `ef_search`.
        exact_from: probes that miss nothing: all lists, if vectors are not rounded to half floats or bits.
        candidates: rows that a search by bits in lists puts into exact order; None for all other kinds.
        drift: of the mean of an index by bits, see `bits`; None for all other kinds.
        n_changed: rows changed since it was built.
        limit_s: for all of it, from `began_at` on; afterwards no further search starts, except two at new probes.
        run: notified of each search; a stop ends them.
        began_at: `time.monotonic()`.
        n_done: searches so far.
    """

    table: VectorTable
    exact: ExactNeighbors
    kind: IndexKind
    lists: int
    exact_from: float
    candidates: int | None
    drift: float | None
    n_changed: int
    limit_s: float
    run: RunContext
    began_at: float
    n_done: int = 0
    _found: dict[tuple[int, int], list[Distances]] = field(default_factory=dict)
    _times: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    @classmethod
    def over(
        cls,
        table: VectorTable,
        cache: ModelCache,
        run: RunContext = SILENT,
        ahead: "Future[Prepared] | None" = None,
    ) -> "RecallSearches":
        """Draw queries and find their exact neighbors, in half of the time.

        Args:
            cache: that it was loaded from.
            run: notified of the rows; a stop ends it.
            ahead: see `prepare`; None: nothing was prepared.

        Raises:
            StoreError: the cache does not hold what is loaded.
        """
        began_at = time.monotonic()
        with table.database.get_connection() as connection:
            found, n_changed = table.find_index(connection), table.read_changes(connection)
            built, spec = table.read(connection, "index", BuiltIndex) or BuiltIndex(), table.read_spec(connection)
            candidates, drift = table.read_candidates(connection), read_drift(connection, table)
        kind, lists = (KINDS[found.kind], found.lists or MOST_EF_SEARCH) if found else (IVFFLAT, 1)
        if kind.is_bits and kind.has_lists:
            candidates = candidates or choose_knobs(kind, lists, built.n_rows)[1]
        else:
            candidates = None
        limit_s = max(_LIMIT_S, _LIMIT_OF_BUILD * built.seconds)
        prepared = ahead.result() if ahead else None
        rows = LoadedRows.of(table, cache)
        if prepared and prepared.rows == rows:
            exact = prepared.exact
        else:
            exact = find_exact_neighbors(rows, sample_queries(rows), run, began_at + limit_s / 2)
        if not exact.n_read or exact.n_missing > _MOST_MISSING * exact.n_rows:
            raise StoreError(
                f"the cache in {cache.storage} holds {exact.n_rows - exact.n_missing:,} of the {exact.n_rows:,} rows "
                f"that the ledger of table {table.name} names, so recall cannot be measured: fill the cache and load "
                "it, then run `songvec index`",
                "cache.missing",
            )
        is_whole = spec and spec.vector_type == "vector" and kind == IVFFLAT
        exact_from = lists if is_whole else math.inf
        return cls(table, exact, kind, lists, exact_from, candidates, drift, n_changed, limit_s, run, began_at)

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
        """The numbers of probes that were measured with these candidates."""
        return {probes for candidates, probes in self._found if candidates == (self.candidates or 0)}

    def _key(self, probes: int) -> tuple[int, int]:
        """What the searches are stored by: candidates, 0 if there are none to choose, and probes."""
        return self.candidates or 0, probes

    def reaches(self, probes: int, target: float) -> bool:
        """Whether n probes reach the target; the number of queries doubles until that is clear.

        False if they were not measured before the time was up.
        """
        if self.is_late and self._key(probes) not in self._found:
            return False
        point = self.measure(probes)
        while not point.is_clear(target) and point.n_queries < len(self.exact.queries) and not self.is_late:
            point = self.measure(probes, 2 * point.n_queries)
        return point.recall >= target

    def measure(self, probes: int, n_queries: int = FIRST_QUERIES) -> RecallPoint:
        """Run the first n queries, unless they were run.

        Raises:
            DatabaseError: the planner does not use the index, even if sequential scans are off.
        """
        self._run_queries(self._key(probes), min(n_queries, len(self.exact.queries)))
        return self.judge(probes)

    def _run_queries(self, key: tuple[int, int], n_queries: int) -> None:
        """Run the first n queries with these candidates and probes, unless they were run."""
        found = self._found.setdefault(key, [])
        if self.exact.share < 1 and n_queries > FIRST_QUERIES and key < max(self._found):
            # of a sample, the widest search says which rows are among the true ten
            self._run_queries(max(self._found), n_queries)
        if len(found) >= n_queries:
            return
        with self.table.database.get_connection() as connection:
            nearest = NearestSearch.read(connection, self.table)
            nearest.set_knobs(connection, key[1])
            connection.execute(sa.text("SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = on"))
            with raw_cursor(connection) as cursor:
                self._check_plan(cursor, nearest, key)
                for query in range(len(found), n_queries):
                    if found and query % 2 == 0 and self.is_late:
                        break  # with as many queries of one kind as of the other
                    found.append(self._find_complete(query, key[1]) or self._search(cursor, nearest, query, key))

    def _find_complete(self, query: int, probes: int) -> Distances | None:
        """What fewer probes found, if that is all: more probes visit the same lists and others, and find it again.

        Not for the first queries, whose times count, nor of a sample, where it is not known what is all; nor by bits:
        further lists have nearer bits, which take the place of candidates.
        """
        if query < FIRST_QUERIES or self.exact.share < 1 or self.kind.is_bits:
            return None
        by_fewer = (found[query] for (_, fewer), found in self._found.items() if fewer < probes and query < len(found))
        return next((found for found in by_fewer if len(set(self.exact.judge(query, found, {}))) == 1), None)

    def _search(self, cursor: Any, nearest: NearestSearch, query: int, key: tuple[int, int]) -> Distances:
        self.run.check_stop()
        parameters = self._parameters(query, key)
        started = time.perf_counter()
        cursor.execute(nearest.statement, parameters)
        found = dict(cursor.fetchall())
        if query < FIRST_QUERIES:
            self._times.setdefault(key, []).append(1000 * (time.perf_counter() - started))
        self.n_done += 1
        self.run.report(Progress(STEP, self.n_done, 0, unit="searches", note=f"{key[1]:,} probes"))
        return found

    def judge(self, probes: int) -> RecallPoint:
        """What was measured at a number of probes."""
        found = self._found[self._key(probes)]
        judged = np.array([self.exact.judge(*each, self._others(each[0])) for each in enumerate(found)])
        kinds = of_rows, of_synthetic = [estimate_share(*judged[first::2].T) for first in (0, 1)]
        recall, low, high = map(min, zip(*kinds, strict=True))
        if recall == 1 and probes >= self.exact_from:
            low = high = 1.0
        median, p99 = np.percentile(self._times[self._key(probes)], [50, 99]).tolist()
        n_queries = len(judged)
        return RecallPoint(probes, recall, low, high, n_queries, of_rows.share, of_synthetic.share, median, p99)

    def _others(self, query: int) -> Distances:
        if self.exact.share >= 1:
            return {}  # the exact neighbors are all known
        return {
            song_id: distance
            for found in self._found.values()
            for song_id, distance in (found[query] if query < len(found) else {}).items()
        }

    def _parameters(self, query: int, key: tuple[int, int]) -> dict[str, Any]:
        candidates = key[0] or (NEIGHBORS if self.kind.has_lists else key[1])
        return {"vector": self.exact.literals[query], "limit": NEIGHBORS, "candidates": max(NEIGHBORS, candidates)}

    def _check_plan(self, cursor: Any, nearest: NearestSearch, key: tuple[int, int]) -> None:
        if not uses_index(cursor, self.table.index_name, nearest.statement, self._parameters(0, key)):
            raise DatabaseError(
                f"expected the planner to take {self.table.index_name} with enable_seqscan off, it does not: "
                "run `songvec index`, which builds a valid one",
                "index.failed",
            )
