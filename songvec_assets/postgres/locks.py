"""Named advisory locks: taken until the end of a transaction, and who holds them.

A holder names itself in its session, and `pg_locks` shows which locks it holds. When to add here: another way to take a
lock, or another fact about a holder. Keep out: which locks there are (their owners), and locks on tables
(`short_lock`).
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.postgres.engine import Database, error_border, raw_cursor
from songvec_assets.progress import describe_seconds

_POLL_S = 0.5

# the name lasts as long as the lock does: a pooler gives the session to others afterwards
_TAKE = text("""
    SELECT bool_and(pg_try_advisory_xact_lock(each)), set_config('application_name', :holder, true)
    FROM unnest(CAST(:keys AS bigint[])) each
""")
"""Whether all locks of `keys` were free and are now held by this transaction, which `holder` names."""

_PREFIX, _UNKNOWN = "songvec", "-"

_HELD = text("""
    SELECT (classid::bigint << 32) | objid::bigint, application_name, xact_start,
        extract(epoch FROM clock_timestamp() - xact_start)::float
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (classid::bigint << 32) | objid::bigint = ANY (CAST(:keys AS bigint[]))
    ORDER BY xact_start
""")


def lock_key(name: str) -> int:
    """The 64-bit key of a named advisory lock."""
    return int.from_bytes(blake2b(f"songvec:{name}".encode(), digest_size=8).digest(), "big", signed=True)


def wait_for_lock(connection: sa.Connection, name: str) -> None:
    """Hold a lock until the end of the connection's transaction."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(name)})


@contextlib.contextmanager
def hold_lock(
    database: Database, names: str | Sequence[str], on_wait: Callable[[], None], check: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Hold transaction-level advisory locks until the end of the block or of the process.

    Behind a pooler in transaction mode, a session-level lock would be lost, or never released. The transaction is idle
    and has no snapshot: neither VACUUM nor an index build waits for it.

    Args:
        database: all runs on it share the same locks.
        on_wait: called once if another transaction holds the lock.
        check: called while waiting; raises to give up.

    Yields:
        A function that raises DatabaseError if the transaction was lost, and with it the lock.
    """
    with error_border(), database.get_engine().connect() as connection:
        keys = [*map(lock_key, [names] if isinstance(names, str) else names)]
        take = _TAKE.bindparams(keys=keys, holder=name_holder(database.run_id))
        if not connection.scalar(take):
            on_wait()
            connection.rollback()  # `find_holders` shows since when a transaction is open
            while not connection.scalar(take):
                connection.rollback()
                time.sleep(_POLL_S)
                check()

        def check_held() -> None:
            with error_border(), raw_cursor(connection) as cursor:
                cursor.execute("SELECT 1")

        try:
            yield check_held
        finally:
            with contextlib.suppress(sa.exc.DBAPIError):  # it broke: the lock is already released
                connection.rollback()


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Attributes:
        task: what it does: `filling`, `loading`, `building the index`.
        key: of the range; empty: the task is about the whole table.
        run_id: the first eight characters of its Dagster run's id; empty: it is no run of Dagster.
        process: its number on its host; None: an earlier release holds the lock.
        host: its name, of up to 30 characters.
        since: when it took the lock; None: this user may not see that of another one.
        seconds: since then.
    """

    task: str
    key: str
    run_id: str
    process: int | None
    host: str
    since: datetime | None
    seconds: float | None

    def describe(self) -> str:
        """One line: `Filling 000000000-000050000 for 3 min: process 4711 on worker-2, run 1a2b3c4d`."""
        task = " ".join(filter(None, [self.task.capitalize(), self.key]))
        lasted = "" if self.seconds is None else f" for {describe_seconds(max(0.0, self.seconds))}"
        run = f", run {self.run_id}" if self.run_id else ""
        by = "another program" if self.process is None else f"process {self.process} on {self.host}"
        return f"{task}{lasted}: {by}{run}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return vars(self) | {"since": self.since.isoformat() if self.since else None}


def name_holder(run_id: str) -> str:
    """How this process names itself to others, in an application_name of up to 63 bytes."""
    return f"{_PREFIX} {run_id[:8] or _UNKNOWN} {os.getpid()} {socket.gethostname()[:30]}"


def find_holders(connection: sa.Connection, tasks: Mapping[int, tuple[str, str]]) -> list[Holder]:
    """Who holds these locks now, the longest first.

    Args:
        connection: to the database of the locks.
        tasks: task and key of the range, by the lock's key.
    """
    holders = []
    for lock, name, since, seconds in connection.execute(_HELD, {"keys": [*tasks]}):
        prefix, *parts = (name or "").split(" ", 3)
        is_named = prefix == _PREFIX and len(parts) == 3
        run_id, process, host = parts if is_named else (_UNKNOWN, None, "")
        run_id = "" if run_id == _UNKNOWN else run_id
        holders.append(Holder(*tasks[lock], run_id, int(process) if process else None, host, since, seconds))
    return holders
