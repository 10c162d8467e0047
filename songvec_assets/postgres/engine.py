"""How the database is reached: engines in three pooling profiles, and the border where the driver's errors become ours.

Timeouts and intervals are seconds.
"""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlencode

import psycopg2
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from songvec_assets.errors import DatabaseError, SettingsError

Profile = Literal["batch", "web", "parallel"]

_POOLS: dict[Profile, dict[str, Any]] = {
    "batch": {"poolclass": NullPool},
    "web": {"pool_size": 5, "max_overflow": 10},
    "parallel": {"pool_size": 15, "max_overflow": 0},
}

_engines: dict[tuple[str, Profile], sa.Engine] = {}
_engines_lock = threading.Lock()

_CONNECT_ARGS = {
    "connect_timeout": 10,
    "application_name": "songvec",
    # a load or an index build is silent for hours: firewalls forget such connections, and dead peers go unnoticed
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 6,
}


def normalize_url(url: str) -> str:
    """Name the driver in a `postgres://` or `postgresql://` URL.

    Raises:
        SettingsError: not a Postgres URL. The message leaves the URL out: it may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise SettingsError("POSTGRES_URL: expected postgresql://user:password@host:5432/database, got another form")
    return f"postgresql+psycopg2://{rest}"


def get_engine(url: str, profile: Profile = "batch") -> sa.Engine:
    """The process's engine for a URL and profile.

    Args:
        url: a Postgres URL, with or without a driver.
        profile: `batch`, a connection a use, for long jobs; `web`, 5 kept and 10 more; `parallel`, 15 for 8 workers.
    """
    with _engines_lock:
        if (url, profile) not in _engines:
            pool = _POOLS[profile]
            _engines[url, profile] = sa.create_engine(
                parse_url(url), pool_pre_ping=profile != "batch", connect_args=_CONNECT_ARGS, **pool
            )
        return _engines[url, profile]


def parse_url(url: str) -> sa.URL:
    """A Postgres URL with its driver named.

    Raises:
        SettingsError: it does not parse. The message leaves it out: it may hold a password.
    """
    try:
        parsed = sa.make_url(normalize_url(url))
    except (sa.exc.ArgumentError, ValueError):
        raise SettingsError(
            "POSTGRES_URL does not parse: expected postgresql://user:password@host:5432/database, with special "
            "characters of the password percent-encoded"
        ) from None
    if "@" in (parsed.host or ""):
        raise SettingsError("POSTGRES_URL has an @ in its password: percent-encode it as %40")
    return parsed


@contextlib.contextmanager
def get_connection(url: str, profile: Profile = "batch") -> Iterator[sa.Connection]:
    """A connection in a transaction, committed at the end of the block, rolled back on an error.

    Raises:
        DatabaseError: unreachable, refused, or a statement the server would not take; says what to do.
    """
    with error_border(), get_engine(url, profile).begin() as connection:
        yield connection


@contextlib.contextmanager
def raw_cursor(connection: sa.Connection) -> Iterator[Any]:
    """psycopg2's own cursor on a connection, for COPY and execute_values."""
    cursor = connection.connection.cursor()
    try:
        yield cursor
    finally:
        cursor.close()


