"""Schema `songvec`: its migrations, the values in `songvec.settings` (JSON, one row per value), and advisory locks.

When to add here: access to these tables. To change the tables, add a file to `migrations/`, such as `0003_….sql`, which
runs once. Keep out: the meaning of the values, which other modules own.
"""

import contextlib
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from importlib import resources
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, error_border, raw_cursor
from songvec_assets.postgres.holders import TAKE_LOCKS, name_holder

MIN_PGVECTOR = (0, 7, 0)
"""The first pgvector with the halfvec type (released 2024-04)."""

_FIXED = {
    (0, 8, 2): "a buffer overflow in parallel HNSW builds",
    (0, 8, 3): "HNSW indexes damaged by VACUUM",
    (0, 8, 4): "IVFFlat builds that take more than maintenance_work_mem",
}
"""Errors fixed in each version (pgvector's changelog, read 2026-11)."""

_Record = TypeVar("_Record")
_LOCK_POLL_S = 0.5
_NO_SCHEMA = "3F000"

_HAS_SETTINGS = "SELECT to_regclass('songvec.settings') IS NOT NULL"
_READ_VALUE = "SELECT value FROM songvec.settings WHERE key = :key"
_INSERT_VALUE = "INSERT INTO songvec.settings (key, value) VALUES (:key, CAST(:value AS jsonb)) ON CONFLICT"

_VERSION = "schema_version"
# earlier releases recorded no version; the last of them created all of version 1
_HAS_VERSION_1 = """
    SELECT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = to_regclass('songvec.budgets') AND attname = 'reserved_usd'
    )
"""
# DROP EXTENSION … CASCADE drops functions that take a vector, and earlier builds of version 2 lack the second one; from
# version 2 on, migrations can be run again
_LACKS_FUNCTIONS = "SELECT to_regproc('songvec.search') IS NULL OR to_regproc('songvec.nearest_sql') IS NULL"
_MAY_MIGRATE = "SELECT has_schema_privilege('songvec', 'CREATE')"
_MAY_RECORD = """
    SELECT current_setting('transaction_read_only') = 'off' AND has_table_privilege('songvec.settings', 'INSERT')
"""


def read_migrations() -> list[str]:
    """The SQL of each version of schema `songvec`, from version 1 on: the files of `migrations/`, by number."""
    folder = resources.files("songvec_assets.postgres") / "migrations"
    names = sorted(each.name for each in folder.iterdir() if each.name.endswith(".sql"))
    numbers = [int(name[:4]) for name in names]
    assert numbers == list(range(1, len(names) + 1)), f"migrations are numbered from 1 on, got {names}"
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def ensure_schema(database: Database) -> None:
    """Migrate schema `songvec` to the newest version, and create the extension `vector` if it is missing.

    All in one transaction: a failed migration changes nothing. A schema of a release that recorded no version is kept,
    with its rows.

    Raises:
        DatabaseError: a newer release migrated the schema; the extension is not installed, not permitted or too old; or
            the user may not create a schema.
    """
    migrations = read_migrations()
    with database.get_connection() as connection:
        # concurrent first runs would conflict in the system catalog
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("schema")})
        recorded = _read_version(connection)
        version = recorded if recorded is not None else int(bool(connection.scalar(text(_HAS_VERSION_1))))
        if version > len(migrations):
            raise DatabaseError(
                f"this database was migrated by a newer songvec, to version {version} of schema songvec, and this one "
                f"knows version {len(migrations)}: upgrade songvec-assets here. Nothing was changed",
                "database.newer-schema",
            )
        _ensure_extension(connection)
        if version > 1 and connection.scalar(text(_LACKS_FUNCTIONS)):
            version = 1
        if 0 < version < len(migrations) and not connection.scalar(text(_MAY_MIGRATE)):
            raise DatabaseError(
                f"schema songvec has version {version}, expected {len(migrations)}, and this user may not migrate it: "
                "let its owner run `songvec status` once",
                "database.no-right",
            )
        with raw_cursor(connection) as cursor:  # SQL may hold colons
            for migration in migrations[version:]:
                cursor.execute(migration)
        if version < len(migrations):
            write_value(connection, _VERSION, len(migrations))
        elif recorded is None and connection.scalar(text(_MAY_RECORD)):  # a reader may not write
            write_first_value(connection, _VERSION, version)


