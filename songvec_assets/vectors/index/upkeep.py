"""The upkeep of an IVFFlat index: whether it is built, of how many lists, and bringing it up to date.

When to add here: another reason to build, or another thing to report about it. Keep out: what a build takes (`sizing`),
how it is done (`build`) and measured (`recall`).
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import SettingsError, TableMismatchError
from songvec_assets.postgres.schema import hold_lock
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.vectors.catalog import BuiltIndex, IndexInfo, choose_probes
from songvec_assets.vectors.index import build
from songvec_assets.vectors.index.recall import DEFAULT_TARGET, RecallReport, measure_and_record, read_recall
from songvec_assets.vectors.index.recall_searches import prepare
from songvec_assets.vectors.index.sizing import BuildEstimate, Capacity, choose_lists, estimate_build, read_capacity
from songvec_assets.vectors.table import TableSpec, VectorTable

CHANGED_SHARE = 0.2
"""If more rows changed, the lists' centers no longer fit them: the index is built again."""
_LISTS_OFF_BY = 0.25
"""Lists grow as the square root of the rows: a quarter more are due once the rows have grown by half."""
_PROBES_GROWN = 1.5
"""Searches take as much longer as they visit more lists; one probe more or less is what a measurement cannot tell."""
_PREPARED_ROWS = 100_000
"""Up to here exact neighbors are found while the index is built: in a long build rows change meanwhile."""


@dataclass(frozen=True)
class IndexSettings:
    """Settings of the index.

    Attributes:
        lists: how many; None: the square root of the rows.
        target_recall: share of the true ten nearest that searches are to find.
        memory_bytes: that a build may take on the server; None: half of what is available, if that can be read.
        rebuild: whether it is to be built even if it fits.
    """

    lists: int | None = None
    target_recall: float = DEFAULT_TARGET
    memory_bytes: int | None = None
    rebuild: bool = False


@dataclass(frozen=True)
class IndexReport:
    """What was decided and done.

    Attributes:
        reason: why it was built, or why not; and remarks.
        built: whether it was.
        index: as it is now.
        seconds: of the build; 0 if there was none.
        recall: as measured last; None: the cache does not hold what is loaded.
        estimate: what a build needs.
    """

    reason: str
    built: bool
    index: IndexInfo
    seconds: float
    recall: RecallReport | None
    estimate: BuildEstimate


def reason_to_build(n_rows: int, lists: int, lists_now: int | None, n_changed: int, exact: bool = False) -> str | None:
    """Why the index should be built now, or None.

    Args:
        n_rows: in the table.
        lists: that suit them.
        lists_now: of the valid index that is there, or None.
        n_changed: rows written or deleted since it was built.
        exact: whether the number of lists was set: then only that number fits.
    """
    if lists_now is None:
        return "there is none"
    if abs(lists - lists_now) > (0 if exact else _LISTS_OFF_BY * lists_now):
        return f"{n_rows:,} rows want {lists:,} lists, it has {lists_now:,}"
    if n_changed > CHANGED_SHARE * n_rows:
        return f"{n_changed:,} rows changed since it was built, over a fifth of {n_rows:,}"
    return None


def plan_lists(
    n_rows: int, wanted: IndexSettings, lists_now: int | None, capacity: Capacity, spec: TableSpec
) -> tuple[int, str]:
    """How many lists the index is to have; and if the number that suits the rows does not fit, why.

    Raises:
        SettingsError: more lists were set than fit into memory.
        DatabaseError: not even one fits.
    """
    lists = wanted.lists or choose_lists(n_rows)
    if lists == lists_now:
        return lists, ""
    fitting, shortage = capacity.fit_lists(lists, spec.dimensions, spec.vector_type)
    if not shortage:
        return lists, ""
    if wanted.lists:
        raise SettingsError(
            f"SONGVEC_LISTS: {shortage}: set {fitting:,} or fewer, or none, or raise SONGVEC_INDEX_MEMORY_MB",
            "index.no-room",
        )
    # the index stays good, even if there is less memory now than when it was built
    if lists_now is not None and fitting <= lists_now <= lists:
        return lists_now, ""
    return fitting, f"{shortage}, so it gets {fitting:,}"


