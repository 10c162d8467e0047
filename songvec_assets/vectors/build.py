"""Building an index beside the one that serves: the statement, its progress, the swap of names, and leftovers.

Searches never wait. Writers do not either, but for a build inside a transaction: of a table that nobody uses yet, or
where a pooler gives no session of the server's own.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.brief import is_lock_timeout, run_briefly
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.words import lacks_shared_memory
from songvec_assets.progress import Progress, ReportProgress, StopSignal
from songvec_assets.vectors.sizes import BuildEstimate
from songvec_assets.vectors.table import TABLE, TableSpec, index_name
from songvec_assets.vectors.watch import STEP, BuildProgress, watched

_POLL_S = 1.0
_DROP_LOCK_TIMEOUT = "5s"
_DROP_PATIENCE_S = 600.0
_REPLACED_PATIENCE_S = 30.0


def building_name(table: str) -> str:
    """What an index is called until it takes the serving one's name."""
    return f"{index_name(table)}_building"


def replaced_name(table: str) -> str:
    """What the one that served is called until it is dropped."""
    return f"{index_name(table)}_replaced"


def lets_writers_in(database: Database, table: str) -> bool:
    """Whether the build is CONCURRENTLY: a fourth slower, and not possible in a transaction."""
    return table == TABLE and database.has_sessions


def create_index(
    database: Database,
    spec: TableSpec,
    table: str,
    estimate: BuildEstimate,
    workers: int,
    progress: ReportProgress,
    stop: StopSignal,
) -> str:
    """Build the index under its building name.

    Args:
        database: where the table is.
        spec: what it holds.
        table: its name.
        estimate: of the build: how much memory it is given, and how long its phases are to take.
        workers: parallel processes it may take.
        progress: told percents of the whole build.
        stop: cancels the server's work.

    Returns:
        What a person should know of how it was built; mostly empty.

    Raises:
        DatabaseError: the server refused, or the statement was cancelled. What it left is removed, or is by the next
            build where a transaction holds on to it. Where only shared memory for the workers is missing, it is built
            again without them.
        StoppedError: `stop` was set.
    """
    concurrently = lets_writers_in(database, table)
    settings = {
        "maintenance_work_mem": f"{-(-estimate.memory_bytes // 1024)}kB",
        "max_parallel_maintenance_workers": str(workers),
    }
    statement = (
        f"CREATE INDEX {'CONCURRENTLY ' if concurrently else ''}{building_name(table)} ON {table} "
        f"USING ivfflat (embedding {spec.vector_type}_cosine_ops) WITH (lists = {estimate.lists:d})"
    )
    progress(Progress(STEP, 0, 100, unit="%", note=f"estimated: {estimate.describe()}"))
    try:
        with _session(database, concurrently, settings) as connection:
            pid = int(connection.scalar(text("SELECT pg_backend_pid()")) or 0)
            with watched(database, pid, BuildProgress(estimate, progress), stop):
                connection.execute(text(statement))
    except (DatabaseError, sa.exc.DBAPIError) as error:
        with contextlib.suppress(
            DatabaseError
        ):  # a server that is gone, or a transaction's lock: the next build does it
            drop_index(database, table, building_name(table), patience_s=0)
        stop.check()
        if not workers or not lacks_shared_memory(error):
            raise
        note = (
            "the server's /dev/shm is too small for parallel workers, so it is built without them, which takes longer"
        )
        progress(Progress(STEP, 0, 100, unit="%", note=note, is_trouble=True))
        create_index(database, spec, table, estimate, 0, progress, stop)
        return note
    progress(Progress(STEP, 100, 100, unit="%"))
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


