"""Schema `songvec`: the small tables that the package keeps beside its data, and the locks taken on ranges.

A value a row in `songvec.settings`, as JSON. When to add here: nothing but access to these tables; a change of them is
another file in `migrations/`, `0002_….sql`, which runs once. Keep out: what the values mean.
"""

import contextlib
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator
from hashlib import blake2b
from importlib import resources
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, error_border, raw_cursor

MIN_PGVECTOR = (0, 7, 0)
"""The first pgvector with the halfvec type (released 2024-04)."""

_MENDED = {
    (0, 8, 2): "a buffer overflow in parallel HNSW builds",
    (0, 8, 3): "HNSW indexes damaged by VACUUM",
    (0, 8, 4): "IVFFlat builds that take more than maintenance_work_mem",
}
"""What is wrong before a version; pgvector's changelog, read 2026-11."""

_Record = TypeVar("_Record")

_LOCK_POLL_S = 0.5
_NO_SCHEMA = "3F000"

_VERSION = "schema_version"
# of the releases that recorded no version, the last one made all of version 1
_HAS_VERSION_1 = """
    SELECT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = to_regclass('songvec.budgets') AND attname = 'reserved_usd'
    )
"""
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
    """Bring schema `songvec` to the newest version, and create the `vector` extension if it is missing.

    All in one transaction: a migration that fails leaves the version that was there. A schema from before versions were
    recorded is taken over as it is, with what it holds.

    Raises:
        DatabaseError: a newer release made the schema; the extension is not installed, not permitted or too old; or the
            user may not create a schema.
    """
    migrations = read_migrations()
    with database.get_connection() as connection:
        # two first runs at once would collide in the catalog
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("schema")})
        recorded = _read_version(connection)
        version = recorded if recorded is not None else int(bool(connection.scalar(text(_HAS_VERSION_1))))
        if version > len(migrations):
            raise DatabaseError(
                f"this database was migrated by a newer songvec, to version {version} of schema songvec, and this one "
                f"knows version {len(migrations)}: upgrade songvec-assets here. Nothing was changed",
                "database.newer-schema",
            )
        with raw_cursor(connection) as cursor:  # SQL may hold colons
            for migration in migrations[version:]:
                cursor.execute(migration)
        if version < len(migrations):
            write_fact(connection, _VERSION, len(migrations))
        elif recorded is None and connection.scalar(text(_MAY_RECORD)):  # else who only looks could not
            write_first_fact(connection, _VERSION, version)
        _ensure_extension(connection)


def _read_version(connection: sa.Connection) -> int | None:
    """The recorded version; None where there is none."""
    if not connection.scalar(text("SELECT to_regclass('songvec.settings') IS NOT NULL")):
        return None
    statement = text("SELECT value FROM songvec.settings WHERE key = :key")
    version = connection.scalar(statement, {"key": _VERSION})
    return None if version is None else int(version)


def _ensure_extension(connection: sa.Connection) -> None:
    installed = connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'vector'"))
    if installed is None:
        available = connection.scalar(text("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'"))
        if not available:
            raise DatabaseError(
                "pgvector is not installed on this Postgres server: install its package there "
                "(see github.com/pgvector/pgvector), or use a server that has it",
                "database.extension",
            )
        try:
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        except sa.exc.ProgrammingError as error:
            if getattr(error.orig, "pgcode", None) == _NO_SCHEMA:  # the words of error_border say more
                raise
            raise DatabaseError(
                "the extension `vector` is not in this database and this user may not create it: let a superuser run "
                "CREATE EXTENSION vector; in this database once",
                "database.extension",
            ) from error
        installed = connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'vector'"))
    check_pgvector_version(str(installed))


_EXTENSION = """
    SELECT quote_ident(n.nspname) AS home, n.nspname = ANY (current_schemas(true)) AS is_searched,
        has_schema_privilege(n.oid, 'USAGE') AS is_usable,
        quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
        coalesce(nullif(current_setting('search_path'), ''), '""') AS path
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
"""


