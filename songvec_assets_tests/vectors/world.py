"""A world to break: a database on a server of one's own, a cache of made-up vectors, and what must hold between them.

What happens to it is in `benchmarks/chaos_db.py`. Vectors are compared value by value, as float32.
"""

import contextlib
import re
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import psycopg2
from numpy.typing import NDArray

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache
from songvec_assets.errors import SongvecError
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import Tiling
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.copy import HEADER, TRAILER, row_dtype
from songvec_assets.vectors.swap import drop_others
from songvec_assets.vectors.table import TableSpec
from songvec_assets_tests.administration import dispose, execute, with_parts
from songvec_assets_tests.proxy import Proxy, running_proxy
from songvec_assets_tests.servers import Server
from songvec_assets_tests.vectors.conftest import put

PASSWORD = "open%sesame@7"
"""Of every role; with characters that a URL must encode."""
PATIENCE_S, SETTLE_S = 60.0, 15.0
N_RANGES = 4
INDEX_NAME = "embeddings_ivfflat_idx"

MEANT = "every fault fell where it was meant to, and every disturbed call ended within a minute"
CLEAR = "every error is the package's own, is one line, and says what to do"
SECRET = "no error shows a password"
QUIET = "no traceback is printed"
WHOLE = "after an error each range is in the table as it was or as it is to be, never in between"
LEDGER = "the ledger names just the songs that the table holds"
RERUN = "the same command, started again, completes"
TABLE = "then the table equals the cache, in every value"
INDEX = "then the index is valid and finds every row"
LEFT = "nothing is left that an undisturbed run does not leave: no table, no index, none invalid"
SETTLED = "no advisory lock, prepared transaction or running statement is left"
IDLE = "a further run has nothing to do"
CHECKS = (MEANT, CLEAR, SECRET, QUIET, WHOLE, LEDGER, RERUN, TABLE, INDEX, LEFT, SETTLED, IDLE)

_CODE = re.compile(r"Traceback|psycopg2|sqlalche|\b[A-Z]\w*(Error|Exception)\b|<class|\[SQL|\n")
_ANY_REMEDY = r"again|POSTGRES_URL|SONGVEC_|let .*(owner|superuser)|wait for|free |drop "

Rows = tuple[NDArray[np.int32], NDArray[np.float32]]
"""song_ids in order, (n,), and their vectors, (n, dimensions)."""


class MissedError(Exception):
    """A fault could not be brought about at the moment it was meant for."""


@dataclass(frozen=True)
class Round:
    """One fault at one moment, and what was reported of it."""

    fault: str
    moment: str
    reported: str
    seconds: float
    verdict: str


@dataclass
class Report:
    """What a campaign found.

    Attributes:
        failures: the words of each check that failed.
        not_run: faults that this machine does not allow, and why.
        usual: relations that an undisturbed run leaves.
        thorough: whether a further run is looked at.
    """

    rounds: list[Round] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    usual: set[str] | None = None
    thorough: bool = True

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return not self.failures

    @property
    def n_failures(self) -> int:
        """Of all checks."""
        return sum(map(len, self.failures.values()))

    def expect(self, check: str, holds: object, words: str) -> None:
        """Note a check that does not hold."""
        if not holds:
            self.failures.setdefault(check, []).append(words)

    def render(self, markdown: bool = False) -> str:
        """Rounds and checks as tables; all words of what failed below them."""
        rounds = [vars(each) | {"reported": textwrap.shorten(each.reported, 160)} for each in self.rounds]
        checks = [{"": "FAIL" if check in self.failures else "PASS", "check": check} for check in CHECKS]
        failed = [f"{check}:\n" + "\n".join(f"- {each}" for each in words) for check, words in self.failures.items()]
        return "\n\n".join([*(_table(rows, markdown) for rows in (rounds, checks) if rows), *failed])


