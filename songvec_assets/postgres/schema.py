"""Schema `songvec`: its migrations, and the values in `songvec.settings` (JSON, one row per value).

When to add here: access to these tables. To change the tables, add a file to `migrations/`, such as `0003_….sql`, which
runs once. Keep out: the meaning of the values, which other modules own.
"""

import json
import weakref
from importlib import resources
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.postgres.extension import ensure_extension
from songvec_assets.postgres.locks import wait_for_lock

_Record = TypeVar("_Record")

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
        wait_for_lock(connection, "schema")
        recorded = _read_version(connection)
        version = recorded if recorded is not None else int(bool(connection.scalar(text(_HAS_VERSION_1))))
        if version > len(migrations):
            raise DatabaseError(
                f"this database was migrated by a newer songvec, to version {version} of schema songvec, and this one "
                f"knows version {len(migrations)}: upgrade songvec-assets here. Nothing was changed",
                "database.newer-schema",
            )
        ensure_extension(connection)
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