@dataclass(frozen=True)
class Database:
    """One database, by URL; hands out engines and connections and can cancel what they are doing.

    Attributes:
        url: where it is.
        embedded: whether it is the server that this package brings along.
    """

    url: str = field(repr=False)
    embedded: bool = False
    _active: set[Any] = field(default_factory=set, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def get_engine(self, profile: Profile = "batch") -> sa.Engine:
        """See the function of that name."""
        return get_engine(self.url, profile)

    @contextlib.contextmanager
    def get_connection(self, profile: Profile = "batch") -> Iterator[sa.Connection]:
        """See the function of that name; `cancel` reaches this connection's statements."""
        with get_connection(self.url, profile) as connection, self._cancellable(connection):
            yield connection

    @contextlib.contextmanager
    def get_autocommit(self) -> Iterator[sa.Connection]:
        """A connection without a transaction, for VACUUM, CREATE INDEX CONCURRENTLY and session locks."""
        engine = self.get_engine("batch").execution_options(isolation_level="AUTOCOMMIT")
        with error_border(), engine.connect() as connection, self._cancellable(connection):
            yield connection

    @contextlib.contextmanager
    def _cancellable(self, connection: sa.Connection) -> Iterator[None]:
        raw = connection.connection.driver_connection
        with self._lock:
            self._active.add(raw)
        try:
            yield
        finally:
            with self._lock:
                self._active.discard(raw)

    def cancel(self) -> None:
        """Cancel the running statement of every connection handed out. Callable from any thread."""
        with self._lock:
            for connection in self._active:
                with contextlib.suppress(psycopg2.Error):
                    connection.cancel()

    @property
    def adbc_uri(self) -> str:
        """The URL as libpq reads it: every part percent-encoded, which SQLAlchemy leaves undone for spaces."""
        url = parse_url(self.url)
        login = ":".join(quote(part, safe="") for part in (url.username, url.password) if part is not None)
        host = f"[{url.host}]" if ":" in (url.host or "") else url.host or ""
        query = urlencode(url.query, doseq=True, quote_via=quote)
        port = f":{url.port}" if url.port else ""
        database = quote(url.database or "", safe="")
        return f"postgresql://{login}{'@' if login else ''}{host}{port}/{database}{'?' if query else ''}{query}"

    def describe(self) -> str:
        """Host, port and name without user and password, for logs and metadata."""
        url = parse_url(self.url)
        if self.embedded:
            return "embedded Postgres"
        return f"{url.host or url.query.get('host', 'localhost')}:{url.port or 5432}/{url.database}"


@contextlib.contextmanager
def error_border() -> Iterator[None]:
    """Turn the driver's errors into DatabaseError with what to do."""
    try:
        yield
    except (sa.exc.DBAPIError, psycopg2.Error) as error:
        original = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        raise DatabaseError(describe_database_error(original)) from error
    except sa.exc.TimeoutError as error:
        raise DatabaseError(
            "no database connection became free within 30 s: fewer workers, or a larger pool"
        ) from error


_ADVICE_BY_CODE = {
    "28P01": "the password is wrong: correct POSTGRES_URL",
    "28000": "the server refuses this user from here: check POSTGRES_URL and pg_hba.conf",
    "3D000": "there is no such database: create it, or correct POSTGRES_URL",
    "42501": "this user lacks a right: let the owner grant it, or use another user in POSTGRES_URL",
    "53300": "the server has no connection left: raise max_connections or stop other clients",
    "53100": "the server's disk is full: free space, then start the same command again; nothing is half-loaded",
    "53200": "the server ran out of memory: lower maintenance_work_mem or SONGVEC_LISTS",
    "57014": "the statement was cancelled, by a person or the role's statement_timeout; start the same command again",
    "55P03": "another session holds a lock on the table: wait for it, then start the same command again",
    "25006": "this server is a read-only standby: put the primary's address into POSTGRES_URL",
    "57P01": "the server was shut down; start the same command again when it is back",
    "57P03": "the server is starting or shutting down; start the same command again when it is up",
}

_ADVICE_BY_WORDS = (
    (r"password authentication failed|no password supplied", _ADVICE_BY_CODE["28P01"]),
    (r"database \".*\" does not exist", _ADVICE_BY_CODE["3D000"]),
    (r"role \".*\" does not exist|no pg_hba.conf entry", _ADVICE_BY_CODE["28000"]),
    (r"too many clients|too many connections|remaining connection slots", _ADVICE_BY_CODE["53300"]),
    (r"could not translate host name", "the host's name does not resolve: correct POSTGRES_URL"),
    (
        r"could not connect|Connection refused|timeout expired|No such file or directory|Network is unreachable",
        "no server answers there: is it running, is the address in POSTGRES_URL right, does a firewall stand between?",
    ),
    (
        r"server closed the connection|SSL connection has been closed|connection already closed|could not receive",
        "the connection broke: what was committed is kept, start the same command again",
    ),
)


def describe_database_error(error: BaseException | None) -> str:
    """The server's own words, on one line, and what to do about them."""
    words = " ".join(str(error).split())
    advice = _ADVICE_BY_CODE.get(getattr(error, "pgcode", None) or "")
    advice = advice or next((each for pattern, each in _ADVICE_BY_WORDS if re.search(pattern, words)), None)
    return f"Postgres: {words}" + (f" ({advice})" if advice else "")