class Attempt:
    """A call in a thread of its own, so that it can be disturbed."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run, daemon=True, name="attempt")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
            self._error: Exception | None = error

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self, seconds: float = PATIENCE_S) -> Exception | None:
        """Until it ended; what it raised.

        Raises:
            TimeoutError: it does not end.
        """
        self._thread.join(seconds)
        if self.running:
            raise TimeoutError(f"the call has not ended {seconds:.0f} s after the fault")
        return self._error


@dataclass
class World:
    """A database with its role, a cache, and what is expected of them.

    Attributes:
        name: of the database and of the role that owns it.
        load, build: what the package is asked to do: to make the table equal the cache, and to index it.
        lists, staged_from_rows, may_swap: how.
        moment: what is being done, for people.
        reported: the words of the last error.
        before: rows that the table had before the cache changed.
        schema: of our table, quoted.
        extra: relations that are the fault's own.
    """

    server: Server
    name: str
    folder: Path
    spec: TableSpec
    tiling: Tiling
    report: Report
    load: Callable[["World", Database | None], Any]
    build: Callable[["World", Database | None], Any]
    lists: int | None = None
    staged_from_rows: int = 20_000
    may_swap: bool = True
    moment: str = ""
    reported: str = ""
    before: Rows | None = None
    fault: str = ""
    schema: str = "public"
    extra: set[str] = field(default_factory=set)
    _urls: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cache = ModelCache(LocalStorage(self.folder / "embeddings"), self.spec.model, self.spec.dimensions)
        self.database = self.reach(self.server.port)

    @property
    def n_bytes(self) -> int:
        """What a load of everything sends."""
        return len(self.song_ids) * row_dtype(self.spec.dimensions).itemsize

    @property
    def n_table_bytes(self) -> int:
        """What the table takes on disk, a row a page; its index takes the same."""
        return len(self.song_ids) * 8192

    @property
    def song_ids(self) -> list[int]:
        """Nine in ten of every range: the others are free for foreigners."""
        return [song_id for song_id in range(self.tiling.stop) if song_id % 10 != 9]

    def reach(self, port: int) -> Database:
        """The database as the package's user reaches it through a port."""
        url = with_parts(self.server.url(self.name, self.name, PASSWORD), port=port)
        self._urls.add(url)
        return Database(url)

    @contextlib.contextmanager
    def proxied(self) -> Iterator[tuple[Proxy, Database]]:
        """A proxy before the server, and the database through it."""
        with running_proxy(self.server.port) as proxy:
            yield proxy, self.reach(proxy.port)

    def admin(self, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple]:
        """One statement of a superuser's in this database."""
        return execute(self.server.url(self.name), statement, parameters)

    @contextlib.contextmanager
    def session(self, statement: str) -> Iterator[Any]:
        """Another program's open transaction, after this statement; closed without a commit."""
        connection = psycopg2.connect(self.server.url(self.name), application_name="another")
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
            yield connection
        finally:
            connection.close()

    def change(self, version: int, share: float = 1.0) -> None:
        """Give a share of each range's songs new vectors in the cache."""
        ids = [song_id for song_id in self.song_ids if song_id % 10 < 10 * share]
        put(self.cache, ids, version, self.tiling)

    def use_model(self, spec: TableSpec) -> None:
        """Fill another model's cache, which is to be loaded from now on."""
        self.spec = spec
        self.cache = ModelCache(LocalStorage(self.folder / spec.model), spec.model, spec.dimensions)
        put(self.cache, self.song_ids, 0, self.tiling)

    def wait_for(self, attempt: Attempt, statement: str, parameters: tuple[object, ...] = ()) -> tuple:
        """The first row that a statement finds, while the attempt runs.

        Raises:
            MissedError: the attempt ended before.
        """
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.closing(psycopg2.connect(self.server.url(self.name), application_name="watcher")) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                while attempt.running and time.monotonic() < deadline:
                    cursor.execute(statement, parameters)
                    row: tuple | None = cursor.fetchone()
                    if row:
                        return row
                    time.sleep(0.002)
        raise MissedError(f"it was over, or a minute, before the moment came: {attempt.running=}")

    def note(self, words: str) -> None:
        """Add to what is being done."""
        self.moment = ", ".join(filter(None, (self.moment, words)))

    def expect(self, check: str, holds: object, words: str) -> None:
        """Note a check that does not hold, and when."""
        self.report.expect(check, holds, f"{self.fault}, {self.moment or 'before'}: {words}")

    def expect_clear(self, error: Exception | None, remedy: str = _ANY_REMEDY) -> None:
        """An error came, it is ours, clear, names the remedy (a pattern), and keeps the secrets."""
        words = str(error)
        self.reported = words
        kind = type(error).__name__
        self.expect(CLEAR, isinstance(error, SongvecError), f"{kind} instead of an error of ours: {words[:200]}")
        self.expect(CLEAR, re.search(remedy, words), f"no remedy ({remedy}) in: {words[:300]}")
        self.expect(CLEAR, not _CODE.search(words), f"words of code in: {words[:300]}")
        self.expect(SECRET, PASSWORD not in words and quote(PASSWORD, safe="") not in words, words)

    def expect_whole(self) -> None:
        """Each range of the table is old or new, and the ledger says the same."""
        after, table = self.read_cache(), self.read_table()
        if table is None:
            return
        n_rows = 0
        for song_range in self.tiling:
            held = _between(table, song_range.start, song_range.stop)
            n_rows += len(held[0])
            states = [_between(rows, song_range.start, song_range.stop) for rows in (self.before, after) if rows]
            states += [] if self.before else [_between(table, 0, 0)]
            fits = any(_equal(held, state) for state in states)
            self.expect(WHOLE, fits, f"{song_range.key} has {len(held[0])} rows of neither state")
        self.expect(WHOLE, n_rows == len(table[0]), "rows outside every range")
        self._expect_ledger(table[0])

    def expect_one_state(self) -> None:
        """What searches find is all old or all new, under a valid index."""
        table = self.read_table()
        fits = table and any(_equal(table, rows) for rows in (self.before, self.read_cache()) if rows)
        self.expect(WHOLE, fits, "the serving table is of neither state")
        valid = self.admin("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", (INDEX_NAME,))
        self.expect(INDEX, valid == [(True,)], f"after the error: {valid}")

    def run(self) -> None:
        """Load and build, undisturbed, before a fault."""
        self.load(self, None)
        self.build(self, None)
        self.before = self.read_cache()

    def finish(self) -> None:
        """Run again, undisturbed; then everything must hold."""
        for again in (self.load, self.build):
            try:
                again(self, None)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding, and the campaign goes on
                self.expect(RERUN, False, f"{again.__name__}: {error!r}")
                return
        drop_others(self.database)  # what a swap to another model keeps
        self.expect_right()

    def expect_right(self) -> None:
        """Table, ledger, index and catalogue are as after an undisturbed run; fully, a further one is idle."""
        cache, table = self.read_cache(), self.read_table()
        n_rows = 0 if table is None else len(table[0])
        equal = table is not None and _equal(table, cache)
        self.expect(TABLE, equal, f"{n_rows} rows for {len(cache[0])} vectors, or other values")
        if table is None:
            return
        self._expect_ledger(table[0])
        self._expect_index(n_rows)
        self.expect_settled()
        left = self.read_relations()
        usual = self.report.usual
        self.expect(LEFT, usual is None or left == usual, f"{sorted(left ^ (usual or left))}")
        invalid = self.admin("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
        self.expect(LEFT, not invalid, f"invalid: {invalid}")
        if self.report.thorough:
            loads, built = self.load(self, None).loads, self.build(self, None)
            n_written = sum(each.n_written + each.n_deleted for each in loads)
            self.expect(IDLE, not n_written and not built.built, f"{n_written} rows written or deleted, {built.reason}")

    def expect_no_index(self) -> None:
        """A build that failed left nothing."""
        left = [name for name in self.read_relations() if "ivfflat" in name]
        self.expect(LEFT, not left, f"after the error: {left}")

    def expect_settled(self) -> None:
        """What the package's backends were doing has ended, soon."""
        deadline = time.monotonic() + SETTLE_S
        while (left := self.admin(_UNSETTLED)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.expect(SETTLED, not left, str(left))

    def read_cache(self) -> Rows:
        """The live vectors of all ranges."""
        song_ids = [np.empty(0, np.int32)]
        vectors = [np.empty((0, self.spec.dimensions), np.float32)]
        for song_range in self.cache.ranges():
            cached, live = load_embeddings_from_cache(self.cache, song_range)
            song_ids.append(live["song_id"].to_numpy())
            vectors.append(cached.embeddings_at(live["row"].to_list()))
        return np.concatenate(song_ids), np.concatenate(vectors)

    def read_table(self) -> Rows | None:
        """The table's rows; None where there is none."""
        sink = _Sink()
        found = self.admin(_DIMENSIONS)
        if not found:
            return None
        dtype = row_dtype(found[0][0])
        with self.session("SELECT 1") as session, session.cursor() as cursor:
            rows = "SELECT song_id, embedding FROM song_embeddings ORDER BY song_id"
            cursor.copy_expert(f"COPY ({rows}) TO STDOUT (FORMAT binary)", sink)
        records = np.frombuffer(sink.content[len(HEADER) : -len(TRAILER)], dtype)
        return records["song_id"].astype(np.int32), records["embedding"].astype(np.float32)

    def read_relations(self) -> set[str]:
        """Relations but the server's own and `extra`; those in the world's schema as if they were in `public`."""
        names = {name for (name,) in self.admin(_RELATIONS)} - self.extra
        return {name.replace(f" {self.schema}.", " public.") for name in names}

    def _expect_ledger(self, song_ids: NDArray[np.int32]) -> None:
        named = [np.empty(0, np.int32)]
        for n_songs, ids in self.admin(
            "SELECT n_songs, song_ids FROM songvec.loaded_ranges WHERE table_name = 'song_embeddings' "
            "ORDER BY range_start, range_stop"
        ):
            named.append(np.frombuffer(ids, "<i4"))
            self.expect(LEDGER, n_songs == len(named[-1]), f"it counts {n_songs} songs and names {len(named[-1])}")
        all_named = np.concatenate(named)
        self.expect(LEDGER, np.array_equal(all_named, song_ids), f"{len(all_named)} named, {len(song_ids)} held")

    def _expect_index(self, n_rows: int) -> None:
        name = INDEX_NAME
        found = self.admin(
            "SELECT i.indisvalid, c.reloptions FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE c.oid = to_regclass(%s) AND i.indrelid = to_regclass('song_embeddings')",
            (name,),
        )
        self.expect(INDEX, found and found[0][0], f"{name}: {found or 'there is none'}")
        if not found:
            return
        lists = int(dict(option.split("=") for option in found[0][1])["lists"])
        query = (
            "SELECT song_id FROM song_embeddings "
            "ORDER BY embedding <=> (SELECT embedding FROM song_embeddings LIMIT 1) LIMIT 1000000"
        )
        settings = f"SET enable_seqscan = off; SET enable_sort = off; SET ivfflat.probes = {lists}"
        with self.session(settings) as session, session.cursor() as cursor:
            cursor.execute(f"EXPLAIN {query}")
            self.expect(INDEX, name in str(cursor.fetchall()), "the planner does not take it")
            cursor.execute(f"SELECT count(DISTINCT song_id) FROM ({query}) AS found")
            n_found = cursor.fetchone()[0]
        self.expect(INDEX, n_found == n_rows, f"it finds {n_found} of {n_rows} rows")

    def drop(self) -> None:
        """Remove the database and its role, whoever is connected."""
        if not self.server.running:
            self.server.start()
        for url in self._urls:
            dispose(url)
        postgres = self.server.url()
        execute(postgres, f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")
        if execute(postgres, "SELECT 1 FROM pg_roles WHERE rolname = %s", (self.name,)):
            execute(postgres, f"DROP OWNED BY {self.name}")
            execute(postgres, f"DROP ROLE {self.name}")


@contextlib.contextmanager
def new_world(
    server: Server,
    folder: Path,
    report: Report,
    load: Callable[[World, Database | None], Any],
    build: Callable[[World, Database | None], Any],
    n_songs: int,
    dimensions: int,
) -> Iterator[World]:
    """A database of its own, of a role that is no superuser, and a filled cache; both are gone after the block."""
    name = f"world_{uuid.uuid4().hex[:12]}"
    width = n_songs // N_RANGES * 10 // 9 // 10 * 10
    spec, tiling = TableSpec("model-a", dimensions), Tiling(width, width * N_RANGES)
    world = World(server, name, folder / name, spec, tiling, report, load, build)
    try:
        execute(server.url(), f"CREATE ROLE {name} LOGIN PASSWORD %s", (PASSWORD,))
        execute(server.url(), f"CREATE DATABASE {name} OWNER {name}")
        put(world.cache, world.song_ids, 0, world.tiling)
        yield world
    finally:
        world.drop()


@contextlib.contextmanager
def watched_tracebacks(report: Report) -> Iterator[None]:
    """Note tracebacks that would be printed: of threads that end in one, and of code in C that nobody called."""
    usual = sys.excepthook, threading.excepthook

    def note(kind: type[BaseException], error: BaseException | None, _: TracebackType | None) -> None:
        # psycopg2 prints this one itself if a server is killed in a COPY: raising it once is enough
        if kind is SystemError and isinstance(error.__cause__ if error else None, psycopg2.Error):
            return
        report.expect(QUIET, False, f"{threading.current_thread().name}: {kind.__name__}: {error}")

    sys.excepthook, threading.excepthook = (
        note,
        lambda ended: note(ended.exc_type, ended.exc_value, ended.exc_traceback),
    )
    try:
        yield
    finally:
        sys.excepthook, threading.excepthook = usual


class _Sink:
    """A file that COPY TO writes to."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, piece: bytes) -> None:
        self.content += piece


def _between(rows: Rows, start: int, stop: int) -> Rows:
    piece = slice(*np.searchsorted(rows[0], [start, stop]))
    return rows[0][piece], rows[1][piece]


def _equal(some: Rows, others: Rows) -> bool:
    return all(np.array_equal(*pair) for pair in zip(some, others, strict=True))


def _table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [[*rows[0]], *([str(value) for value in row.values()] for row in rows)]
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
        cells.insert(1, ["---"] * len(cells[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


_RELATIONS = """
    SELECT format('%s %I.%I', CASE c.relkind WHEN 'i' THEN 'index' WHEN 'r' THEN 'table' ELSE c.relkind::text END,
        n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND n.nspname !~ '^pg_(toast_)?temp_'
"""

_DIMENSIONS = """
    SELECT atttypmod FROM pg_attribute WHERE attrelid = to_regclass('song_embeddings') AND attname = 'embedding'
"""

_UNSETTLED = """
    SELECT 'advisory lock', pid::text FROM pg_locks
    WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL SELECT 'prepared transaction', gid FROM pg_prepared_xacts WHERE database = current_database()
    UNION ALL SELECT coalesce(state, backend_type), query FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'songvec%' AND state IS DISTINCT FROM 'idle'
"""
