"""The extension pgvector (`vector`): created if it is missing, its version, and whether this user's searches find it.

When to add here: an error of another version. Keep out: the types and operators that it brings (`vectors/`).
"""

import re

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database

MIN_PGVECTOR = (0, 7, 0)
"""The first pgvector with the halfvec type (released 2024-04)."""

_FIXED = {
    (0, 8, 2): "a buffer overflow in parallel HNSW builds",
    (0, 8, 3): "HNSW indexes damaged by VACUUM",
    (0, 8, 4): "IVFFlat builds that take more than maintenance_work_mem",
}
"""Errors fixed in each version (pgvector's changelog, read 2026-11)."""

_NO_SCHEMA = "3F000"
_EXTENSION = """
    SELECT quote_ident(n.nspname) AS home, n.nspname = ANY (current_schemas(true)) AS is_searched,
        has_schema_privilege(n.oid, 'USAGE') AS is_usable,
        quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
        coalesce(nullif(current_setting('search_path'), ''), '""') AS path
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
"""


def ensure_extension(connection: sa.Connection) -> None:
    """Create the extension if it is missing.

    Raises:
        DatabaseError: it is not installed, not permitted or too old.
    """
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
