"""Building an index while another one serves: the statement, its progress, the swap of names, and leftovers.

Searches never wait. Writers wait only for a build inside a transaction: of a table that nobody uses yet, or behind a
pooler that gives no session. When to add here: what happens between CREATE INDEX and the name that searches use. Keep
out: whether to build (`build_plan`), and with what memory (`sizing`).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.messages import lacks_shared_memory
from songvec_assets.postgres.short_lock import is_lock_timeout, retry_for_lock, run_with_short_lock
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.vectors.index.bits import drop_unused
from songvec_assets.vectors.index.sizing import BuildEstimate
from songvec_assets.vectors.table import VectorTable

STEP = "build index"
_POLL_S = 1.0
_DROP_LOCK_TIMEOUT = "5s"
_DROP_PATIENCE_S = 600.0
_REPLACED_PATIENCE_S = 30.0


def _report(run: RunContext, note: str, is_trouble: bool = False) -> None:
    run.report(Progress(STEP, 0, 100, unit="%", note=note, is_trouble=is_trouble))


def lets_writers_in(table: VectorTable) -> bool:
    """Whether the build is CONCURRENTLY, which is a fourth slower and not possible in a transaction."""
    return table.is_serving and table.database.has_sessions


def create_index(
    table: VectorTable, definition: str, estimate: BuildEstimate, workers: int, run: RunContext = SILENT
) -> str:
    """Build the index under its building name.

    Args:
        definition: of the index, from USING on.
        estimate: of the build; says how much memory it is given.
        workers: parallel processes it may take.
        run: notified of the server's progress; a stop cancels the server's work.

    Returns:
        A remark on how it was built; usually empty.

    Raises:
        DatabaseError: the server refused, or the statement was cancelled. Leftovers are removed; if a transaction still
            uses them, by the next build. If only shared memory for the workers is missing, it is built without them.
        StoppedError: it was stopped.
    """
    concurrently = lets_writers_in(table)
    settings = {
        "maintenance_work_mem": f"{-(-estimate.memory_bytes // 1024)}kB",
        "max_parallel_maintenance_workers": str(workers),
    }
    statement = (
        f"CREATE INDEX {'CONCURRENTLY ' if concurrently else ''}{table.building_index} ON {table.name} {definition}"
    )
    _report(run, f"estimated: {estimate.describe()}")
    try:
        with _session(table.database, concurrently, settings) as connection:
            pid = int(connection.scalar(text("SELECT pg_backend_pid()")) or 0)
            with _watching(table.database, pid, run):
                connection.execute(text(statement))
    except (DatabaseError, sa.exc.DBAPIError) as error:
        # if the server went down, or a transaction holds a lock, the next build drops it
        with contextlib.suppress(DatabaseError):
            drop_index(table, table.building_index, patience_s=0)
        run.check_stop()
        if not workers or not lacks_shared_memory(error):
            raise
        note = (
            "the server's /dev/shm is too small for parallel workers, so it is built without them, which takes longer"
        )
        _report(run, note, is_trouble=True)
        create_index(table, definition, estimate, 0, run)
        return note
    run.report(Progress(STEP, 100, 100, unit="%"))
    return ""


@contextlib.contextmanager
def _session(database: Database, concurrently: bool, settings: dict[str, str]) -> Iterator[sa.Connection]:
    if concurrently:
        with database.get_autocommit(**settings) as connection:
            yield connection
        return
    with database.get_connection() as connection:
        for name, value in settings.items():
            connection.execute(text("SELECT set_config(:name, :value, true)"), {"name": name, "value": value})
        yield connection


@contextlib.contextmanager
def _watching(database: Database, pid: int, run: RunContext) -> Iterator[None]:
    """Report the server's progress, and cancel its work if the run is stopped, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            if run.stop.is_set():
                database.cancel()
            # the build goes on, even if its progress cannot be read
            with contextlib.suppress(DatabaseError), database.get_connection("web") as connection:
                row = connection.execute(
                    text("""
                        SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total
                        FROM pg_stat_progress_create_index WHERE pid = :pid
                    """),
                    {"pid": pid},
                ).one_or_none()
                if row is not None:
                    run.report(read_progress(row))

    watcher = threading.Thread(target=watch, daemon=True, name="songvec-index-progress")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=5)