def _read_version(connection: sa.Connection) -> int | None:
    """The recorded version; None: none is recorded."""
    if not connection.scalar(text(_HAS_SETTINGS)):
        return None
    version = connection.scalar(text(_READ_VALUE), {"key": _VERSION})
    return None if version is None else int(version)


def _ensure_extension(connection: sa.Connection) -> None:
    if _read_pgvector_version(connection) is None:
        if not connection.scalar(text("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'")):
            raise DatabaseError(
                "pgvector is not installed on this Postgres server: install its package there "
                "(see github.com/pgvector/pgvector), or use a server that has it",
                "database.extension",
            )
        try:
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        except sa.exc.ProgrammingError as error:
            if getattr(error.orig, "pgcode", None) == _NO_SCHEMA:  # the message from error_border is more specific
                raise
            raise DatabaseError(
                "the extension `vector` is not in this database and this user may not create it: let a superuser run "
                "CREATE EXTENSION vector; in this database once",
                "database.extension",
            ) from error
    check_pgvector_version(_read_pgvector_version(connection) or "")


def _read_pgvector_version(connection: sa.Connection) -> str | None:
    version: str | None = connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'vector'"))
    return version


_EXTENSION = """
    SELECT quote_ident(n.nspname) AS home, n.nspname = ANY (current_schemas(true)) AS is_searched,
        has_schema_privilege(n.oid, 'USAGE') AS is_usable,
        quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
        coalesce(nullif(current_setting('search_path'), ''), '""') AS path
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
"""


def check_search_path(connection: sa.Connection) -> None:
    """Check that the user's search_path includes the extension's schema.

    Raises:
        DatabaseError: it does not; the message has the statement to run.
    """
    found = connection.execute(text(_EXTENSION)).one_or_none()
    if found is None:
        raise DatabaseError(
            "the extension `vector` is not in this database any more: CREATE EXTENSION vector; in it",
            "database.extension",
        )
    alter = f"ALTER ROLE {found.role} IN DATABASE {found.database} SET search_path ="
    if not found.is_usable:
        raise DatabaseError(
            f"the extension `vector` is in schema {found.home}, which this user may not use: let its owner run GRANT "
            f"USAGE ON SCHEMA {found.home} TO {found.role}",
            "database.extension",
        )
    if not found.is_searched:
        raise DatabaseError(
            f"the extension `vector` is in schema {found.home}, which is not in this user's search_path "
            f"({found.path}): run {alter} {found.path}, {found.home}; and let a pooler connect again",
            "database.extension",
        )


def parse_pgvector_version(installed: str) -> tuple[int, ...] | None:
    """The first three numbers of an extversion, without suffixes of hosts (`0.8.0.google-4`). None: it has none."""
    numbers = re.match(r"v?(\d+(?:\.\d+)*)", installed)
    return tuple(map(int, f"{numbers[1]}.0.0".split(".")[:3])) if numbers else None


def describe_pgvector(installed: str) -> str:
    """Known errors of a version of pgvector; empty if there are none."""
    version = parse_pgvector_version(installed)
    if version is None:
        return f"the version of pgvector, {installed!r}, was not understood: expected one like 0.8.5"
    fixed = [f"{what} ({'.'.join(map(str, since))})" for since, what in _FIXED.items() if version < since]
    if not fixed:
        return ""
    return (
        f"pgvector {installed} has errors that were fixed since: {', '.join(fixed)}. Update the server's package, then "
        "run ALTER EXTENSION vector UPDATE; if a host runs the server, ask for it"
    )


