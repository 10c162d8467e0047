"""What an administrator does to a server, past the package: statements, roles, URLs, databases. No fixtures."""

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator

import psycopg2
import sqlalchemy as sa

from songvec_assets.postgres.engine import Database


def execute(url: str, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple]:
    """Run one statement in a connection of its own and return its rows."""
    connection = psycopg2.connect(url, application_name="administration")
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


@contextlib.contextmanager
def login_role(url: str, attributes: str = "") -> Iterator[str]:
    """A role that may log in, by name; it must own nothing any more at the end of the block."""
    name = f"role_{uuid.uuid4().hex[:12]}"
    execute(url, f"CREATE ROLE {name} LOGIN {attributes}")
    try:
        yield name
    finally:
        execute(url, f"DROP ROLE {name}")


@contextlib.contextmanager
def as_role(database: Database, attributes: str = "", database_right: str = "CONNECT") -> Iterator[Database]:
    """The database as a new role sees it; what the role made or was granted goes with it."""
    with login_role(database.adbc_uri, attributes) as role:
        execute(database.adbc_uri, f"GRANT {database_right} ON DATABASE {sa.make_url(database.url).database} TO {role}")
        seen = Database(with_parts(database.url, username=role))
        try:
            yield seen
        finally:
            dispose(seen.url)
            execute(database.adbc_uri, f"DROP OWNED BY {role}")


def set_for_role(database: Database, seen: Database, **settings: str) -> None:
    """Set what the sessions of the role that it is seen as begin with."""
    for name, value in settings.items():
        execute(database.adbc_uri, f"ALTER ROLE {sa.make_url(seen.url).username} SET {name} = '{value}'")


_idle_databases: dict[str, list[tuple[str, str]]] = {}

_CLEAN = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();
    DO $$
    DECLARE made record;
    BEGIN
        EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
        FOR made IN
            SELECT nspname FROM pg_namespace
            WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'public', 'songvec')
        LOOP
            EXECUTE format('DROP SCHEMA %I CASCADE', made.nspname);
        END LOOP;
        FOR made IN
            SELECT relname, CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END AS kind
            FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')
        LOOP
            EXECUTE format('DROP %s IF EXISTS public.%I CASCADE', made.kind, made.relname);
        END LOOP;
        FOR made IN
            SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('d', 'e')
        LOOP
            EXECUTE format('DROP TYPE IF EXISTS public.%I CASCADE', made.typname);
        END LOOP;
    END $$;
    DELETE FROM songvec.settings WHERE key <> 'schema_version';
    DELETE FROM songvec.rate_limits;
    DELETE FROM songvec.rate_seconds;
    DELETE FROM songvec.budgets;
    DELETE FROM songvec.loaded_ranges;
"""

_CATALOGUE = """
    SELECT md5(string_agg(object, ';' ORDER BY object)) FROM (
        SELECT concat_ws(' ', 'class', oid, relname, relnatts, relowner, relacl) AS object FROM pg_class
        UNION ALL SELECT concat_ws(' ', 'schema', oid, nspname, nspowner, nspacl) FROM pg_namespace
        UNION ALL SELECT concat_ws(' ', 'extension', oid, extname, extversion) FROM pg_extension
        UNION ALL SELECT concat_ws(' ', 'index', indexrelid, indisvalid) FROM pg_index
        UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = to_regnamespace('songvec')
        UNION ALL SELECT concat_ws(' ', 'constraint', oid, conname) FROM pg_constraint
        UNION ALL SELECT concat_ws(' ', 'database', oid, datacl) FROM pg_database WHERE datname = current_database()
    ) AS objects
"""


@contextlib.contextmanager
def borrow_database(server_url: str, template: str) -> Iterator[Database]:
    """A database like a fresh clone of the template.

    Cloning takes most of a short test's time: what a test made is dropped after it, and where the catalogue is then
    what it was when the database was made, another test gets it.
    """
    idle = _idle_databases.setdefault(server_url, [])
    if idle:
        url, catalogue = idle.pop()
    else:
        name = f"test_{uuid.uuid4().hex[:12]}"
        execute(server_url, f"CREATE DATABASE {name} TEMPLATE {template}")
        url = with_parts(server_url, database=name)
        catalogue = execute(url, _CATALOGUE)[0][0]
    try:
        yield Database(url)
    finally:
        dispose(url)
        try:
            as_made = execute(url, _CLEAN + _CATALOGUE) == [(catalogue,)]
        except psycopg2.Error:
            as_made = False
        if as_made:
            idle.append((url, catalogue))
        else:
            execute(server_url, f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")


def with_parts(url: str, **parts: object) -> str:
    """The URL with another username, password, host, port or database."""
    return sa.make_url(url).set(**parts).render_as_string(hide_password=False)


def dispose(url: str) -> None:
    """Close the connections that the package's pools keep to a URL."""
    Database(url).close()


def own_engine(database: Database, **given: object) -> sa.Engine:
    """An engine of its own to a database, as another process has it."""
    return sa.create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(database.adbc_uri), **given)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Look every 20 ms; fail where the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
