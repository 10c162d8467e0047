"""Sessions and their sockets: whether a URL gives sessions, their settings, and how statements are cancelled.

A pooler in transaction mode (such as PgBouncer) gives none: each transaction may get a different session of the pooler,
and session settings would leak to the next client. Timeouts are seconds.
When to add here: another property of a session or a socket. Keep out: engines and transactions.
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
    # clients read and write UTF-8, whatever the database's encoding and PGCLIENTENCODING
    "client_encoding": "UTF8",
    "cursor_factory": ReportingCursor,
    # a load or an index build is silent for hours: firewalls drop such connections, and dead peers go unnoticed
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 6,
}

Backend = tuple[int, datetime.datetime]
"""The pid of a server process, and when it or its transaction began: together they are unique."""

# of these, only the settings that the server has
_NO_TIMEOUTS = """
    SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN (
        'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout',
        'transaction_timeout'
    )
"""
_SET = "SELECT set_config(%s, %s, false)"

_N_TRIES = 5

_SEND_BUFFER_BYTES = (16 << 20, 4 << 20, 1 << 20)
"""Tried in this order. Linux grants up to twice `net.core.wmem_max`; other systems refuse sizes above their limit."""

_CANCEL = """
    SELECT pg_cancel_backend(pid) FROM pg_stat_activity
    WHERE pid = ANY (%s) AND (xact_start = ANY (%s) OR backend_start = ANY (%s))
"""


@functools.cache
def keeps_sessions(url: str) -> bool:
    """Whether a connection to a URL keeps one session of the server; tested once per process and URL.

    A pooler in transaction mode gives any free session: two connections get the same one, or one connection gets
    several. One connection asks twice in a row: otherwise, if two sessions rotate, each would always get the same one.
    """
    ones: set[int] = set()
    others: set[int] = set()
    with _connect(url) as one, _connect(url) as other:
        for cursor, pids in ((one, ones), (other, others), (other, others)) * _N_TRIES:
            cursor.execute("SELECT pg_backend_pid()")
            pids.add(cursor.fetchone()[0])
    return len(ones) == len(others) == 1 and ones != others


def refuses_transactions(url: str) -> bool:
    """Whether there is a pooler in statement mode: it closes connections without a message at BEGIN."""
    with contextlib.suppress(psycopg2.Error), _connect(url) as cursor:
        cursor.execute("SELECT 1")
        try:
            cursor.execute("BEGIN")
        except psycopg2.OperationalError:
            return True
    return False


@contextlib.contextmanager
def configure_session(cursor: Any, settings: dict[str, str]) -> Iterator[Backend]:
    """Set server settings for the session within the block, without the role's timeouts."""
    cursor.execute(_NO_TIMEOUTS)
    # lets the server end the index build of a killed client; older servers and some platforms do not support it
    with contextlib.suppress(psycopg2.errors.UndefinedObject, psycopg2.errors.InvalidParameterValue):
        cursor.execute(_SET, ("client_connection_check_interval", "10s"))
    ours = {"default_transaction_isolation": "read committed", "quote_all_identifiers": "off"}
    for name, value in (ours | settings).items():
        cursor.execute(_SET, (name, value))
    cursor.execute("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
    try:
        yield cursor.fetchone()
    finally:
        with contextlib.suppress(psycopg2.Error):
            cursor.execute("RESET ALL")


def cancel_statements(url: str, backends: Collection[Backend]) -> None:
    """Cancel the statements of these processes, if the server can be reached."""
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
    """Enlarge the send buffer of a Unix socket, so that a client can send ahead.

    A server loads rows in bursts: after each 16 MB of new pages it writes for 20 ms, and then reads rows faster than a
    client produces them (PostgreSQL 18, measured 2026-11). TCP enlarges its buffers automatically.

    Args:
        connection: psycopg2's. A pooled one keeps the buffer: a limit, not an allocation.
    """
    if not connection.info.host.startswith("/"):
        return
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
        for n_bytes in _SEND_BUFFER_BYTES:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n_bytes)
                return
