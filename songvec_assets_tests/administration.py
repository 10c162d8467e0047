"""What an administrator does to a server, past the package: statements, roles, URLs. No fixtures."""

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


def with_parts(url: str, **parts: object) -> str:
    """The URL with another username, password, host, port or database."""
    return sa.make_url(url).set(**parts).render_as_string(hide_password=False)


def dispose(url: str) -> None:
    """Close the connections that the package's pools keep to a URL."""
    for profile in ("batch", "web", "parallel"):
        Database(url).get_engine(profile).dispose()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Look every 20 ms; fail where the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
