"""The IVFFlat index: how many lists, how much memory, when to build, and the build itself.

Sizes are bytes. Formulas: pgvector 0.8.5's ivfbuild.c, k-means with Elkan's bounds (read and measured 2026-11).
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres.engine import Database, error_border
from songvec_assets.postgres.schema import hold_lock, read_fact, write_fact
from songvec_assets.progress import Progress, ReportProgress, ignore_progress
from songvec_assets.vectors.table import CHANGES_FACT, TABLE, TableSpec

INDEX = "embeddings_ivfflat_idx"
_NEW_INDEX = f"{INDEX}_new"
_FACT = "index"
_LISTS_OFF_BY = 0.25
_CHANGED_SHARE = 0.2
_SMALL_TABLE_ROWS = 10_000
_MIN_MAINTENANCE_BYTES = 64 << 20


@dataclass(frozen=True)
class IndexFacts:
    """The index as the server has it.

    Attributes:
        n_rows: of the table when it was built.
        lists: of the index.
        probes: lists that a search visits.
        n_bytes: its size.
    """

    n_rows: int
    lists: int
    probes: int
    n_bytes: int


@dataclass(frozen=True)
class IndexReport:
    """What was decided and done.

    Attributes:
        reason: why it was built, or why not.
        built: whether it was.
        index: as it now is.
        seconds: of the build; 0 where there was none.
    """

    reason: str
    built: bool
    index: IndexFacts
    seconds: float


def choose_lists(n_rows: int, lists: int | None = None) -> int:
    """The setting, or the square root of the rows: at equal recall it beat rows/1000 on clustered data."""
    return lists or max(1, round(math.sqrt(n_rows)))


def choose_probes(lists: int, n_rows: int) -> int:
    """Lists that a search visits: the square root of all; all of a small table's, which costs nothing there."""
    return lists if n_rows <= _SMALL_TABLE_ROWS else max(1, round(math.sqrt(lists)))


def kmeans_bytes(lists: int, dimensions: int) -> int:
    """Memory that a build needs in maintenance_work_mem; less is a hard error of the server."""
    samples = max(10_000, 50 * lists)
    vector = 4 * dimensions + 8
    return samples * vector + 3 * lists * vector + 4 * samples * lists + 4 * lists**2 + 8 * samples


def reason_to_build(
    n_rows: int, lists: int, built: dict[str, int] | None, n_changed: int, exact: bool = False
) -> str | None:
    """Why the index should be built now, or None.

    Args:
        n_rows: in the table.
        lists: that fit them.
        built: n_rows and lists of the valid index that is there, or None.
        n_changed: rows written or deleted since it was built.
        exact: whether a person set the number of lists; then no other fits.
    """
    if built is None:
        return "there is none"
    if abs(lists - built["lists"]) > (0 if exact else _LISTS_OFF_BY * built["lists"]):
        return f"{n_rows:,} rows want {lists:,} lists, it has {built['lists']:,}"
    if n_changed > _CHANGED_SHARE * n_rows:
        return f"{n_changed:,} rows changed since it was built, over a fifth of {n_rows:,}"
    return None


def build_index(
    database: Database, spec: TableSpec, lists: int | None = None, progress: ReportProgress = ignore_progress
) -> IndexReport:
    """Build the index where that is worth it; searches use the old one until the new one takes its place.

    Args:
        database: where the table is.
        spec: what the table holds.
        lists: the setting, or None for the square root of the rows.
        progress: told the server's own figures, in percent.

    Raises:
        TableMismatchError: the table is missing or empty: an index built on nothing finds nothing later.
        DatabaseError: the server refused or the statement was cancelled; no leftovers stay.
    """

    def nothing() -> None:
        return None

    with hold_lock(database, "index", on_wait=nothing, check=nothing):
        with database.get_connection() as connection:
            if connection.scalar(text("SELECT to_regclass(:name) IS NULL"), {"name": TABLE}):
                raise TableMismatchError(f"there is no table {TABLE} yet: materialize song_embeddings_table first")
            n_rows = int(connection.scalar(text("SELECT count(*) FROM song_embeddings")) or 0)
            n_changed = int(read_fact(connection, CHANGES_FACT) or 0)
            built = find_valid_index(connection)
        if not n_rows:
            raise TableMismatchError(
                f"table {TABLE} is empty: an index built now would find nothing later; load it first"
            )
        wanted = choose_lists(n_rows, lists)
        reason = reason_to_build(n_rows, wanted, built, n_changed, exact=lists is not None)
        started = time.monotonic()
        if reason is not None:
            _build(database, spec, wanted, progress)
            with database.get_connection() as connection:
                _swap(connection)
                write_fact(connection, _FACT, {"n_rows": n_rows, "lists": wanted})
                write_fact(connection, CHANGES_FACT, 0)
                write_fact(connection, "probes", choose_probes(wanted, n_rows))
        index = find_index(database)
        assert index is not None
        seconds = time.monotonic() - started if reason else 0.0
        kept = f"{index.lists:,} lists fit {n_rows:,} rows, {n_changed:,} rows changed since it was built"
        return IndexReport(reason or kept, reason is not None, index, seconds)


