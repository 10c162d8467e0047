"""The recall of an index, measured: which number of probes reaches the target, and how sure that is.

When to add here: another figure of the report. Keep out: the searches (`recall_searches`), the exact answers
(`neighbors`) and their statistics (`interval`).
"""

from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial

import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import StoreError
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.vectors.index.catalog import SMALL_TABLE_ROWS, BuiltIndex, choose_probes, describe_knobs
from songvec_assets.vectors.index.neighbors import Prepared
from songvec_assets.vectors.index.probes import find_smallest
from songvec_assets.vectors.index.recall_searches import FIRST_QUERIES, STEP, RecallPoint, RecallSearches
from songvec_assets.vectors.table import VectorTable

DEFAULT_TARGET = 0.95
_ENOUGH = 0.99
"""Recall is measured up to here, even if the target is lower: the report shows what more probes would give."""
_UNMEASURED_SHARE = 0.01
_FEWEST_CANDIDATES, _MOST_CANDIDATES = 25, 1600
_WIDER = 8
"""Candidates are chosen over n times the lists of a first guess, so that few neighbors are outside of these lists."""
_FEWEST_EF_SEARCH = 16


@dataclass(frozen=True)
class RecallReport:
    """What was measured.

    Attributes:
        n_rows: of the table.
        n_read: rows that the exact neighbors were sought among; fewer than n_rows: a sample.
        target: recall to reach.
        points: by probes, ascending.
        probes: the smallest that reach the target, within an eighth; all lists if the table is small, or if none do;
            the most that were measured, or as before, if the time was up before any did.
        n_changed: rows changed since the index was built, when this was measured.
        seconds: that it took.
        is_cut_short: whether the time was up: then fewer probes might do, or the interval is wide.
        candidates: that a search by bits puts into exact order; None: the index has no bits.
        drift: of the mean that the bits are taken about, see `bits`; None: there are none.
    """

    n_rows: int
    n_read: int
    target: float
    points: tuple[RecallPoint, ...]
    probes: int
    n_changed: int
    seconds: float
    is_cut_short: bool
    candidates: int | None = None
    drift: float | None = None

    @classmethod
    def of(cls, searches: RecallSearches, target: float, probes: int) -> "RecallReport":
        """All that was measured, with the chosen probes."""
        points = tuple(searches.judge(each) for each in sorted(searches.tried))
        exact, is_late, seconds = searches.exact, searches.is_late, searches.seconds
        n_rows = exact.n_rows - exact.n_missing
        candidates = searches.candidates if searches.kind.has_lists else probes
        measured = n_rows, exact.n_read, target, points, probes, searches.n_changed, seconds, is_late
        return cls(*measured, candidates, searches.drift)

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

        A report that the time left hardly a search for says nothing: the next run measures again.

        Args:
            n_changed: rows changed since the index was built.
        """
        if self.is_cut_short and self.chosen.n_queries < FIRST_QUERIES:
            return False
        return n_changed - self.n_changed <= _UNMEASURED_SHARE * self.n_rows

    def describe(self) -> str:
        """One line: recall, interval and number of queries, and what is in doubt."""
        point, parts = self.chosen, [f"recall {self.recall:.1%} at {describe_knobs(self.probes, self.candidates)}"]
        if point.low == point.high:
            parts[0] += " (exact: all lists are visited)"
        else:
            sample = f" against a sample of {self.n_read:,} rows" if self.n_read < self.n_rows else ""
            parts[0] += f" (95% interval {point.low:.1%} to {point.high:.1%}, {point.n_queries:,} queries{sample})"
        if not self.reached:
            parts.append(f"under the target of {self.target:.0%}")
        elif point.low < self.target:
            parts.append(f"it may be as low as {point.low:.1%}, under the target of {self.target:.0%}")
        if self.is_cut_short:
            parts.append(f"measuring ended at its time limit, after {self.seconds:.0f} s")
        return ", ".join(parts)


def read_recall(connection: sa.Connection, table: VectorTable) -> RecallReport | None:
    """The recall of the current index, as measured last, or None."""
    report = table.read(connection, "recall", RecallReport)
    is_whole = report is not None and any(point.probes == report.probes for point in report.points)
    return report if is_whole else None


def write_recall(connection: sa.Connection, table: VectorTable, report: RecallReport) -> None:
    """Record a measurement, and let searches use the probes and candidates that it chose."""
    table.write(connection, "recall", asdict(report))
    table.write(connection, "probes", report.probes)
    table.write(connection, "candidates", report.candidates)


def measure_recall(
    table: VectorTable,
    cache: ModelCache,
    target: float = DEFAULT_TARGET,
    kept: int | None = None,
    run: RunContext = SILENT,
    ahead: "Future[Prepared] | None" = None,
) -> RecallReport:
    """Measure over the powers of two until recall is beyond doubt, then narrow down the smallest probes that reach it.

    Args:
        cache: the cache that it was loaded from.
        target: recall to reach, for both kinds of queries.
        kept: probes that searches use now; they are chosen again if they reach the target.
        run: notified of the rows, then of the searches; a stop ends it between two batches or searches.
        ahead: see `prepare`.

    Raises:
        StoreError: the cache does not hold what is loaded, so that exact neighbors are not known.
        DatabaseError: the planner does not use the index, even if sequential scans are off.
    """
    searches = RecallSearches.over(table, cache, run, ahead)
    lists, reaches, probes, enough = searches.lists, partial(searches.reaches, target=target), 1, max(target, _ENOUGH)
    if searches.candidates is not None:
        choose_candidates(searches, target)
        enough = target  # more lists give little more, as the candidates are chosen for it
    elif not searches.kind.has_lists:
        probes = _FEWEST_EF_SEARCH
    while searches.measure(probes).recall < enough and probes < lists and not searches.is_late:
        probes = min(2 * probes, lists)
    if searches.exact.n_rows <= SMALL_TABLE_ROWS and searches.kind.has_lists:
        chosen = lists
    elif kept is not None and reaches(min(kept, lists)):
        chosen = min(kept, lists)
    else:
        chosen = find_smallest(reaches, searches.tried, lists)
    # the choice of candidates may have left no time for more than two queries, of which one number of probes finds all
    is_sure = chosen in searches.tried and not (
        searches.kind.is_bits and searches.judge(chosen).n_queries < FIRST_QUERIES
    )
    if searches.is_late and not is_sure:
        # nothing reached the target in time: then searches go on with as many probes as before, if that is more
        with table.database.get_connection() as connection:
            chosen = max(*searches.tried, min(table.read_probes(connection) or 1, lists))
        searches.measure(chosen)
    reaches(chosen)
    report = RecallReport.of(searches, target, chosen)
    run.report(Progress(STEP, searches.n_done, searches.n_done, unit="searches", note=report.describe()))
    return report


def choose_candidates(searches: RecallSearches, target: float) -> None:
    """Take the fewest candidates, of powers of two, that lose no more than half of what recall may lack.

    The other half is left to the lists that are not visited, as is half of the time. What no candidates would find is
    another matter: the most are taken, and the report says that the target is not reached.
    """
    n_rows, wide, before = searches.exact.n_rows, searches.lists, searches.candidates or 0
    limit_s, searches.limit_s = searches.limit_s, (searches.seconds + searches.limit_s) / 2
    if n_rows > SMALL_TABLE_ROWS:
        wide = min(wide, _WIDER * choose_probes(searches.lists, n_rows))
    searches.candidates = _FEWEST_CANDIDATES
    while not searches.reaches(wide, (1 + target) / 2) and searches.candidates < min(n_rows, _MOST_CANDIDATES):
        searches.candidates = max(before, searches.candidates) if searches.is_late else 2 * searches.candidates
        if searches.is_late:
            break
    searches.limit_s = limit_s


def measure_and_record(
    table: VectorTable,
    cache: ModelCache,
    target: float,
    run: RunContext,
    kept: int | None = None,
    ahead: "Future[Prepared] | None" = None,
) -> tuple[RecallReport | None, str]:
    """Measure and record; returns the report and a sentence. If the cache lacks rows, nothing is measured: no error."""
    try:
        report = measure_recall(table, cache, target, kept, run, ahead)
    except StoreError as error:
        return None, f"recall was not measured: {error}"
    with table.database.get_connection() as connection:
        write_recall(connection, table, report)
        built = table.read(connection, "index", BuiltIndex) or BuiltIndex()
        if built.target != target and report.holds(report.n_changed):
            # the first since the build: decay is compared with it
            table.write(connection, "index", asdict(replace(built, target=target, probes=report.probes)))
    return report, report.describe()
