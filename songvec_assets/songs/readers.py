"""Connections that read in parallel, through ADBC; a transient failure is retried on a new connection.

When to add here: another transient failure. Keep out: what is read. Pauses are in seconds.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import adbc_driver_postgresql.dbapi as adbc
from psycopg2.extensions import make_dsn, parse_dsn

from songvec_assets.errors import StoppedError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.messages import read_database_error
from songvec_assets.postgres.sessions import CONNECT_ARGS
from songvec_assets.progress import RunContext
from songvec_assets.songs.source import fetch_rows

_PAUSES_S = (0.0, 1.0, 4.0)
"""Before each attempt: a server that restarts is back after a few seconds."""
_POLL_S = 0.1

_LOST_SERVER = ("08", "57P")
_TRANSIENT = (*_LOST_SERVER, "40", "53", "55", "57", "58")
"""Prefixes of SQLSTATEs (PostgreSQL's appendix of error codes, read 2026-11): lost connections and shutdowns; then also
conflicts, lack of resources, locks, timeouts and system errors."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_server_lost(error: BaseException | None) -> bool:
    """Whether the connection or the server failed, and not the statement."""
    return isinstance(error, adbc.Error) and (error.sqlstate is None or error.sqlstate.startswith(_LOST_SERVER))


def _is_transient(error: adbc.Error) -> bool:
    return error.sqlstate is None or error.sqlstate.startswith(_TRANSIENT)


class Reader:
    """One connection, opened at its first use, and reopened after an error."""

    def __init__(self, address: str, ended: threading.Event) -> None:
        self._address = address
        self._ended = ended
        self._connection: adbc.Connection | None = None
        self._lock = threading.Lock()

    def read(self, read: Callable[[adbc.Connection], Result]) -> Result:
        """Call `read` in a transaction; retry after a pause if another attempt may succeed.

        Raises:
            DatabaseError: all attempts failed; its cause is the last error.
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
                if not _is_transient(error):
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
    """A pool of readers, one thread per reader; an error in the block cancels their statements."""

    def __init__(self, database: Database, n_readers: int) -> None:
        of_libpq = {name: value for name, value in CONNECT_ARGS.items() if name != "cursor_factory"}
        [(quotes_all,)] = fetch_rows(database, "SELECT reset_val FROM pg_settings WHERE name = 'quote_all_identifiers'")
        if quotes_all == "on":
            # ADBC finds types by the names of their functions, and does not recognize quoted names
            given = parse_dsn(database.adbc_uri).get("options", "")
            of_libpq["options"] = f"{given} -c quote_all_identifiers=off".strip()
        address = make_dsn(database.adbc_uri, **of_libpq)
        self._ended = threading.Event()
        self._readers = [Reader(address, self._ended) for _ in range(n_readers)]
        self._idle = SimpleQueue[Reader]()
        for reader in self._readers:
            self._idle.put(reader)
        # daemon threads: an interrupted process must be able to end even if the server no longer answers
        self._pool = ThreadPool(n_readers)

    def map(self, work: Callable[[Reader, Item], Result], items: Iterable[Item], run: RunContext) -> Iterator[Result]:
        """Do the work on each item, in parallel; results are in the order of the items.

        Args:
            work: called in a thread of the pool.
            items: up to two per reader are in progress at a time.
            run: may stop the work.
        """
        begun: deque[AsyncResult[Result]] = deque()
        remaining = iter(items)
        while True:
            run.check_stop()
            for item in islice(remaining, 2 * len(self._readers) - len(begun)):
                begun.append(self._pool.apply_async(self._lend, (work, item)))
            if not begun:
                return
            while not begun[0].ready():
                run.check_stop()
                begun[0].wait(_POLL_S)
            yield begun.popleft().get()

    def _lend(self, work: Callable[[Reader, Item], Result], item: Item) -> Result:
        if self._ended.is_set():
            raise StoppedError("interrupted")
        reader = self._idle.get()
        try:
            return work(reader, item)
        finally:
            self._idle.put(reader)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for reader in self._readers if kind is not None else ():
            # in a thread, since a cancellation waits for the server
            threading.Thread(target=reader.cancel, daemon=True, name="songvec-cancel").start()
        self._pool.close()
        self._pool.join()
        for reader in self._readers:
            reader.close()
