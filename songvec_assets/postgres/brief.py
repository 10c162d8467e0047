"""Short transactions that need a strong lock on a table that searches use."""

import time
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database

_LOCK_TIMEOUT = "250ms"
_PAUSE_S = 0.5
_LOCK_NOT_AVAILABLE = "55P03"


def run_briefly(
    database: Database,
    work: Callable[[sa.Connection], None],
    check: Callable[[], None] = lambda: None,
    patience_s: float = 600.0,
) -> None:
    """Run `work` in one transaction that waits for a lock a quarter of a second at most, then lets go and tries again.

    Whoever waits for a strong lock makes all later searches wait behind it, so the wait must be short.

    Args:
        database: where.
        work: statements; it may run more than once.
        check: called between tries; raises to give up.
        patience_s: seconds until the lock's being held is an error.

    Raises:
        DatabaseError: another session held its lock all the time; nothing is changed.
    """
    deadline = time.monotonic() + patience_s
    while True:
        check()
        try:
            with database.get_connection() as connection:
                connection.execute(
                    text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": _LOCK_TIMEOUT}
                )
                work(connection)
                return
        except DatabaseError as error:
            if not is_lock_timeout(error) or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def is_lock_timeout(error: DatabaseError) -> bool:
    """Whether a statement gave up waiting for a lock."""
    cause = error.__cause__
    return isinstance(cause, sa.exc.DBAPIError) and getattr(cause.orig, "pgcode", None) == _LOCK_NOT_AVAILABLE