@dataclass(frozen=True)
class BuildPlan:
    """Whether an index is to be built, and what that needs.

    Attributes:
        n_changed: rows changed since the table's index was built.
        lists_now: of its valid index; None: there is none.
        reason: why it is to be built; None: it is not.
        limit: why it does not get the number of lists that suits the rows; empty: it does.
        capacity: of the server.
        estimate: what a build needs, and its number of lists.
    """

    n_changed: int
    lists_now: int | None
    reason: str | None
    limit: str
    capacity: Capacity
    estimate: BuildEstimate


def plan_build(table: VectorTable, spec: TableSpec, wanted: IndexSettings, n_rows: int, n_changed: int) -> BuildPlan:
    """Decide whether an index is to be built.

    Args:
        table: whose; it need not exist.
        spec: what it holds.
        wanted: the settings.
        n_rows: that it has, or is to have.
        n_changed: of them, since the index was built.

    Raises:
        SettingsError, DatabaseError: see `plan_lists`.
    """
    with table.database.get_connection() as connection:
        lists_now = table.read_lists(connection)
        is_searched = VectorTable(table.database).read_lists(connection) is not None
    capacity = read_capacity(table.database, wanted.memory_bytes, is_searched)
    lists, limit = plan_lists(max(1, n_rows), wanted, lists_now, capacity, spec)
    reason = reason_to_build(n_rows, lists, lists_now, n_changed, exact=wanted.lists is not None)
    if reason is None and wanted.rebuild:
        reason = "a rebuild was requested"
    if reason is not None:
        # what it has now may have fitted into memory once
        lists, limit = plan_lists(max(1, n_rows), wanted, None, capacity, spec)
    estimate = estimate_build(n_rows, lists, spec.dimensions, spec.vector_type, capacity.workers)
    return BuildPlan(n_changed, lists_now, reason, limit, capacity, estimate)


def bring_index_up_to_date(
    table: VectorTable,
    cache: ModelCache,
    spec: TableSpec,
    wanted: IndexSettings = IndexSettings(),
    run: RunContext = SILENT,
    check_held: Callable[[], None] | None = None,
) -> IndexReport:
    """Build the index if that is worth it; measure recall if it was built, or rows changed since.

    Searches use the old index until the new one replaces it, and as many probes as reach the target.

    Args:
        table: to index.
        cache: that it was loaded from.
        spec: what it holds.
        wanted: the settings.
        run: notified of the build's phases, then of rows and searches of the measurement; a stop ends it, the server's
            work included.
        check_held: raises if the caller lost the lock under which it works on this table alone; None: a lock is taken
            here. Each lock needs a session, and a pooler may have only two.

    Raises:
        TableMismatchError: the table is missing or empty: an index built on nothing finds nothing later.
        SettingsError: the number of lists that was set does not fit into memory.
        DatabaseError: the build does not fit, the server refused, or the statement was cancelled.
        StoppedError: it was stopped.
    """

    def report_waiting() -> None:
        run.report(Progress(build.STEP, 0, 100, unit="%", note="waiting for another run that builds or checks it"))

    lock = table.metadata_key("index")
    with contextlib.ExitStack() as held:
        check_held = check_held or held.enter_context(
            hold_lock(table.database, lock, on_wait=report_waiting, check=run.check_stop)
        )
        n_rows, n_changed = _count(table)
        plan = plan_build(table, spec, wanted, n_rows, n_changed)
        recall, words, seconds, is_built = None, [plan.reason], 0.0, plan.reason is not None
        if not is_built:
            build.remove_leftovers(table, run)
            recall, measured, reason = _review_recall(table, cache, wanted.target_recall, run)
            fits = f"{plan.lists_now:,} lists fit {n_rows:,} rows, {n_changed:,} rows changed since it was built"
            words, is_built = [reason or fits, measured], reason is not None
            if is_built:
                plan = plan_build(table, spec, replace(wanted, rebuild=True), n_rows, n_changed)
        if is_built:
            started = time.monotonic()
            ahead = prepare(table, cache, run) if n_rows <= _PREPARED_ROWS else None
            how = _build(table, spec, plan, run, check_held)
            seconds = time.monotonic() - started
            recall, measured = measure_and_record(table, cache, wanted.target_recall, run, ahead=ahead)
            words = [words[0], plan.limit, how, measured]
        index = table.index
        assert index is not None
        return IndexReport("; ".join(filter(None, words)), is_built, index, seconds, recall, plan.estimate)