def read_pgvector_caution(database: Database) -> str:
    """Known errors of this database's pgvector; empty if there are none, or no pgvector yet."""
    with database.get_connection() as connection:
        installed = _read_pgvector_version(connection)
    return "" if installed is None else describe_pgvector(installed)


def check_pgvector_version(installed: str) -> None:
    """Raise DatabaseError if pgvector is older than MIN_PGVECTOR."""
    version = parse_pgvector_version(installed)
    if version is not None and version < MIN_PGVECTOR:
        wanted = ".".join(map(str, MIN_PGVECTOR))
        raise DatabaseError(
            f"expected pgvector {wanted} or newer, this database has {installed}: update the server's package, then "
            "run ALTER EXTENSION vector UPDATE;",
            "database.extension",
        )


_with_tables: "weakref.WeakSet[sa.Engine]" = weakref.WeakSet()


def has_tables(connection: sa.Connection) -> bool:
    """Whether this database has the tables of schema `songvec`; once it has, the answer is cached per engine."""
    if connection.engine not in _with_tables:
        if not connection.scalar(text(_HAS_SETTINGS)):
            return False
        _with_tables.add(connection.engine)
    return True


def read_value(connection: sa.Connection, key: str) -> Any:
    """A value of `songvec.settings`, or None."""
    if not has_tables(connection):
        return None
    return connection.scalar(text(_READ_VALUE), {"key": key})


def read_record(connection: sa.Connection, key: str, kind: type[_Record]) -> _Record | None:
    """A value of `songvec.settings` as a number, text, dataclass or list of them.

    None: there is none, or another version wrote it with other fields. Fields that `kind` lacks are ignored.
    """
    value = read_value(connection, key)
    try:
        return None if value is None else msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None


def write_value(connection: sa.Connection, key: str, value: Any) -> None:
    """Set a value of `songvec.settings` within the connection's transaction."""
    statement = f"{_INSERT_VALUE} (key) DO UPDATE SET value = excluded.value"
    connection.execute(text(statement), {"key": key, "value": json.dumps(value)})


def write_first_value(connection: sa.Connection, key: str, value: Any) -> None:
    """Set a value unless there is one; of concurrent writers, the first one wins."""
    connection.execute(text(f"{_INSERT_VALUE} DO NOTHING"), {"key": key, "value": json.dumps(value)})


def lock_key(name: str) -> int:
    """The 64-bit key of a named advisory lock."""
    return int.from_bytes(blake2b(f"songvec:{name}".encode(), digest_size=8).digest(), "big", signed=True)


@contextlib.contextmanager
def hold_lock(
    database: Database, names: str | Sequence[str], on_wait: Callable[[], None], check: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Hold transaction-level advisory locks until the end of the block or of the process.

    Behind a pooler in transaction mode, a session-level lock would be lost, or never released. The transaction is idle
    and has no snapshot: neither VACUUM nor an index build waits for it.

    Args:
        database: all runs on it share the same locks.
        on_wait: called once if another transaction holds the lock.
        check: called while waiting; raises to give up.

    Yields:
        A function that raises DatabaseError if the transaction was lost, and with it the lock.
    """
    with error_border(), database.get_engine().connect() as connection:
        keys = [*map(lock_key, [names] if isinstance(names, str) else names)]
        take = TAKE_LOCKS.bindparams(keys=keys, holder=name_holder(database.run_id))
        if not connection.scalar(take):
            on_wait()
            connection.rollback()  # `find_holders` shows since when a transaction is open
            while not connection.scalar(take):
                connection.rollback()
                time.sleep(_LOCK_POLL_S)
                check()

        def check_held() -> None:
            with error_border(), raw_cursor(connection) as cursor:
                cursor.execute("SELECT 1")

        try:
            yield check_held
        finally:
            with contextlib.suppress(sa.exc.DBAPIError):  # it broke: the lock is already released
                connection.rollback()
