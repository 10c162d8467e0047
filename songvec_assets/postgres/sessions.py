"""Sessions and their sockets: whether a URL gives sessions of the server's own, what is set, how they are cancelled.

Behind a pooler in transaction mode (PgBouncer and its like) there are none: each transaction may meet another of the
pooler's sessions, and what is set for a session reaches its next client. Timeouts are seconds.
"""

import contextlib
import datetime
import functools
import socket
from collections.abc import Collection, Iterator
from typing import Any

import psycopg2

from songvec_assets.postgres.messages import ReportingCursor
from songvec_assets.postgres.urls import libpq_uri

CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 10,
    "application_name": "songvec",
    # whatever the database's encoding and PGCLIENTENCODING are: all that we read and write is UTF-8
    "client_encoding": "UTF8",
    "cursor_factory": ReportingCursor,
    # a load or an index build is silent for hours: firewalls forget such connections, and dead peers go unnoticed
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 6,
}

Backend = tuple[int, datetime.datetime]
"""A process of the server, and when it or its transaction began: the two together never come again."""

_SETTINGS = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": "read committed",
}
_SETTINGS_WHERE_KNOWN = {
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    # the server then notices that a client was killed, and ends its index build
    "client_connection_check_interval": "10s",
}
_SET = "SELECT set_config(%s, %s, false)"

_N_TRIES = 5

_SEND_BUFFER_BYTES = (16 << 20, 4 << 20, 1 << 20)
"""Asked for in turn. Linux gives what it may, twice `net.core.wmem_max`; others refuse what is more than they may."""

_CANCEL = """
    SELECT pg_cancel_backend(pid) FROM pg_stat_activity
    WHERE pid = ANY (%s) AND (xact_start = ANY (%s) OR backend_start = ANY (%s))
"""


@functools.cache
def keeps_sessions(url: str) -> bool:
    """Whether a connection to a URL keeps its session of the server; asked once a process and URL.

    A pooler in transaction mode gives whichever session is free: two connections then meet the same, or one of them
    meets several. One asks twice in a row: of two sessions that take turns, each would else meet its own.
    """
    ones: set[int] = set()
    others: set[int] = set()
    with _connect(url) as one, _connect(url) as other:
        for cursor, pids in ((one, ones), (other, others), (other, others)) * _N_TRIES:
            cursor.execute("SELECT pg_backend_pid()")
            pids.add(cursor.fetchone()[0])
    return len(ones) == len(others) == 1 and ones != others


@contextlib.contextmanager
def configure_session(cursor: Any, settings: dict[str, str]) -> Iterator[Backend]:
    """Give a session no timeout of its role's, and these settings of the server's, for the block."""
    for name, value in _SETTINGS_WHERE_KNOWN.items():
        # an older server does not know it, and some platforms cannot
        with contextlib.suppress(psycopg2.errors.UndefinedObject, psycopg2.errors.InvalidParameterValue):
            cursor.execute(_SET, (name, value))
    for name, value in (_SETTINGS | settings).items():
        cursor.execute(_SET, (name, value))
    cursor.execute("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
    try:
        yield cursor.fetchone()
    finally:
        with contextlib.suppress(psycopg2.Error):
            cursor.execute("RESET ALL")


def cancel_statements(url: str, backends: Collection[Backend]) -> None:
    """Cancel what these are running, as far as the server can be reached."""
    pids, starts = [pid for pid, _ in backends], [start for _, start in backends]
    with contextlib.suppress(psycopg2.Error), _connect(url, connect_timeout=5) as cursor:
        cursor.execute(_CANCEL, (pids, starts, starts))


@contextlib.contextmanager
def _connect(url: str, **arguments: Any) -> Iterator[Any]:
    """A cursor in AUTOCOMMIT."""
    with contextlib.closing(psycopg2.connect(libpq_uri(url), **(CONNECT_ARGS | arguments))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor


def widen_send_buffer(connection: Any) -> None:
    """Let a Unix socket hold more of what a client sends ahead.

    A server that takes in rows works in bursts: every 16 MB of new pages it writes what it has, for 20 ms, and then
    wants rows faster than a client makes them (PostgreSQL 18, measured 2026-11). TCP widens its own buffers.

    Args:
        connection: psycopg2's own. One of a pool keeps it: a limit, not an allocation.
    """
    if not connection.info.host.startswith("/"):
        return
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
        for n_bytes in _SEND_BUFFER_BYTES:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n_bytes)
                return