def _count(table: VectorTable) -> tuple[int, int]:
    """Rows, and rows changed since the index was built."""
    with table.database.get_connection() as connection:
        if not table.exists(connection):
            raise TableMismatchError(
                f"there is no table {table.name} yet: load it first, with `songvec load`", "table.not-loaded"
            )
        n_changed = table.read_changes(connection)
    n_rows = table.count_rows()
    if not n_rows:
        raise TableMismatchError(
            f"table {table.name} is empty: an index built now would find nothing later; load it first",
            "table.not-loaded",
        )
    return n_rows, n_changed


def _build(
    table: VectorTable, spec: TableSpec, plan: BuildPlan, run: RunContext, check_held: Callable[[], None]
) -> str:
    """Build and swap, or only swap if a killed run had finished the build; returns a remark for the report."""
    started, n_rows, lists = time.monotonic(), plan.estimate.n_rows, plan.estimate.lists
    with table.database.get_connection() as connection:
        # recorded when the build began: the number of changed rows at that time
        n_counted = table.read(connection, "building", int)
        is_whole = table.read_lists(connection, table.building_index) == lists
    if not is_whole or n_counted is None or plan.n_changed - n_counted > CHANGED_SHARE * n_rows:
        n_counted = None
    build.remove_leftovers(table, run, keep_whole=n_counted is not None)
    how = "a killed run had built it, and it was swapped in"
    if n_counted is None:
        n_counted = plan.n_changed
        plan.capacity.check_disk(plan.estimate)
        with table.database.get_connection() as connection:
            table.write(connection, "building", n_counted)
        how = build.create_index(table, spec, plan.estimate, plan.capacity.workers, run)
        if table.is_serving and not build.lets_writers_in(table):
            waited = "loads waited meanwhile: a pooler in transaction mode takes no build that lets them go on"
            how = "; ".join(filter(None, [how, waited]))

    def record(connection: sa.Connection) -> None:
        # until recall is measured again, searches use at least as many probes as with the old index
        probes = max(choose_probes(lists, n_rows), min(table.read_probes(connection) or 1, lists))
        built = BuiltIndex(n_rows, seconds=time.monotonic() - started)
        values = {"index": asdict(built), "probes": probes, "recall": None, "building": None}
        for name, value in values.items():
            table.write(connection, name, value)
        # rows that changed during the build stay counted; last, as others wait for the row it locks
        table.count_changes(connection, -n_counted)

    check_held()
    build.swap_names(table, record, run)
    return how


def _review_recall(
    table: VectorTable, cache: ModelCache, target: float, run: RunContext
) -> tuple[RecallReport | None, str, str | None]:
    """The recall of the current index, measured again if due; a sentence about it; and why to build, or None."""
    with table.database.get_connection() as connection:
        built = table.read(connection, "index", BuiltIndex) or BuiltIndex()
        last, n_changed = read_recall(connection, table), table.read_changes(connection)
    same = last if last and last.target == target else None
    if same and same.holds(n_changed):
        return same, same.describe(), None
    report, words = measure_and_record(table, cache, target, run, same.probes if same else None)
    reason, first = None, built.probes if built.target == target and n_changed else None
    if report and first and report.probes > _PROBES_GROWN * first + 1 and not report.is_cut_short:
        then = f"{first:,} when it was built; {n_changed:,} rows changed since"
        reason = f"a recall of {target:.0%} takes {report.probes:,} probes, {then}"
    return report, words, reason
