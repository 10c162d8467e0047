"""The upkeep of an index: bringing it up to date, measuring its recall, and what of both is recorded and reported.

When to add here: another thing to report about an index. Keep out: whether it is built (`build_plan`), how that is done
(`build`), and how recall is measured (`recall`).
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.vectors.index import bits, build
from songvec_assets.vectors.index.build_plan import (
    CHANGED_SHARE,
    DEFAULT_SETTINGS,
    BuildPlan,
    IndexSettings,
    plan_build,
    reason_of_drift,
)
from songvec_assets.vectors.index.catalog import BuiltIndex, IndexInfo, StartedBuild, choose_knobs, find_index
from songvec_assets.vectors.index.neighbors import prepare
from songvec_assets.vectors.index.recall import RecallReport, measure_and_record, read_recall
from songvec_assets.vectors.index.sizing import BuildEstimate
from songvec_assets.vectors.spec import TableSpec
from songvec_assets.vectors.table import VectorTable

_PROBES_GROWN = 1.5
"""If recall takes n times the probes of the last build, and one more, which may be chance, the index is built again."""
_PREPARED_ROWS = 100_000
"""Up to this size, exact neighbors are found while the index is built; during a longer build rows would change."""


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


def bring_index_up_to_date(
    table: VectorTable,
    cache: ModelCache,
    spec: TableSpec,
    wanted: IndexSettings = DEFAULT_SETTINGS,
    run: RunContext = SILENT,
    check_held: Callable[[], None] | None = None,
) -> IndexReport:
    """Build the index if that is worth it; measure recall if it was built, or rows changed since.

    Searches use the old index until the new one replaces it, and as many probes as reach the target.

    Args:
        cache: that it was loaded from.
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
        recall, remarks, seconds, is_built = None, [plan.reason], 0.0, plan.reason is not None
        if not is_built:
            build.remove_leftovers(table, run)
            recall, measured, reason = _review_recall(table, cache, wanted.target_recall, run)
            of_lists = f"{plan.lists_now:,} lists fit " if plan.kind.has_lists else ""
            fits = f"{of_lists}{n_rows:,} rows, {n_changed:,} rows changed since it was built"
            remarks, is_built = [reason or fits, measured], reason is not None
            if is_built:
                plan = plan_build(table, spec, replace(wanted, rebuild=True), n_rows, n_changed)
        if is_built:
            started = time.monotonic()
            ahead = prepare(table, cache, run) if n_rows <= _PREPARED_ROWS else None
            how = _build(table, spec, plan, run, check_held)
            seconds = time.monotonic() - started
            recall, measured = measure_and_record(table, cache, wanted.target_recall, run, ahead=ahead)
            remarks = [remarks[0], plan.limit, how, measured]
        index = table.index
        assert index is not None
        return IndexReport("; ".join(filter(None, remarks)), is_built, index, seconds, recall, plan.estimate)


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
    began_at, n_rows, lists = time.monotonic(), plan.estimate.n_rows, plan.estimate.lists
    with table.database.get_connection() as connection:
        started = table.read(connection, "building", StartedBuild)
        found = find_index(connection, table.name, table.building_index)
    is_whole = found is not None and (found.kind, found.lists) == (plan.kind.name, lists)
    if not is_whole or started is None or plan.n_changed - started.n_changed > CHANGED_SHARE * n_rows:
        started = None
    build.remove_leftovers(table, run, keep_whole=started is not None)
    how = "a killed run had built it, and it was swapped in"
    if started is None:
        plan.capacity.check_disk(plan.estimate)
        started = _begin(table, plan)
        definition = plan.kind.define(spec.vector_type, spec.dimensions, lists, started.function or "")
        how = build.create_index(table, definition, plan.estimate, plan.capacity.workers, run)
        if table.is_serving and not build.lets_writers_in(table):
            waited = "loads waited meanwhile: a pooler in transaction mode takes no build that lets them go on"
            how = "; ".join(filter(None, [how, waited]))
    n_counted = started.n_changed

    def record(connection: sa.Connection) -> None:
        probes, candidates = choose_knobs(plan.kind, lists, n_rows)
        if plan.kind.has_lists and plan.lists_now is not None:
            # until recall is measured again, searches use at least as many probes as with the old index
            probes = max(probes, min(table.read_probes(connection) or 1, lists))
        built = BuiltIndex(n_rows, seconds=time.monotonic() - began_at)
        values = {"index": asdict(built), "probes": probes, "candidates": candidates, "recall": None, "building": None}
        for name, value in values.items():
            table.write(connection, name, value)
        # rows that changed during the build stay counted; last, as others wait for the row it locks
        table.count_changes(connection, -n_counted)

    check_held()
    build.swap_names(table, record, run)
    return how


def _begin(table: VectorTable, plan: BuildPlan) -> StartedBuild:
    """Record that a build begins, and make the function that it needs: once recorded, it is not dropped as unused."""
    with table.database.get_connection() as connection:
        mean = bits.read_mean(connection, table.name) if plan.kind.is_bits else None
        started = StartedBuild(plan.n_changed, mean and bits.name_function(mean))
        table.write(connection, "building", asdict(started))
    if mean is not None:
        with table.database.get_connection() as connection:
            bits.create_function(connection, mean)
    return started


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
    report, message = measure_and_record(table, cache, target, run, same.probes if same else None)
    reason, first = None, built.probes if built.target == target and n_changed else None
    if report and first and report.probes > _PROBES_GROWN * first + 1 and not report.is_cut_short:
        then = f"{first:,} when it was built; {n_changed:,} rows changed since"
        reason = f"a recall of {target:.0%} takes {report.probes:,} probes, {then}"
    return report, message, reason or reason_of_drift(report)
