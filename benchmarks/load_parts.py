"""What `benchmarks.load` does to a server and measures there: rounds of all clients, and the long load."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load_process import Outcome, run_client
from benchmarks.loaders import CLIENTS, SERVER, THIS, THIS_TWO, Job, write_ready_files
from benchmarks.vectors import MODEL, change_songs, fill_ranges, make_vectors, put_songs
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.load import N_CONNECTIONS, upload_cached_embeddings_to_database
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.table import SERVING, TableSpec, VectorTable, define_table
from songvec_assets_tests.administration import execute

_STORAGES = {"p": "PLAIN", "e": "EXTERNAL", "x": "EXTENDED"}


@dataclass(frozen=True)
class Size:
    """How much is loaded.

    Attributes:
        dimensions: values per vector.
        range_rows: rows per range.
        n_ranges, n_ranges_long: of the rounds and of the long part.
        n_rounds: of all clients.
        n_changes: how often 1 % of the songs change, and then how often all of one range.
    """

    dimensions: int = 2_000
    range_rows: int = 50_000
    n_ranges: int = 2
    n_ranges_long: int = 20
    n_rounds: int = 3
    n_changes: int = 10


class Figure(NamedTuple):
    """A measure, and the least or most that it has to be."""

    name: str
    value: float
    bound: float
    at_least: bool = True
    unit: str = ""
    spread: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is what it has to be."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> list[str]:
        """For a table."""
        bound = f"{'>=' if self.at_least else '<='} {self.bound:g}{self.unit}"
        return [self.name, f"{self.value:.2f}{self.unit}", self.spread, bound, "yes" if self.holds else "NO"]


class Search(NamedTuple):
    """The first search of a loaded table and the next one, both of all rows; pages are those the first wrote to."""

    first_ms: float
    next_ms: float
    n_dirtied: int


class Change(NamedTuple):
    """A load of changed songs, and a VACUUM after it.

    Attributes:
        n_written: rows.
        cache_bytes, wal_bytes: written to the cache by the change, and to the WAL by the load.
        seconds: of the load.
        n_pages: of the table, after VACUUM.
        n_dead_kept: dead rows that VACUUM left.
    """

    n_written: int
    cache_bytes: int
    wal_bytes: int
    seconds: float
    n_pages: int
    n_dead_kept: int


@dataclass
class Result:
    """All that was measured."""

    settings: str = ""
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    storages: dict[str, str] = field(default_factory=dict)
    searches: dict[str, list[Search]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    reloads: list[Change] = field(default_factory=list)


class Bench:
    """A server, a folder, and the table as the server's administrator sees it."""

    def __init__(self, url: str, folder: Path, size: Size, vector_type: str) -> None:
        self.url, self.folder, self.size = url, folder, size
        self.database = Database(url)
        self.spec = TableSpec(MODEL, size.dimensions, vector_type)
        self.tiling = Tiling(size.range_rows, size.range_rows * max(size.n_ranges, size.n_ranges_long))
        ensure_schema(self.database)

    def ask(self, statement: str) -> Any:
        """One value."""
        return execute(self.database.adbc_uri, statement)[0][0]

    def cache(self, name: str) -> ModelCache:
        """A cache of that name."""
        return ModelCache(LocalStorage(self.folder / name), MODEL, self.size.dimensions)

    def reset(self, plain: bool | None) -> None:
        """Drop the table and what is recorded of it; create it again if a storage is given. Then CHECKPOINT."""
        with self.database.get_connection() as connection:
            VectorTable(self.database).drop(connection)
            if plain is not None:
                define_table(self.spec).create(connection)
        if plain:
            execute(self.database.adbc_uri, f"ALTER TABLE {SERVING} ALTER COLUMN embedding SET STORAGE PLAIN")
        execute(self.database.adbc_uri, "CHECKPOINT")

    def check_rows(self, n_rows: int) -> None:
        """Raise if the table does not hold exactly the first rows, or has wrong vectors for some of them."""
        if (found := self.ask(f"SELECT count(*) FROM {SERVING}")) != n_rows:
            raise RuntimeError(f"expected {n_rows:,} rows in the table, got {found:,}")
        for song_id in (0, n_rows // 2, n_rows - 1):
            values = self.ask(f"SELECT embedding::real[]::text FROM {SERVING} WHERE song_id = {song_id}")
            stored = np.array(values.strip("{}").split(","), dtype=np.float32)
            expected = make_vectors(np.array([song_id], dtype=np.int32), self.size.dimensions)[0]
            if not np.allclose(stored, expected, rtol=0 if self.spec.vector_type == "vector" else 1e-3):
                raise RuntimeError(f"the vector of song_id {song_id} is not the one that was loaded")

    def search(self) -> Search:
        """Find the ten nearest rows by reading all, twice."""
        vector = json.dumps(make_vectors(np.array([7], dtype=np.int32), self.size.dimensions)[0].tolist())
        statement = (
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "
            f"SELECT song_id FROM {SERVING} ORDER BY embedding <=> '{vector}'::{self.spec.vector_type} LIMIT 10"
        )
        [first], [following] = self.ask(statement), self.ask(statement)
        return Search(first["Execution Time"], following["Execution Time"], first["Plan"]["Shared Dirtied Blocks"])

    @property
    def n_pages(self) -> int:
        """Of the table, of 8 KiB."""
        return int(self.ask(f"SELECT pg_relation_size('{SERVING}') / 8192"))

    @property
    def n_dead(self) -> int:
        """Dead rows of the table, as the server counts them."""
        return int(self.ask(f"SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = '{SERVING}'::regclass"))

    @contextmanager
    def count_wal(self) -> Iterator[list[int]]:
        """Bytes of WAL that the block made the server write, in the list after its end."""
        counted: list[int] = []
        before = self.ask("SELECT pg_current_wal_insert_lsn()")
        yield counted
        counted.append(int(self.ask(f"SELECT pg_current_wal_insert_lsn() - '{before}'::pg_lsn")))


def run_rounds(bench: Bench, clients: list[str], result: Result) -> None:
    """All clients, round by round, on the same rows."""
    size, cache = bench.size, bench.cache("rounds")
    n_rows = size.n_ranges * size.range_rows
    fill_ranges(cache, bench.tiling, n_rows)
    job = Job(bench.url, cache, bench.tiling, bench.spec, bench.folder / "ready", n_rows)
    write_ready_files(job)
    bench.reset(plain=True)
    run_client(SERVER, job)  # the first load of a server makes its WAL files
    for _ in range(size.n_rounds):
        for name in clients:
            client = CLIENTS[name]
            bench.reset(plain=None if client.makes_table else client.plain)
            outcome = run_client(name, job._replace(n_rows=max(1, round(n_rows * client.share))))
            result.outcomes.setdefault(name, []).append(outcome)
            storage = bench.ask(
                f"SELECT attstorage FROM pg_attribute WHERE attrelid = '{SERVING}'::regclass AND attname = 'embedding'"
            )
            result.storages[name] = _STORAGES[storage]
            if name in (THIS, SERVER):
                result.searches.setdefault(name, []).append(bench.search())
            bench.check_rows(outcome.n_rows)


def run_long(bench: Bench, result: Result) -> None:
    """A million rows by the defaults, then what 1 % changed songs cost, and a range that is written again."""
    size, cache = bench.size, bench.cache("long")
    n_rows = size.n_ranges_long * size.range_rows
    n_bytes = fill_ranges(cache, bench.tiling, n_rows)
    bench.reset(plain=None)
    name, job = (
        THIS_TWO if N_CONNECTIONS == 2 else THIS,
        Job(bench.url, cache, bench.tiling, bench.spec, Path(), n_rows),
    )
    with bench.count_wal() as wal:
        outcome = run_client(name, job)
    full_wal = wal[0]
    bench.check_rows(n_rows)
    first, last = outcome.marks[25] - outcome.marks[0], outcome.marks[100] - outcome.marks[75]
    n_pages = bench.n_pages
    result.facts += [
        (f"{n_rows:,} rows", f"{n_rows / outcome.seconds:,.0f} rows/s, {outcome.seconds:.1f} s"),
        ("first quarter", f"{n_rows / 4 / first:,.0f} rows/s"),
        ("last quarter", f"{n_rows / 4 / last:,.0f} rows/s"),
        ("VACUUM (ANALYZE) afterwards", f"{outcome.upkeep_s:.1f} s"),
        ("WAL, cache, table", f"{full_wal / 1e9:.2f}, {n_bytes / 1e9:.2f}, {n_pages * 8192 / 1e9:.2f} GB"),
    ]
    for version in range(1, size.n_changes + 1):
        cache_bytes = change_songs(cache, bench.tiling, n_rows, 0.01, version)
        result.changes.append(_load_changed(bench, cache, cache_bytes))
    reloaded = next(iter(bench.tiling))
    song_ids = np.arange(reloaded.start, reloaded.stop, dtype=np.int32)
    for version in range(size.n_changes + 1, 2 * size.n_changes + 1):
        result.reloads.append(_load_changed(bench, cache, put_songs(cache, reloaded, song_ids, version)))
    result.figures += [
        Figure(f"peak RssAnon of {n_rows:,} rows", outcome.peak_anon_mb, 300, False, " MB"),
        Figure("last quarter's rate / first quarter's", first / last, 0.9),
        _share("rows written", [each.n_written for each in result.changes], n_rows),
        _share("WAL", [each.wal_bytes for each in result.changes], full_wal),
        _share("cache bytes written", [each.cache_bytes for each in result.changes], n_bytes),
        Figure(
            f"{size.n_changes} changes: pages of the table / first load's",
            result.changes[-1].n_pages / n_pages,
            1.05,
            False,
        ),
        Figure(
            f"{size.n_changes} reloads of a range: pages that the table grew by, after the first / rows of the range",
            (result.reloads[-1].n_pages - result.reloads[0].n_pages) / size.range_rows,
            0.01,
            False,
        ),
        Figure(
            "dead rows left by VACUUM", max(each.n_dead_kept for each in [*result.changes, *result.reloads]), 0, False
        ),
    ]


def _share(name: str, values: list[int], full: int) -> Figure:
    """Of a full load's figure; the server's own upkeep may fall into one load and not into another."""
    shares = [100 * value / full for value in values]
    spread = f"{min(shares):.2f}–{max(shares):.2f}"
    return Figure(f"1 % changed: {name} / full load's", median(shares), 3, False, " %", spread)


def _load_changed(bench: Bench, cache: ModelCache, cache_bytes: int) -> Change:
    execute(bench.database.adbc_uri, "CHECKPOINT")
    started = time.perf_counter()
    with bench.count_wal() as wal:
        loads = upload_cached_embeddings_to_database(
            VectorTable(bench.database),
            LoadSource(cache, bench.tiling, Snapshots(cache.storage.within("songs"))),
            bench.spec,
        )
    seconds = time.perf_counter() - started
    execute(bench.database.adbc_uri, f"VACUUM {SERVING}")
    n_written = sum(each.n_written for each in loads)
    return Change(n_written, cache_bytes, wal[0], seconds, bench.n_pages, bench.n_dead)
