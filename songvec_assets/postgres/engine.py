"""Connections: engines with five kinds of pools, and the border at which driver errors become DatabaseError.

The server may be behind a pooler in transaction mode, so settings are made per transaction; code that needs a session
uses `Database.get_autocommit`.
When to add here: another way to connect. Keep out: statements, and anything that knows a table.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg2
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.messages import read_database_error
from songvec_assets.postgres.sessions import (
    CONNECT_ARGS,
    Backend,
    cancel_statements,
    configure_session,
    keeps_sessions,
    refuses_transactions,
)
from songvec_assets.postgres.urls import describe_url, libpq_uri, parse_url

Profile = Literal["batch", "web", "parallel", "autocommit", "session"]

_POOLS: dict[Profile, dict[str, Any]] = {
    "batch": {"pool_size": 1, "max_overflow": -1},
    "session": {"poolclass": NullPool},
    "web": {"pool_size": 5, "max_overflow": 10},
    "parallel": {"pool_size": 15, "max_overflow": 0},
    "autocommit": {"pool_size": 15, "max_overflow": 0},
}

_engines: dict[tuple[str, Profile], sa.Engine] = {}
_engines_lock = threading.Lock()
_active: set[tuple[int, Backend]] = set()
"""Open transactions and sessions, with the `id` of their Database."""
# reentrant: a signal handler may cancel in the thread that holds it
_active_lock = threading.RLock()

# names of types are compared: the server must not quote them unnecessarily
_UNQUOTED = "set_config('quote_all_identifiers', 'off', true)"
# `cancel` identifies a transaction by its process and start
_BEGIN = f"SELECT pg_backend_pid(), now(), {_UNQUOTED}"
# a role's timeouts are meant for queries, not for loads and locks of hours; before PostgreSQL 17 there are three
_BEGIN_LONG = f"""
    SELECT pg_backend_pid(), now(), {_UNQUOTED}, set_config('statement_timeout', '0', true),
           set_config('idle_in_transaction_session_timeout', '0', true), set_config('lock_timeout', '60s', true),
           CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
           THEN set_config('transaction_timeout', '0', true) END
"""
_BEGIN_ATOMIC = (
    "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '60s'"
)


def _forget_connections() -> None:
    """In a forked child, drop the parent's connections without closing them: answers for one would reach the other."""
    global _engines_lock, _active_lock
    # threads of the parent may have held the former ones, and are not in the child to release them
    _engines_lock, _active_lock = threading.Lock(), threading.RLock()
    _active.clear()
    for engine in _engines.values():
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)


def get_engine(url: str, profile: Profile = "batch") -> sa.Engine:
    """The process's engine for a URL and profile.

    Args:
        url: as libpq reads it, with or without a driver's name.
        profile: `batch`, for long jobs, one is kept and there is no limit: steps read in many short transactions, and a
            new connection costs more than most of them; `web`, 5 pooled and up to 10 more; `parallel`, 15 for 8
            workers; `autocommit`, 15 without transactions, for `atomic` statements: a connection that changes to
            AUTOCOMMIT and back costs two round trips more; `session`, none is kept: its settings end with it.
    """
    with _engines_lock:
        if (url, profile) not in _engines:
            parse_url(url)
            engine = sa.create_engine(
                # SQLAlchemy's own URLs have one host, and other rules for special characters
                "postgresql+psycopg2://",
                creator=functools.partial(psycopg2.connect, libpq_uri(url), **CONNECT_ARGS),
                # part of each BEGIN; at stricter levels a statement that waited for a row fails
                isolation_level="AUTOCOMMIT" if profile == "autocommit" else "READ COMMITTED",
                pool_pre_ping=profile != "session",
                **_POOLS[profile],
            )
            begin = _BEGIN if profile == "web" else _BEGIN_LONG
            sa.event.listen(engine, "begin", functools.partial(_begin, statement=begin))
            _engines[url, profile] = engine
        return _engines[url, profile]


def _begin(connection: sa.Connection, statement: str) -> None:
    raw = connection.connection.driver_connection
    if raw is None or raw.autocommit:
        return
    with raw.cursor() as cursor:
        try:
            cursor.execute(statement)
        except psycopg2.Error:
            connection.invalidate()
            raise
        connection.info["backend"] = cursor.fetchone()[:2]


def atomic(statement: str) -> sa.TextClause:
    """A statement for AUTOCOMMIT, in one round trip, that is READ COMMITTED and ignores the role's timeouts.

    For rows that all threads and processes that send requests share: a timeout for queries could cancel a statement
    that waits for the row, and so end a run that has already paid.
    """
    return sa.text(f"{_BEGIN_ATOMIC}; {statement}")


@contextlib.contextmanager
def get_connection(url: str, profile: Profile = "batch") -> Iterator[sa.Connection]:
    """A connection in a transaction, committed at the end of the block, rolled back on an error.

    Raises:
        DatabaseError: unreachable, refused, or a statement failed; the message says what to do.
    """
    with error_border(), _connect(url, profile) as connection, _ended(connection):
        connection.begin()
        yield connection
        connection.commit()


