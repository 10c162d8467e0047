"""Songs as Arrow through ADBC, over connections that read in parallel; a transient failure is retried on a new one.

When to add here: another transient failure, or another reason why rows cannot be read. Keep out: which rows are read
(`export`), and SQL (`source`). Pauses are in seconds.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from queue import SimpleQueue
from typing import TypeVar

import adbc_driver_postgresql.dbapi as adbc
import polars as pl
import pyarrow as pa
import sqlalchemy as sa
from psycopg2.extensions import make_dsn, parse_dsn

from songvec_assets.errors import SourceError, StoppedError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.messages import read_database_error
from songvec_assets.postgres.sessions import CONNECT_ARGS
from songvec_assets.progress import INTERRUPTED, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.source import SONGS, SONGS_AS_BYTES, SongsSource
from songvec_assets.songs.text import FIELDS

_PAUSES_S = (0.0, 1.0, 4.0)
"""Before each attempt: a server that restarts is back after a few seconds."""
_POLL_S = 0.1
_BATCH_BYTES = 4 << 20

_LOST_SERVER = ("08", "57P")
_TRANSIENT = (*_LOST_SERVER, "40", "53", "55", "57", "58")
"""Prefixes of SQLSTATEs (PostgreSQL's appendix of error codes, read 2026-11): lost connections and shutdowns; then also
conflicts, lack of resources, locks, timeouts and system errors."""
# no equivalent in UTF-8; invalid in the database's encoding
_UNDECODABLE = ("22P05", "22021")

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_server_lost(error: BaseException | None) -> bool:
    """Whether the connection or the server failed, and not the statement."""
    return isinstance(error, adbc.Error) and (error.sqlstate is None or error.sqlstate.startswith(_LOST_SERVER))


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
                raise StoppedError(INTERRUPTED)
            try:
                if self._connection is None:
                    self._connection = adbc.connect(self._address)
                result = read(self._connection)
                self._connection.commit()
                return result
            except Exception as error:
                # whatever it was, its transaction must not be that of the next range
                self.close()
                if not isinstance(error, adbc.Error):
                    raise
                failure = error
                if error.sqlstate is not None and not error.sqlstate.startswith(_TRANSIENT):
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
        with database.get_connection() as connection:
            asked = sa.text("SELECT reset_val FROM pg_settings WHERE name = 'quote_all_identifiers'")
            quotes_all = connection.scalar(asked)
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
            raise StoppedError(INTERRUPTED)
        reader = self._idle.get()
        try:
            return work(reader, item)
        finally:
            self._idle.put(reader)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        for reader in self._readers if kind is not None else ():
            # in a thread, since a cancellation waits for the server
            threading.Thread(target=reader.cancel, daemon=True, name="songvec-cancel").start()
        self._pool.close()
        self._pool.join()
        for reader in self._readers:
            reader.close()


def read_columns(
    connection: adbc.Connection, source: SongsSource, columns: str, song_range: SongIdRange, condition: str
) -> pa.Table:
    """Read a range's songs, ordered by song_id.

    Args:
        columns: song_id first; see `SongsSource.select`.
        condition: limits the rows; made by a method of SongsSource; empty: all.

    Raises:
        SourceError: a song_id is there more than once.
    """
    with connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
        cursor.execute(source.select(columns, song_range, condition))
        songs = cursor.fetch_arrow_table()
    song_ids = pl.Series(songs["song_id"])
    repeated = song_ids.filter(song_ids.diff() == 0)
    if len(repeated):
        raise SourceError(
            f"column {source.song_id_column!r} of {source.table} must be unique, {repeated[0]} is there more than "
            "once: name another column with SONGVEC_SONG_ID_COLUMN",
            "source.id-column",
        )
    return songs


def read_songs_from_postgres(
    connection: adbc.Connection, source: SongsSource, song_range: SongIdRange, condition: str = ""
) -> pa.Table:
    """Read a range's songs with their texts; see `read_columns`.

    Returns:
        Columns song_id (int32), name, artist, lyrics, source_hash; if some texts cannot be decoded, also undecodable:
        the reason, or null.
    """
    try:
        songs = read_columns(connection, source, SONGS, song_range, condition)
        # the server does not check texts that need no conversion to UTF-8. 10 ms per 50,000 songs
        songs.validate(full=True)
    except adbc.Error as error:
        if not (error.sqlstate or "").startswith(_UNDECODABLE):
            raise
        connection.rollback()
    except pa.ArrowInvalid:
        pass
    else:
        return songs
    return _decode(read_columns(connection, source, SONGS_AS_BYTES, song_range, condition), source.codec)


def _decode(songs: pa.Table, codec: str) -> pa.Table:
    """Decode texts one by one; what is invalid in the database's encoding gets a reason and replacement characters."""
    reasons: list[str | None] = [None] * songs.num_rows
    for column, name in enumerate(FIELDS, start=1):
        texts: list[str | None] = []
        for row, value in enumerate(songs[name].to_pylist()):
            try:
                texts.append(None if value is None else value.decode(codec))
            except UnicodeDecodeError:
                texts.append(value.decode(codec, "replace"))
                reasons[row] = reasons[row] or f"the song's {name} is not valid {codec.upper()}"
        songs = songs.set_column(column, name, pa.array(texts, pa.string()))
    return songs.append_column("undecodable", pa.array(reasons, pa.string()))