def read_progress(row: Any) -> Progress:
    """The progress of a build's current phase, in rows or blocks if the phase counts either.

    Args:
        row: of `pg_stat_progress_create_index`. Counters keep their values in phases that do not use them, so only one
            that has not reached its total counts; rows are preferred to blocks.
    """
    counters = {"rows": (row.tuples_done, row.tuples_total), "blocks": (row.blocks_done, row.blocks_total)}
    for unit, (done, total) in counters.items():
        if done < total:
            return Progress(STEP, done, total, unit=unit, note=row.phase)
    return Progress(STEP, 0, 0, unit="rows", note=row.phase)


def swap_names(table: VectorTable, record: Callable[[sa.Connection], None], run: RunContext = SILENT) -> None:
    """Give the new index the name of the serving one, and drop that.

    Searches wait neither for the renaming of an index nor for DROP INDEX CONCURRENTLY.

    Args:
        record: called in the transaction that renames.
        run: a stop ends the wait while another session holds a lock.

    Raises:
        DatabaseError: the index is not valid, or another session held its lock for ten minutes.
    """

    def swap(connection: sa.Connection) -> None:
        if not connection.scalar(
            text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)"),
            {"name": table.building_index},
        ):
            raise DatabaseError(
                f"the build of {table.building_index} ended without a valid index: run `songvec index` again",
                "index.failed",
            )
        connection.execute(text(f"ALTER INDEX IF EXISTS {table.index_name} RENAME TO {table.replaced_index}"))
        connection.execute(text(f"ALTER INDEX {table.building_index} RENAME TO {table.index_name}"))
        record(connection)

    run_with_short_lock(table.database, swap, run.check_stop)
    try:
        drop_index(table, table.replaced_index, run, _REPLACED_PATIENCE_S)
    except DatabaseError as error:
        if not is_lock_timeout(error):
            raise
        # no search uses it any more, but a transaction that did has not ended; the next run drops it
    with table.database.get_connection() as connection:
        drop_unused(connection)


def drop_index(table: VectorTable, name: str, run: RunContext = SILENT, patience_s: float = _DROP_PATIENCE_S) -> None:
    """Drop an index of a table, if it exists; searches go on meanwhile.

    Raises:
        DatabaseError: another session held a lock on it until the patience ended.
    """
    if not lets_writers_in(table):

        def drop(connection: sa.Connection) -> None:
            connection.execute(text(f"DROP INDEX IF EXISTS {name}"))

        run_with_short_lock(table.database, drop, run.check_stop, patience_s)
        return

    def drop_concurrently() -> None:
        with table.database.get_autocommit(lock_timeout=_DROP_LOCK_TIMEOUT) as connection:
            connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {name}"))

    retry_for_lock(drop_concurrently, run.check_stop, patience_s)


def remove_leftovers(table: VectorTable, run: RunContext, keep_whole: bool = False) -> None:
    """Drop what interrupted builds left; a build that the server still runs for a killed client is cancelled first.

    Args:
        run: notified of the waiting; a stop ends it.
        keep_whole: whether a valid index under the building name is kept, to be used.
    """
    _end_orphans(table, run)
    with table.database.get_connection() as connection:
        names = connection.scalars(
            text("""
                SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indrelid = to_regclass(:table) AND starts_with(c.relname, :index) AND c.relname <> :index
                  AND (NOT i.indisvalid OR c.relname = :replaced OR c.relname = :building AND NOT :keep_whole)
                  AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index p
                                  WHERE p.datname = current_database() AND p.index_relid = i.indexrelid)
            """),
            {
                "table": table.name,
                "index": table.index_name,
                "replaced": table.replaced_index,
                "building": table.building_index,
                "keep_whole": keep_whole,
            },
        ).all()
    for name in names:
        _report(run, f"dropping {name}, left by an interrupted build")
        drop_index(table, name, run)
    with table.database.get_connection() as connection:
        drop_unused(connection)


def _end_orphans(table: VectorTable, run: RunContext) -> None:
    """Cancel builds under our building name: this run holds the lock now, so theirs has ended."""
    while True:
        with table.database.get_connection() as connection:
            n_orphans = connection.scalar(
                text("""
                    SELECT count(pg_cancel_backend(p.pid))
                    FROM pg_stat_progress_create_index p JOIN pg_stat_activity a USING (pid)
                    WHERE p.datname = current_database()
                      AND p.relid = to_regclass(:table) AND strpos(a.query, ' ' || :building || ' ') > 0
                """),
                {"table": table.name, "building": table.building_index},
            )
        if not n_orphans:
            return
        _report(run, "ending a build whose run was killed")
        run.check_stop()
        time.sleep(_POLL_S)