def find_index(database: Database) -> IndexFacts | None:
    """The valid index, or None."""
    with database.get_connection() as connection:
        built = find_valid_index(connection)
        if built is None:
            return None
        n_bytes = int(connection.scalar(text("SELECT pg_relation_size(to_regclass(:name))"), {"name": INDEX}) or 0)
        probes = read_probes(connection) or choose_probes(built["lists"], built["n_rows"])
        return IndexFacts(built["n_rows"], built["lists"], probes, n_bytes)


def read_probes(connection: sa.Connection) -> int | None:
    """The lists that searches visit, as stored with the index; None before there is one."""
    probes = read_fact(connection, "probes")
    return None if probes is None else int(probes)


def set_probes(connection: sa.Connection, probes: int | None) -> None:
    """Let this transaction's searches visit so many lists; None leaves the server's default."""
    if probes is not None:
        connection.execute(text("SELECT set_config('ivfflat.probes', :probes, true)"), {"probes": str(probes)})


def find_valid_index(connection: sa.Connection) -> dict[str, int] | None:
    """Lists and rows at the build of the index that is there, whole and ours; else None."""
    row = connection.execute(
        text("""
            SELECT c.reloptions
            FROM pg_index i
            JOIN pg_class c ON c.oid = i.indexrelid
            JOIN pg_am a ON a.oid = c.relam
            JOIN pg_opclass o ON o.oid = i.indclass[0]
            WHERE i.indexrelid = to_regclass(:index) AND i.indrelid = to_regclass(:table) AND i.indisvalid
              AND a.amname = 'ivfflat' AND o.opcname IN ('vector_cosine_ops', 'halfvec_cosine_ops')
        """),
        {"index": INDEX, "table": TABLE},
    ).one_or_none()
    if row is None:
        return None
    options = dict(option.split("=") for option in row.reloptions or [])
    fact = read_fact(connection, _FACT) or {}
    return {"lists": int(options.get("lists", 100)), "n_rows": int(fact.get("n_rows", 0))}


def _build(database: Database, spec: TableSpec, lists: int, progress: ReportProgress) -> None:
    needed = max(_MIN_MAINTENANCE_BYTES, math.ceil(1.05 * kmeans_bytes(lists, spec.dimensions)))
    with database.get_autocommit() as connection:
        connection.execute(text("DROP INDEX CONCURRENTLY IF EXISTS embeddings_ivfflat_idx_new"))
        for name, value in {
            "maintenance_work_mem": f"{math.ceil(needed / 1024)}kB",
            # the role's own timeouts are made for queries, not for hours of building
            "statement_timeout": "0",
            "lock_timeout": "0",
            "idle_in_transaction_session_timeout": "0",
        }.items():
            connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
        pid = int(connection.scalar(text("SELECT pg_backend_pid()")) or 0)
        try:
            with _watched(database, pid, progress):
                connection.execute(
                    text(
                        f"CREATE INDEX CONCURRENTLY {_NEW_INDEX} ON {TABLE} "
                        f"USING ivfflat (embedding {spec.vector_type}_cosine_ops) WITH (lists = {lists:d})"
                    )
                )
        except sa.exc.DBAPIError:
            _drop_leftover(database)
            raise


def _drop_leftover(database: Database) -> None:
    """Remove the invalid index that a failed CONCURRENTLY leaves; where the server is gone, the next build does it."""
    try:
        with database.get_autocommit() as connection:
            connection.execute(text("DROP INDEX CONCURRENTLY IF EXISTS embeddings_ivfflat_idx_new"))
    except DatabaseError:
        return


def _swap(connection: sa.Connection) -> None:
    valid = connection.scalar(
        text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)"), {"name": _NEW_INDEX}
    )
    if not valid:
        raise DatabaseError(f"the build of {_NEW_INDEX} ended without a valid index: materialize ivfflat_index again")
    connection.execute(text("DROP INDEX IF EXISTS embeddings_ivfflat_idx"))
    connection.execute(text("ALTER INDEX embeddings_ivfflat_idx_new RENAME TO embeddings_ivfflat_idx"))


@contextmanager
def _watched(database: Database, pid: int, progress: ReportProgress) -> Iterator[None]:
    """Tell the server's progress, every two seconds, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        with error_border(), database.get_engine("web").connect() as connection:
            while not ended.wait(2.0):
                _tell_progress(connection, pid, progress)

    watcher = threading.Thread(target=watch, daemon=True, name="songvec-index-progress")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=5)


def _tell_progress(connection: sa.Connection, pid: int, progress: ReportProgress) -> None:
    row = connection.execute(
        text("SELECT phase, tuples_done, tuples_total FROM pg_stat_progress_create_index WHERE pid = :pid"),
        {"pid": pid},
    ).one_or_none()
    connection.rollback()
    if row is not None:
        percent = round(100 * row.tuples_done / row.tuples_total) if row.tuples_total else 0
        progress(Progress("build index", percent, 100, unit="%", note=row.phase))