def _connect(url: str, profile: Profile) -> sa.Connection:
    try:
        return get_engine(url, profile).connect()
    except sa.exc.OperationalError as error:
        # a pooler in statement mode does so at the first BEGIN, and gives no reason
        if "server closed the connection" in str(error) and refuses_transactions(url):
            raise DatabaseError(
                "expected transactions, got a pooler in statement mode: set its pool_mode to transaction or session, "
                "or put a URL that bypasses it into POSTGRES_URL",
                "database.session",
            ) from error
        raise


@contextlib.contextmanager
def _ended(connection: sa.Connection) -> Iterator[None]:
    """Roll back an open transaction after the block; if the connection broke, the block's error is raised."""
    try:
        yield
    finally:
        with contextlib.suppress(sa.exc.DBAPIError):
            connection.rollback()


def raw_cursor(connection: sa.Connection) -> Any:
    """psycopg2's cursor, a context manager, for COPY and execute_values."""
    return connection.connection.cursor()


@dataclass(frozen=True)
class Database:
    """One database, by URL: its engines and connections, and how to cancel their statements.

    As a context manager it closes them at the end: `with Database(url) as database: …`.

    Attributes:
        url: as given; a driver's name in it is left out.
        embedded: whether it is the embedded server.
        direct_url: bypasses a pooler in transaction mode; None: `url` has no such pooler.
        run_id: of the Dagster run that uses it, which `songvec status` shows; empty: none.
    """

    url: str = field(repr=False)
    embedded: bool = False
    direct_url: str | None = field(default=None, repr=False)
    run_id: str = field(default="", compare=False)

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's pooled connections. The database can be used again: `get_engine` makes new engines."""
        with _engines_lock:
            engines = [_engines.pop(key) for key in list(_engines) if key[0] in (self.url, self.direct_url)]
        for engine in engines:
            engine.dispose()

    def get_engine(self, profile: Profile = "batch") -> sa.Engine:
        """See `get_engine` of this module."""
        return get_engine(self.url, profile)

    @contextlib.contextmanager
    def get_connection(self, profile: Profile = "batch") -> Iterator[sa.Connection]:
        """See `get_connection` of this module; `cancel` reaches this connection's statements."""
        with get_connection(self.url, profile) as connection, self._cancellable(connection.info["backend"]):
            yield connection

    @property
    def has_sessions(self) -> bool:
        """Whether the URL gives sessions, which a pooler in transaction mode does not; tested once per process and URL.

        Raises:
            DatabaseError: unreachable.
        """
        with error_border():
            return keeps_sessions(self.direct_url or self.url)

    @contextlib.contextmanager
    def get_autocommit(self, **settings: str) -> Iterator[sa.Connection]:
        """A session in AUTOCOMMIT, for VACUUM and CREATE INDEX CONCURRENTLY; without the role's timeouts.

        Args:
            settings: server settings for this session: `maintenance_work_mem="1GB"`.

        Raises:
            DatabaseError: the server is behind a pooler in transaction mode, or it refused.
        """
        if not self.has_sessions:
            raise DatabaseError(
                "expected a session of the server, got a pooler in transaction mode: set SONGVEC_DIRECT_URL to a "
                "URL of the same database that bypasses the pooler",
                "database.session",
            )
        engine = get_engine(self.direct_url or self.url, "session").execution_options(isolation_level="AUTOCOMMIT")
        with (
            error_border(),
            engine.connect() as connection,
            _ended(connection),
            raw_cursor(connection) as cursor,
            configure_session(cursor, settings) as backend,
            self._cancellable(backend),
        ):
            yield connection

    @contextlib.contextmanager
    def _cancellable(self, backend: Backend) -> Iterator[None]:
        with _active_lock:
            _active.add((id(self), backend))
        try:
            yield
        finally:
            with _active_lock:
                _active.discard((id(self), backend))

    def cancel(self) -> None:
        """Cancel the running statements of all open connections. Callable from any thread; does not wait.

        A new connection does it: psycopg2's `cancel` blocks the whole process while a host does not answer.
        """
        with _active_lock:
            backends = [backend for owner, backend in _active if owner == id(self)]
        if backends:
            arguments = (self.direct_url or self.url, backends)
            threading.Thread(target=cancel_statements, args=arguments, daemon=True, name="songvec-cancel").start()

    @property
    def adbc_uri(self) -> str:
        """The URL without a driver's name, as libpq and ADBC read it."""
        return libpq_uri(self.url)

    def describe(self) -> str:
        """Hosts, ports and name without user and password, for logs and metadata."""
        return "embedded Postgres" if self.embedded else describe_url(self.url)


@contextlib.contextmanager
def error_border() -> Iterator[None]:
    """Turn the driver's errors into DatabaseError with what to do."""
    try:
        yield
    except (sa.exc.DBAPIError, psycopg2.Error) as error:
        original = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        raise read_database_error(original) from error
    except sa.exc.TimeoutError as error:
        raise DatabaseError(
            "no database connection became free within 30 s: lower SONGVEC_CONCURRENCY, then start it again",
            "database.full",
        ) from error
