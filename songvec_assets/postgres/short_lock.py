"""Short transactions that need a strong lock on a table that searches use.

When to add here: another way to keep such a lock short. Keep out: the statements (`vectors`).
"""

import time
from collections.abc import Callable

import sqlalchemy as sa

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database

_SET_LOCK_TIMEOUT = sa.text("SET LOCAL lock_timeout = '250ms'")
_PAUSE_S = 0.5
_LOCK_NOT_AVAILABLE = "55P03"


def run_with_short_lock(
    database: Database,
    work: Callable[[sa.Connection], None],
    check: Callable[[], None] = lambda: None,
    patience_s: float = 600.0,
) -> None:
    """Run `work` in one transaction that waits up to 250 ms for a lock, and is rolled back and retried after that.

    While a session waits for a strong lock, all later searches wait behind it, so the wait must be short.

    Args:
        work: statements; may run more than once.
        check: called before each try; raises to give up.
        patience_s: seconds after which a lock that is still held is an error.

    Raises:
        DatabaseError: another session held a lock until the end; nothing was changed.
    """

    def attempt() -> None:
        with database.get_connection() as connection:
            connection.execute(_SET_LOCK_TIMEOUT)
            work(connection)

    retry_for_lock(attempt, check, patience_s)


def retry_for_lock(attempt: Callable[[], None], check: Callable[[], None], patience_s: float) -> None:
    """Call `attempt` again while a statement in it gives up waiting for a lock; for the arguments see above."""
    deadline = time.monotonic() + patience_s
    while True:
        check()
        try:
            return attempt()
        except DatabaseError as error:
            if not is_lock_timeout(error) or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def is_lock_timeout(error: DatabaseError) -> bool:
    """Whether a statement gave up waiting for a lock."""
    cause = error.__cause__
    return isinstance(cause, sa.exc.DBAPIError) and getattr(cause.orig, "pgcode", None) == _LOCK_NOT_AVAILABLE