def swap_names(
    database: Database, table: str, record: Callable[[sa.Connection], None], check: Callable[[], None]
) -> None:
    """Let the index that was built take the serving one's name, and drop that.

    Renaming an index needs no lock that a search has to wait for; dropping it CONCURRENTLY does not either.

    Args:
        database: where the table is.
        table: its name.
        record: called in the transaction that renames.
        check: called while another session holds a lock; raises to give up.

    Raises:
        DatabaseError: the index is not valid, or another session held its lock for ten minutes.
    """
    index, building, replaced = index_name(table), building_name(table), replaced_name(table)

    def swap(connection: sa.Connection) -> None:
        if not connection.scalar(
            text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)"), {"name": building}
        ):
            raise DatabaseError(f"the build of {building} ended without a valid index: materialize ivfflat_index again")
        connection.execute(text(f"ALTER INDEX IF EXISTS {index} RENAME TO {replaced}"))
        connection.execute(text(f"ALTER INDEX {building} RENAME TO {index}"))
        record(connection)

    run_briefly(database, swap, check)
    try:
        drop_index(database, table, replaced, check, _REPLACED_PATIENCE_S)
    except DatabaseError as error:
        if not is_lock_timeout(error):
            raise
        # no search takes it any more; a transaction that once did goes on, and the next run drops it


def drop_index(
    database: Database,
    table: str,
    name: str,
    check: Callable[[], None] = lambda: None,
    patience_s: float = _DROP_PATIENCE_S,
) -> None:
    """Drop an index of a table, if it is there; searches go on meanwhile.

    Raises:
        DatabaseError: another session held a lock on it all the time.
    """
    if not lets_writers_in(database, table):

        def drop(connection: sa.Connection) -> None:
            connection.execute(text(f"DROP INDEX IF EXISTS {name}"))

        run_briefly(database, drop, check, patience_s)
        return
    deadline = time.monotonic() + patience_s
    while True:
        check()
        try:
            with database.get_autocommit(lock_timeout=_DROP_LOCK_TIMEOUT) as connection:
                connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {name}"))
                return
        except DatabaseError as error:
            if not is_lock_timeout(error) or time.monotonic() > deadline:
                raise


def remove_leftovers(
    database: Database, table: str, progress: ReportProgress, stop: StopSignal, keep_whole: bool = False
) -> None:
    """Drop what interrupted builds left: ended first, where the server is still at it for a client that is gone.

    Args:
        database: where the table is.
        table: its name.
        progress: told what is waited for.
        stop: ends the waiting.
        keep_whole: whether a valid index under the building name stays, to be used.
    """
    _end_orphans(database, table, progress, stop)
    with database.get_connection() as connection:
        names = connection.scalars(
            text("""
                SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indrelid = to_regclass(:table) AND starts_with(c.relname, :index) AND c.relname <> :index
                  AND (NOT i.indisvalid OR c.relname = :replaced OR c.relname = :building AND NOT :keep_whole)
                  AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index p
                                  WHERE p.datname = current_database() AND p.index_relid = i.indexrelid)
            """),
            {
                "table": table,
                "index": index_name(table),
                "replaced": replaced_name(table),
                "building": building_name(table),
                "keep_whole": keep_whole,
            },
        ).all()
    for name in names:
        progress(Progress(STEP, 0, 100, unit="%", note=f"dropping {name}, left by an interrupted build"))
        drop_index(database, table, name, stop.check)


def _end_orphans(database: Database, table: str, progress: ReportProgress, stop: StopSignal) -> None:
    """Cancel builds under our building name: whoever ordered them had the lock that is ours now, so is gone."""
    while True:
        with database.get_connection() as connection:
            n_orphans = connection.scalar(
                text("""
                    SELECT count(pg_cancel_backend(p.pid))
                    FROM pg_stat_progress_create_index p JOIN pg_stat_activity a USING (pid)
                    WHERE p.datname = current_database()
                      AND p.relid = to_regclass(:table) AND strpos(a.query, ' ' || :building || ' ') > 0
                """),
                {"table": table, "building": building_name(table)},
            )
        if not n_orphans:
            return
        progress(Progress(STEP, 0, 100, unit="%", note="ending a build whose run was killed"))
        stop.check()
        time.sleep(_POLL_S)
