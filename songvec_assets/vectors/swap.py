"""From the cache to what searches find: under the index if little changed, else through a staging table.

Searches see the old rows or the new ones, never a mixture: a range is one transaction, a swap another short one. When
to add here: another reason to stage or to refuse a swap. Keep out: what people added to a table (`postgres/relations`)
and how two tables compare (`index/audit`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import sqlalchemy as sa

from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres import locks, relations
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.short_lock import run_with_short_lock
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors import load
from songvec_assets.vectors.index.audit import Comparison, QualityChange, compare_tables
from songvec_assets.vectors.index.build_plan import CHANGED_SHARE, IndexSettings
from songvec_assets.vectors.index.preflight import check_attachments, check_target, find_attachments
from songvec_assets.vectors.index.upkeep import IndexReport, bring_index_up_to_date
from songvec_assets.vectors.ledger import LedgerEntry
from songvec_assets.vectors.plan import LoadPlan, LoadSource, check_missing, plan_load, read_loadable
from songvec_assets.vectors.spec import PREVIOUS, SERVING, STAGING, TableSpec
from songvec_assets.vectors.table import VectorTable

LOCK = "publish"  # as earlier releases call it, which may run at the same time
"""Held by each run that loads, stages, swaps or drops: one at a time."""
STAGED_FROM_ROWS = 20_000
"""Fewer rows are loaded in seconds, even under the index."""


@dataclass(frozen=True)
class WantedTable:
    """What searches are to find.

    Attributes:
        spec: what the table is to hold.
        index: how a staging table is indexed.
        may_swap: whether another model, size or type may replace what serves now.
        staged_from_rows: up to this number of changed rows, an indexed table is changed and not replaced.
        judge: compares both tables before a swap, on labelled queries; None: there are none.
    """

    spec: TableSpec
    index: IndexSettings = field(default_factory=IndexSettings)
    may_swap: bool = False
    staged_from_rows: int = STAGED_FROM_ROWS
    judge: Callable[[], QualityChange] | None = None


@dataclass(frozen=True)
class Target:
    """Where the rows go.

    Attributes:
        table: the serving table, or the staging table.
        reason: why there.
        keep: whether what serves now is kept as the previous table.
    """

    table: VectorTable
    reason: str
    keep: bool = False


@dataclass(frozen=True)
class LoadReport:
    """What was decided and done.

    Attributes:
        loads: one per range.
        n_unmanaged: rows of the serving table in ranges that were never loaded: somebody else wrote them.
        index, comparison: of the table that was swapped in; None: none was.
    """

    target: Target
    loads: list[load.RangeLoad]
    n_unmanaged: int = 0
    index: IndexReport | None = None
    comparison: Comparison | None = None


def check_loadable(database: Database, wanted: WantedTable, models: frozenset[str] | None = None) -> VectorTable:
    """Before anything is paid for, refuse what could not be loaded afterwards; see also `index/preflight`.

    Args:
        models: of the ranges in the serving table; None: not known.

    Returns:
        Where the rows are to go: the serving table, or the staging table for a swap.

    Raises:
        TableMismatchError: the serving table holds something else and may not be swapped, or something is in the way.
    """
    serving, staging, previous = (VectorTable(database, name) for name in (SERVING, STAGING, PREVIOUS))
    # if a swap is allowed, a table that differs is replaced, even if it could be loaded over
    if not wanted.may_swap or serving.spec in (None, wanted.spec):
        try:
            serving.check(wanted.spec, models)
            return serving
        except TableMismatchError:
            if not wanted.may_swap:
                raise
    with database.get_connection() as connection:
        if previous.exists(connection):
            raise TableMismatchError(
                f"table {PREVIOUS} still holds {previous.read_spec(connection)} from an earlier swap: `songvec swap "
                "--rollback` lets it serve again, `songvec swap --drop-old` drops it; then swap",
                "table.swap-blocked",
            )
        staged = staging.read_spec(connection)
        if staging.exists(connection) and staged != wanted.spec:
            raise TableMismatchError(
                f"table {STAGING} holds {staged}, which never served, expected {wanted.spec} or none: finish it with "
                "its settings, or drop it with `songvec swap --drop-old`; then swap",
                "table.swap-blocked",
            )
        check_attachments(connection, serving)
    return staging


def bring_table_up_to_date(
    database: Database, source: LoadSource, wanted: WantedTable, run: RunContext = SILENT
) -> LoadReport:
    """Make the serving table equal the cache.

    Whether a staging table may replace the serving one is checked before it is built, once it is complete, and in the
    swap's own transaction: a build takes hours, and people and other runs change things meanwhile.

    Args:
        source: the cache and the snapshots.
        wanted: what the table is to hold.
        run: notified of each step; a stop ends it, and the next call goes on from there.

    Raises:
        StoreError: the cache is empty.
        DamagedCacheError: see `upload_cached_embeddings_to_database`; what serves stays as it is.
        TableMismatchError: see `check_loadable`, `check_missing` and `put_in_place`.
    """
    serving, staging = VectorTable(database), VectorTable(database, STAGING)
    with _hold_lock(database, run) as check_held:
        plan = plan_load(serving, source, run)
        target = _choose_target(serving, wanted, plan)
        is_staged, n_unmanaged = target.table == staging, plan.n_unmanaged
        if not is_staged:
            with database.get_connection() as connection:
                if staging.read_spec(connection) == wanted.spec:  # left by a load that was killed
                    check_held()
                    staging.drop(connection)
        else:
            check_missing(serving, source, "the cache", source.ranges(), lambda each: read_loadable(source, each), run)
            check_held()
            plan = plan_load(staging, source, run)
        if is_staged or plan.changed:
            check_target(target.table, wanted.spec, wanted.index, plan.n_rows)
        n_connections = 1 if serving.is_indexed else load.N_CONNECTIONS
        loads = load.upload_cached_embeddings_to_database(
            target.table, source, wanted.spec, run, plan=plan, n_connections=n_connections
        )
        if not is_staged:
            return LoadReport(target, loads, n_unmanaged)
        index = bring_index_up_to_date(staging, source.cache, wanted.spec, wanted.index, run, check_held)
        compared = _read_ledgers(database)
        check_missing(serving, source, STAGING, compared[1], lambda each: set(staging.ledger.read_song_ids(each)), run)
        comparison = compare_tables(database, wanted.judge)
        put_in_place(database, target.keep, compared, check_held, run)
        return LoadReport(target, loads, 0, index, comparison)


def _hold_lock(database: Database, run: RunContext) -> AbstractContextManager[Callable[[], None]]:
    waiting = Progress("load rows", 0, 0, unit="rows", note="waiting for another load or swap to end")
    return locks.hold_lock(database, LOCK, on_wait=lambda: run.report(waiting), check=run.check_stop)


def _choose_target(serving: VectorTable, wanted: WantedTable, plan: LoadPlan) -> Target:
    database, spec = serving.database, wanted.spec
    staging = check_loadable(database, wanted, plan.models)
    if staging != serving:
        served = serving.spec or "the old table"
        return Target(staging, f"{served} serves until {spec} is complete and indexed", keep=True)
    changes, staging = f"{plan.n_changed:,} of {plan.n_rows:,} rows changed", VectorTable(database, STAGING)
    if not serving.is_indexed:
        return Target(serving, f"{changes}, and there is no index yet that they would slow down")
    with database.get_connection() as connection:
        staged = staging.read_spec(connection)
        # if more changed, a new index is due anyway, and a table without an index is loaded five times as fast
        if plan.n_changed <= max(wanted.staged_from_rows, CHANGED_SHARE * plan.n_rows):
            return Target(serving, f"{changes}: few enough to be loaded under the index")
        attachments = find_attachments(connection, serving)
    if plan.n_unmanaged:
        attachments.append(f"{plan.n_unmanaged:,} rows that somebody else wrote there")
    if attachments:
        return Target(serving, f"{changes}, but {', '.join(attachments)} would stay with the old table")
    if staged not in (None, spec):
        return Target(serving, f"{changes}, but the staging table holds {staged}: `songvec swap` finishes or drops it")
    return Target(staging, f"{changes}: loaded into a staging table and swapped in, faster than under the index")


def _read_ledgers(database: Database, connection: sa.Connection | None = None) -> list[dict[SongIdRange, LedgerEntry]]:
    """Of the serving table, and of the staging table."""
    return [VectorTable(database, name).ledger.read(connection) for name in (SERVING, STAGING)]


def put_in_place(
    database: Database,
    keep: bool,
    compared: list[dict[SongIdRange, LedgerEntry]],
    check_held: Callable[[], None],
    run: RunContext,
) -> None:
    """Let the staging table replace the serving one, with its rights, settings, indexes and records.

    Args:
        keep: whether what served is kept as the previous table, or dropped.
        compared: the ledgers of both tables, as read before their songs were compared.
        check_held: raises if LOCK was lost.
        run: ends the wait while another session holds a lock on a table.

    Raises:
        DatabaseError: another session held its lock for ten minutes, or LOCK was lost; the old table still serves.
        TableMismatchError: people added something to the table, or another run loaded one of the two; both tables are
            as they were.
    """
    serving, staging = VectorTable(database), VectorTable(database, STAGING)

    def swap(connection: sa.Connection) -> None:
        connection.execute(sa.text(f"LOCK TABLE {SERVING}, {STAGING} IN ACCESS EXCLUSIVE MODE"))
        check_attachments(connection, serving)
        # millions of song_ids are not compared again while searches wait; equal ledgers mean that nothing changed
        if _read_ledgers(database, connection) != compared:
            raise TableMismatchError(
                f"{SERVING} or {STAGING} was loaded by another run meanwhile: {SERVING} was not replaced. Start the "
                "same command again, which goes on from here",
                "table.swap-blocked",
            )
        with relations.copying_properties(connection, SERVING, STAGING):
            if keep:
                serving.rename_to(connection, PREVIOUS)
            else:
                serving.drop(connection)
            staging.rename_to(connection, SERVING)
        check_held()

    run_with_short_lock(database, swap, run.check_stop)


def roll_back(database: Database, run: RunContext = SILENT) -> TableSpec | None:
    """Make the previous table serve again; the serving table becomes the staging table.

    Returns:
        What serves now; None: another version recorded it, and it cannot be read.

    Raises:
        TableMismatchError: there is no previous table, one is being staged, or see `check_attachments`.
    """
    serving, staging, previous = (VectorTable(database, name) for name in (SERVING, STAGING, PREVIOUS))

    def swap(connection: sa.Connection) -> None:
        if not previous.exists(connection):
            raise TableMismatchError(
                f"there is no table {PREVIOUS} to go back to: it was dropped, or nothing was swapped",
                "table.swap-blocked",
            )
        if staging.exists(connection):
            raise TableMismatchError(
                f"table {STAGING} is in the way: {staging.read_spec(connection)} is being built there. Finish that "
                f"with `songvec swap`, or let its owner run DROP TABLE {STAGING}; then roll back",
                "table.swap-blocked",
            )
        connection.execute(sa.text(f"LOCK TABLE {SERVING}, {PREVIOUS} IN ACCESS EXCLUSIVE MODE"))
        check_attachments(connection, serving)
        with relations.copying_properties(connection, SERVING, PREVIOUS):
            serving.rename_to(connection, STAGING)
            previous.rename_to(connection, SERVING)
        check_held()

    with _hold_lock(database, run) as check_held:
        run_with_short_lock(database, swap, run.check_stop)
    return serving.spec


def drop_others(database: Database, run: RunContext = SILENT) -> list[str]:
    """Drop the previous table and the staging table; returns the names of those that existed."""
    others = [VectorTable(database, name) for name in (STAGING, PREVIOUS)]
    dropped: list[str] = []

    def drop(connection: sa.Connection) -> None:
        dropped[:] = [table.name for table in others if table.exists(connection)]
        for table in others:
            table.drop(connection)
        check_held()

    with _hold_lock(database, run) as check_held:
        run_with_short_lock(database, drop, run.check_stop)
    return dropped
