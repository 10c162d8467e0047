"""Connections that read in parallel, through ADBC: a transient failure is retried on a new connection.

When to add here: another failure that passes. Keep out: what is read. Pauses are seconds.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from itertools import islice
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import adbc_driver_postgresql.dbapi as adbc
from psycopg2.extensions import make_dsn

from songvec_assets.errors import StoppedError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.messages import read_database_error
from songvec_assets.postgres.sessions import CONNECT_ARGS

_PAUSES_S = (0.0, 1.0, 4.0)
"""Before each attempt: a server that starts again is back after a few seconds."""
_POLL_S = 0.1

_GONE = ("08", "57P")
_PASSING = (*_GONE, "40", "53", "55", "57", "58")
"""Beginnings of SQLSTATEs, as PostgreSQL's appendix of error codes has them (read 2026-11): lost connections and
shutdowns; then conflicts, want of resources, locks, timeouts and the system's own errors."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_server_gone(error: BaseException | None) -> bool:
    """Whether it is the connection or the server that failed, not the statement."""
    return isinstance(error, adbc.Error) and (error.sqlstate is None or error.sqlstate.startswith(_GONE))


def _may_pass(error: adbc.Error) -> bool:
    return error.sqlstate is None or error.sqlstate.startswith(_PASSING)


class Reader:
    """One connection, opened when it is needed, and again after an error."""

    def __init__(self, address: str, ended: threading.Event) -> None:
        self._address = address
        self._ended = ended
        self._connection: adbc.Connection | None = None
        self._lock = threading.Lock()

    def read(self, read: Callable[[adbc.Connection], Result]) -> Result:
        """Call `read` in a transaction of its own; again, after a pause, if another attempt may succeed.

        Raises:
            DatabaseError: its cause is the last attempt's error.
            StoppedError: the readers were closed meanwhile.
        """
        failure: adbc.Error | None = None
        for pause_s in _PAUSES_S:
            if self._ended.wait(pause_s):
                raise StoppedError("interrupted")
            try:
                if self._connection is None:
                    self._connection = adbc.connect(self._address)
                result = read(self._connection)
                self._connection.commit()
                return result
            except adbc.Error as error:
                self.close()
                failure = error
                if not _may_pass(error):
                    break
        raise read_database_error(failure) from failure

    def cancel(self) -> None:
        """Cancel the running statement, if there is one. Callable from any thread."""
        with self._lock, contextlib.suppress(adbc.Error):
            if self._connection is not None:
                self._connection.adbc_cancel()

    def close(self) -> None:
        """Close the connection, if there is one."""
        with self._lock, contextlib.suppress(adbc.Error):
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()


class Readers:
    """Some readers at work, each in a thread; at the end of the block their statements are cancelled."""

    def __init__(self, database: Database, n_readers: int) -> None:
        of_libpq = {name: value for name, value in CONNECT_ARGS.items() if name != "cursor_factory"}
        address = make_dsn(database.adbc_uri, **of_libpq)
        self._ended = threading.Event()
        self._tasks: SimpleQueue[Callable[[Reader], None] | None] = SimpleQueue()
        self._readers = [Reader(address, self._ended) for _ in range(n_readers)]
        self._threads = [
            # daemons: if a server no longer answers, an interrupted process must be able to end
            threading.Thread(target=self._serve, args=(reader,), daemon=True, name="songvec-reader")
            for reader in self._readers
        ]

    def map(
        self, work: Callable[[Reader, Item], Result], items: Iterable[Item], check: Callable[[], None]
    ) -> Iterator[Result]:
        """Do the work on each item, some side by side; results come in the order of the items.

        Args:
            work: called in a reader's thread.
            items: at most twice as many are begun beyond the result that is waited for as there are readers.
            check: called all along; raises to end it.
        """
        begun: deque[Future[Result]] = deque()
        remaining = iter(items)
        while True:
            check()
            begun.extend(self._begin(work, each) for each in islice(remaining, 2 * len(self._readers) - len(begun)))
            if not begun:
                return
            while not wait([begun[0]], timeout=_POLL_S).done:
                check()
            yield begun.popleft().result()

    def _begin(self, work: Callable[[Reader, Item], Result], item: Item) -> Future[Result]:
        future: Future[Result] = Future()

        def run(reader: Reader) -> None:
            try:
                future.set_result(work(reader, item))
            except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits
                future.set_exception(error)

        self._tasks.put(run)
        return future

    def _serve(self, reader: Reader) -> None:
        while (run := self._tasks.get()) and not self._ended.is_set():
            run(reader)
        reader.close()

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for reader in self._readers:
            self._tasks.put(None)
            if kind is not None:
                # a cancellation waits for the server, too
                threading.Thread(target=reader.cancel, daemon=True, name="songvec-cancel").start()
        for thread in self._threads:
            thread.join()
