"""The IVFFlat index: whether it is to be built, and bringing it up to date.

`sizes` has the arithmetic, `capacity` what the server can give, `build` the build, `recall` the measurement, and
`catalogue` the index as it is.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.cache.shards import ModelCache
from songvec_assets.errors import SettingsError, StoreError, TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import hold_lock, read_fact, write_fact
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.vectors.build import (
    building_name,
    create_index,
    lets_writers_in,
    remove_leftovers,
    swap_names,
)
from songvec_assets.vectors.capacity import Capacity, read_capacity
from songvec_assets.vectors.catalogue import IndexFacts, find_index, find_lists, read_probes, set_probes
from songvec_assets.vectors.recall import DEFAULT_TARGET, RecallReport, measure_recall, read_recall
from songvec_assets.vectors.sizes import BuildEstimate, choose_lists, choose_probes, estimate_build
from songvec_assets.vectors.table import TABLE, TableSpec, count_changes, fact_key, read_changes, table_exists
from songvec_assets.vectors.watch import STEP

__all__ = [
    "IndexFacts",
    "IndexReport",
    "IndexSettings",
    "bring_index_up_to_date",
    "find_index",
    "plan_lists",
    "read_probes",
    "reason_to_build",
    "set_probes",
]

_LISTS_OFF_BY = 0.25
_CHANGED_SHARE = 0.2
_PROBES_GROWN = 1.5


@dataclass(frozen=True)
class IndexSettings:
    """What a person may say about the index.

    Attributes:
        lists: how many; None: the square root of the rows.
        target_recall: the share of the true ten nearest that searches must find.
        memory_bytes: that a build may take on the server; None: half of what is available, as far as it shows.
        rebuild: whether it is to be built even where it fits.
    """

    lists: int | None = None
    target_recall: float = DEFAULT_TARGET
    memory_bytes: int | None = None
    rebuild: bool = False


@dataclass(frozen=True)
class IndexReport:
    """What was decided and done.

    Attributes:
        reason: why it was built, or why not; and what else a person should know.
        built: whether it was.
        index: as it now is.
        seconds: of the build; 0 where there was none.
        recall: as measured last; None where the cache does not hold what is loaded.
        estimate: what a build takes.
    """

    reason: str
    built: bool
    index: IndexFacts
    seconds: float
    recall: RecallReport | None
    estimate: BuildEstimate


def reason_to_build(n_rows: int, lists: int, lists_now: int | None, n_changed: int, exact: bool = False) -> str | None:
    """Why the index should be built now, or None.

    Args:
        n_rows: in the table.
        lists: that fit them.
        lists_now: of the valid index that is there, or None.
        n_changed: rows written or deleted since it was built.
        exact: whether a person set the number of lists; then no other fits.
    """
    if lists_now is None:
        return "there is none"
    if abs(lists - lists_now) > (0 if exact else _LISTS_OFF_BY * lists_now):
        return f"{n_rows:,} rows want {lists:,} lists, it has {lists_now:,}"
    if n_changed > _CHANGED_SHARE * n_rows:
        return f"{n_changed:,} rows changed since it was built, over a fifth of {n_rows:,}"
    return None


def plan_lists(
    n_rows: int, wanted: IndexSettings, lists_now: int | None, capacity: Capacity, spec: TableSpec
) -> tuple[int, str]:
    """How many lists the index is to have, and why not as many as the rows want, if so.

    Raises:
        SettingsError: a person set more than fit into memory.
        DatabaseError: not even one fits.
    """
    lists = wanted.lists or choose_lists(n_rows)
    if lists == lists_now:
        return lists, ""
    fitting, told = capacity.fit_lists(lists, spec.dimensions, spec.vector_type)
    if not told:
        return lists, ""
    if wanted.lists:
        raise SettingsError(
            f"SONGVEC_LISTS: {told}: set {fitting:,} or fewer, or none, or raise SONGVEC_INDEX_MEMORY_MB"
        )
    # memory that was there when it was built, and is not now, makes it no worse
    if lists_now is not None and fitting <= lists_now <= lists:
        return lists_now, ""
    return fitting, f"{told}, so it gets {fitting:,}"


def bring_index_up_to_date(
    database: Database,
    cache: ModelCache,
    spec: TableSpec,
    wanted: IndexSettings = IndexSettings(),
    *,
    table: str = TABLE,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
    check_held: Callable[[], None] | None = None,
) -> IndexReport:
    """Build the index where that is worth it, and measure recall where it was built, or rows changed since.

    Searches use the old index until the new one takes its place, and as many probes as reach the target.

    Args:
        database: where the table is.
        cache: the shards that it was loaded from.
        spec: what it holds.
        wanted: what a person said.
        table: its name.
        progress: told percents of the build, then rows and searches of the measurement.
        stop: ends it, the server's work included.
        check_held: of the lock under which the caller alone works on this table; None: a lock is taken here. Each takes
            a session, and a pooler may have two in all.

    Raises:
        TableMismatchError: the table is missing or empty: an index built on nothing finds nothing later.
        SettingsError: the lists that were set do not fit into memory.
        DatabaseError: the build does not fit, the server refused, or the statement was cancelled.
        StoppedError: `stop` was set.
    """
    stop = stop or StopSignal()

    def tell_waiting() -> None:
        progress(Progress(STEP, 0, 100, unit="%", note="waiting for another run that sees to it"))

    with contextlib.ExitStack() as held:
        check_held = check_held or held.enter_context(
            hold_lock(database, fact_key("index", table), on_wait=tell_waiting, check=stop.check)
        )
        return _Upkeep(database, cache, spec, wanted, table, progress, stop, check_held).run()


@dataclass
class _Upkeep:
    """One call of `bring_index_up_to_date`, under its lock."""

    database: Database
    cache: ModelCache
    spec: TableSpec
    wanted: IndexSettings
    table: str
    progress: ReportProgress
    stop: StopSignal
    check_held: Callable[[], None]
    n_rows: int = 0
    n_changed: int = 0

    def run(self) -> IndexReport:
        """Decide, build, measure."""
        lists_now = self._read_table()
        searched = find_index(self.database) is not None
        capacity = read_capacity(self.database, self.wanted.memory_bytes, searched)
        lists, _ = plan_lists(self.n_rows, self.wanted, lists_now, capacity, self.spec)
        reason = reason_to_build(self.n_rows, lists, lists_now, self.n_changed, exact=self.wanted.lists is not None)
        if reason is None and self.wanted.rebuild:
            reason = "it was asked for"
        if reason is None and lists_now is not None:
            remove_leftovers(self.database, self.table, self.progress, self.stop)
            recall, words, reason = self._look_at_recall(lists_now)
        seconds, estimate = 0.0, self._estimate(lists, capacity)
        if reason is not None:
            started = time.monotonic()
            # what it has now may have fitted into memory once
            lists, told = plan_lists(self.n_rows, self.wanted, None, capacity, self.spec)
            estimate = self._estimate(lists, capacity)
            words = [reason, told, self._build(estimate, capacity)]
            seconds = time.monotonic() - started
            recall, measured = self._measure(lists)
            words.append(measured)
        index = find_index(self.database, self.table)
        assert index is not None
        return IndexReport("; ".join(filter(None, words)), reason is not None, index, seconds, recall, estimate)

    def _estimate(self, lists: int, capacity: Capacity) -> BuildEstimate:
        return estimate_build(
            self.n_rows,
            lists,
            self.spec.dimensions,
            self.spec.vector_type,
            capacity.workers,
            capacity.cores,
            concurrently=lets_writers_in(self.database, self.table),
        )

    def _read_table(self) -> int | None:
        """Count rows and changes; returns the lists of the valid index, or None."""
        with self.database.get_connection() as connection:
            if not table_exists(connection, self.table):
                raise TableMismatchError(f"there is no table {self.table} yet: materialize song_embeddings_table first")
            self.n_rows = int(connection.scalar(text(f"SELECT count(*) FROM {self.table}")) or 0)
            self.n_changed = read_changes(connection, self.table)
            if not self.n_rows:
                raise TableMismatchError(
                    f"table {self.table} is empty: an index built now would find nothing later; load it first"
                )
            return find_lists(connection, self.table)

    def _build(self, estimate: BuildEstimate, capacity: Capacity) -> str:
        """Build and swap, or only swap where a killed run came no further; returns what else is to be told."""
        database, table, lists = self.database, self.table, estimate.lists
        with database.get_connection() as connection:
            begun = read_fact(connection, fact_key("building", table))
            whole = find_lists(connection, table, building_name(table)) == lists
        n_counted = self.n_changed
        taken_over = bool(whole and begun) and n_counted - begun["n_changed"] <= _CHANGED_SHARE * self.n_rows
        remove_leftovers(database, table, self.progress, self.stop, keep_whole=taken_over)
        how = ""
        if taken_over:
            n_counted = begun["n_changed"]
        else:
            capacity.check_disk(estimate)
            with database.get_connection() as connection:
                write_fact(connection, fact_key("building", table), {"n_changed": n_counted})
            how = create_index(database, self.spec, table, estimate, capacity.workers, self.progress, self.stop)

        def record(connection: sa.Connection) -> None:
            # of what was measured of the old index, only that its searches needed so many is worth keeping till then
            probes = max(choose_probes(lists, self.n_rows), min(read_probes(connection, table) or 1, lists))
            facts = {"index": {"n_rows": self.n_rows}, "probes": probes, "recall": None, "building": None}
            for name, value in facts.items():
                write_fact(connection, fact_key(name, table), value)
            # rows that changed while it was built stay counted; others wait for this row, so it is the last
            count_changes(connection, -n_counted, table)

        self.check_held()
        swap_names(database, table, record, self.stop.check)
        if taken_over:
            return "a killed run had built it, and it was put in its place"
        if table == TABLE and not lets_writers_in(database, table):
            waited = "loads waited meanwhile: a pooler in transaction mode takes no build that lets them go on"
            return "; ".join(filter(None, [how, waited]))
        return how

    def _look_at_recall(self, lists: int) -> tuple[RecallReport | None, list[str], str | None]:
        """The recall of the index that is there, measured where that is due; and why it is to be built, if so."""
        kept = f"{lists:,} lists fit {self.n_rows:,} rows, {self.n_changed:,} rows changed since it was built"
        target = self.wanted.target_recall
        with self.database.get_connection() as connection:
            at_build = read_fact(connection, fact_key("index", self.table)) or {}
            last = read_recall(connection, self.table)
        if last is not None and last.target == target and last.holds(self.n_changed):
            return last, [kept, last.describe()], None
        report, told = self._measure(lists, last.probes if last is not None and last.target == target else None)
        if report is None or at_build.get("target") != target or not self.n_changed:
            return report, [kept, told], None
        if report.probes > _PROBES_GROWN * at_build["probes"] + 1:
            then = f"{at_build['probes']:,} when it was built; {self.n_changed:,} rows changed since"
            return report, [], f"a recall of {target:.0%} takes {report.probes:,} probes, {then}"
        return report, [kept, told], None

    def _measure(self, lists: int, kept: int | None = None) -> tuple[RecallReport | None, str]:
        """Measure and record; returns what is to be told. A cache that is not at hand costs nobody the index."""
        database, table, target = self.database, self.table, self.wanted.target_recall
        try:
            report = measure_recall(
                database, self.cache, self.spec, lists, target, table=table, kept=kept, progress=self.progress,
                stop=self.stop,
            )  # fmt: skip
        except StoreError as error:
            return None, f"recall was not measured: {error}"
        with database.get_connection() as connection:
            write_fact(connection, fact_key("recall", table), report.to_fact())
            write_fact(connection, fact_key("probes", table), report.probes)
            fact = read_fact(connection, fact_key("index", table)) or {}
            if fact.get("target") != target:  # the first since the build: decay is held against it
                write_fact(connection, fact_key("index", table), fact | {"target": target, "probes": report.probes})
        return report, report.describe()