def check_search_path(connection: sa.Connection) -> None:
    """Refuse a user whose search_path does not lead to the extension's types and operators.

    Raises:
        DatabaseError: has the statement that helps.
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
    """The leading numbers of an extversion, three or more: hosts add their own, as in `0.8.0.google-4`. None: none."""
    numbers = re.match(r"v?(\d+(?:\.\d+)*)", installed)
    if not numbers:
        return None
    parts = tuple(map(int, numbers.group(1).split(".")))
    return parts + (0,) * (3 - len(parts))


def describe_pgvector(installed: str) -> str:
    """What to know about an extversion that can be used; empty where it is recent."""
    version = parse_pgvector_version(installed)
    if version is None:
        return f"the version of pgvector, {installed!r}, was not understood: expected one like 0.8.5"
    mended = [f"{what} ({'.'.join(map(str, since))})" for since, what in _MENDED.items() if version[:3] < since]
    if not mended:
        return ""
    return (
        f"pgvector {installed} has errors that were mended since: {', '.join(mended)}. Update the server's package, "
        "then run ALTER EXTENSION vector UPDATE; where a host runs the server, ask for it"
    )


def read_pgvector_caution(database: Database) -> str:
    """What to know about this database's pgvector; empty where it is recent, or not there yet."""
    with database.get_connection() as connection:
        installed = connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'vector'"))
    return "" if installed is None else describe_pgvector(str(installed))


def check_pgvector_version(installed: str) -> None:
    """Raise DatabaseError where pgvector is older than MIN_PGVECTOR."""
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
    """Whether this database has our tables: one that was only looked at has none. Found out once per engine."""
    if connection.engine not in _with_tables:
        if not connection.scalar(text("SELECT to_regclass('songvec.settings') IS NOT NULL")):
            return False
        _with_tables.add(connection.engine)
    return True


def read_fact(connection: sa.Connection, key: str) -> Any:
    """A value of `songvec.settings`, or None."""
    if not has_tables(connection):
        return None
    return connection.scalar(text("SELECT value FROM songvec.settings WHERE key = :key"), {"key": key})


def read_record(connection: sa.Connection, key: str, kind: type[_Record]) -> _Record | None:
    """A value of `songvec.settings` as a number, text, dataclass or list of them.

    None where there is none, or another version wrote it with other fields: what cannot be read counts as not
    recorded. Fields that `kind` does not have are passed over.
    """
    value = read_fact(connection, key)
    try:
        return None if value is None else msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None


def write_fact(connection: sa.Connection, key: str, value: Any) -> None:
    """Set a value of `songvec.settings` within the connection's transaction."""
    connection.execute(
        text("""
            INSERT INTO songvec.settings (key, value) VALUES (:key, CAST(:value AS jsonb))
            ON CONFLICT (key) DO UPDATE SET value = excluded.value
        """),
        {"key": key, "value": json.dumps(value)},
    )


def write_first_fact(connection: sa.Connection, key: str, value: Any) -> None:
    """Set a value that is not there yet; of several that come at once, the first one stays."""
    connection.execute(
        text("""
            INSERT INTO songvec.settings (key, value) VALUES (:key, CAST(:value AS jsonb)) ON CONFLICT DO NOTHING
        """),
        {"key": key, "value": json.dumps(value)},
    )


def lock_key(name: str) -> int:
    """The 64-bit key of a named advisory lock."""
    return int.from_bytes(blake2b(f"songvec:{name}".encode(), digest_size=8).digest(), "big", signed=True)


@contextlib.contextmanager
def hold_lock(
    database: Database, name: str, on_wait: Callable[[], None], check: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Hold a transaction's advisory lock; it ends with the block, or with the process.

    Behind a pooler in transaction mode a session's lock would be lost, or never end; a transaction's holds. It is idle
    and has no snapshot: neither VACUUM nor an index build waits for it.

    Args:
        database: every run on it sees the same locks.
        name: what is locked.
        on_wait: called once where another one has the lock.
        check: called while waiting; raises to give up.

    Yields:
        A function that raises DatabaseError where the transaction, and the lock with it, was lost.
    """
    with error_border(), database.get_engine().connect() as connection:
        waiting = False
        while not connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": lock_key(name)}):
            if not waiting:
                on_wait()
            waiting = True
            time.sleep(_LOCK_POLL_S)
            check()

        def check_held() -> None:
            with error_border(), raw_cursor(connection) as cursor:
                cursor.execute("SELECT 1")

        try:
            yield check_held
        finally:
            # where the connection broke, the lock went with it
            with contextlib.suppress(sa.exc.DBAPIError):
                connection.rollback()
