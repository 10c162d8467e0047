"""Who holds an advisory lock: the holder names itself in its session, and `pg_locks` shows which locks it holds.

When to add here: another fact about a holder. Keep out: which locks there are (their owners), taking them (`schema`).
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from songvec_assets.progress import describe_seconds

# the name lasts as long as the lock does: a pooler gives the session to others afterwards
TAKE_LOCKS = text("""
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
        time = "" if self.seconds is None else f" for {describe_seconds(max(0.0, self.seconds))}"
        run = f", run {self.run_id}" if self.run_id else ""
        by = "another program" if self.process is None else f"process {self.process} on {self.host}"
        return f"{task}{time}: {by}{run}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return vars(self) | {"since": self.since.isoformat() if self.since else None}


def name_holder(run_id: str) -> str:
    """How this process names itself to others, in an application_name of up to 63 bytes."""
    return f"{_PREFIX} {run_id[:8] or _UNKNOWN} {os.getpid()} {socket.gethostname()[:30]}"


def find_holders(connection: Connection, tasks: Mapping[int, tuple[str, str]]) -> list[Holder]:
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
