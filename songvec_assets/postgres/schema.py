"""Schema `songvec`: the small tables that the package keeps beside its data, and the locks taken on ranges.

One row a fact in `songvec.settings`; JSON values. Nothing here knows what the facts mean.
"""

import contextlib
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

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

_LOCK_POLL_S = 0.5
_NO_SCHEMA = "3F000"

_TABLES = """
    CREATE SCHEMA IF NOT EXISTS songvec;
    CREATE TABLE IF NOT EXISTS songvec.settings (
        key text PRIMARY KEY,
        value jsonb NOT NULL
    );
    CREATE TABLE IF NOT EXISTS songvec.rate_limits (
        name text PRIMARY KEY
    );
    ALTER TABLE songvec.rate_limits
        ADD COLUMN IF NOT EXISTS requests_at timestamptz NOT NULL DEFAULT 'epoch',
        ADD COLUMN IF NOT EXISTS tokens_at timestamptz NOT NULL DEFAULT 'epoch',
        ADD COLUMN IF NOT EXISTS paused_until timestamptz NOT NULL DEFAULT 'epoch',
        ADD COLUMN IF NOT EXISTS busy_since timestamptz NOT NULL DEFAULT 'epoch',
        ADD COLUMN IF NOT EXISTS slowed_at timestamptz NOT NULL DEFAULT 'epoch',
        ADD COLUMN IF NOT EXISTS share double precision NOT NULL DEFAULT 1,
        ADD COLUMN IF NOT EXISTS seen_at timestamptz NOT NULL DEFAULT 'epoch',
        ADD COLUMN IF NOT EXISTS ahead_s double precision NOT NULL DEFAULT 0;
    CREATE TABLE IF NOT EXISTS songvec.rate_seconds (
        name text,
        slot smallint,
        second bigint NOT NULL,
        n_requests bigint NOT NULL,
        n_tokens bigint NOT NULL,
        PRIMARY KEY (name, slot)
    );
    CREATE TABLE IF NOT EXISTS songvec.loaded_ranges (
        range_start bigint NOT NULL,
        range_stop bigint NOT NULL,
        model text NOT NULL,
        dimensions integer NOT NULL,
        n_songs integer NOT NULL,
        digest bytea NOT NULL,
        song_ids bytea NOT NULL,
        checksums bytea NOT NULL,
        loaded_at timestamptz NOT NULL DEFAULT now()
    );
    ALTER TABLE songvec.loaded_ranges
        ADD COLUMN IF NOT EXISTS table_name text NOT NULL DEFAULT 'song_embeddings',
        DROP CONSTRAINT IF EXISTS loaded_ranges_pkey,
        ADD PRIMARY KEY (table_name, range_start, range_stop);
    CREATE TABLE IF NOT EXISTS songvec.budgets (
        name text PRIMARY KEY,
        updated_at timestamptz NOT NULL DEFAULT now()
    );
    ALTER TABLE songvec.budgets
        DROP COLUMN IF EXISTS n_tokens,
        ADD COLUMN IF NOT EXISTS usd numeric NOT NULL DEFAULT 0,
        ADD COLUMN IF NOT EXISTS reserved_usd numeric NOT NULL DEFAULT 0;
"""
# all of it is made in one transaction: where the newest part is there, so is the rest
_HAS_NEWEST = """
    SELECT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = to_regclass('songvec.budgets') AND attname = 'reserved_usd'
    )
"""


def ensure_schema(database: Database) -> None:
    """Create the `vector` extension and our tables where they are missing.

    Raises:
        DatabaseError: the extension is not installed, not permitted or too old, or the user may not create a schema.
    """
    with database.get_connection() as connection:
        # two first runs at once would collide in the catalogue
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("schema")})
        if not connection.scalar(text(_HAS_NEWEST)):
            connection.execute(text(_TABLES))
        _ensure_extension(connection)


def _ensure_extension(connection: sa.Connection) -> None:
    installed = connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'vector'"))
    if installed is None:
        available = connection.scalar(text("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'"))
        if not available:
            raise DatabaseError(
                "pgvector is not installed on this Postgres server: install its package there "
                "(see github.com/pgvector/pgvector), or use a server that has it"
            )
        try:
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        except sa.exc.ProgrammingError as error:
            if getattr(error.orig, "pgcode", None) == _NO_SCHEMA:  # the words of error_border say more
                raise
            raise DatabaseError(
                "the extension `vector` is not in this database and this user may not create it: let a superuser run "
                "CREATE EXTENSION vector; in this database once"
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
        raise DatabaseError("the extension `vector` is not in this database any more: CREATE EXTENSION vector; in it")
    alter = f"ALTER ROLE {found.role} IN DATABASE {found.database} SET search_path ="
    if not found.is_usable:
        raise DatabaseError(
            f"the extension `vector` is in schema {found.home}, which this user may not use: let its owner run GRANT "
            f"USAGE ON SCHEMA {found.home} TO {found.role}"
        )
    if not found.is_searched:
        raise DatabaseError(
            f"the extension `vector` is in schema {found.home}, which is not in this user's search_path "
            f"({found.path}): run {alter} {found.path}, {found.home}; and let a pooler connect again"
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
            "run ALTER EXTENSION vector UPDATE;"
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
