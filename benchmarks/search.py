"""The kinds of index compared: bytes, build, recall, latency, and the pages that a search reads.

    python -m benchmarks.search                  75,000 and 300,000 rows of 2,000 values: 15 minutes
    python -m benchmarks.search --rows 5000 20000        two other sizes

Rows are made up, see `lifelike`. Each kind is built as `songvec index` builds it, while the one before serves. Probes
and candidates are the fewest that reach 95 % of 200 queries without a time limit: rows of the table, and queries
between two rows; recall is the lower of both. Milliseconds are those of `SELECT … FROM songvec.search(…)` for ten
songs, by one caller and by 16 at once. Pages are those of EXPLAIN (ANALYZE, BUFFERS) of the same statement: of index,
rows put into exact order, songs and system catalog. The same searches are made once more by a server that is kept
within a fifth of the table's bytes, its files in the kernel's memory included. The second table extrapolates to 12
million rows, as `extrapolate` says; the last has a few thousand real vectors, by the demo's model. Exit code 1 if bits
in lists miss a goal: a twentieth of the bytes, a third of the build's time, a tenth of the pages at 12 million rows, at
equal recall.
"""

import argparse
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
import psycopg2

from benchmarks.control_group import limited_memory
from benchmarks.lifelike import Vectors, make_real_rows, make_rows, share_by_bits
from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.search.nearest import record_source
from songvec_assets.settings import DEMO_DIMENSIONS, PostgresSettings
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import find_source
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.kinds import KINDS
from songvec_assets.vectors.index.probes import find_smallest
from songvec_assets.vectors.index.recall import RecallReport, choose_candidates, write_recall
from songvec_assets.vectors.index.recall_searches import RecallSearches
from songvec_assets.vectors.index.sizing import choose_lists, format_bytes
from songvec_assets.vectors.index.upkeep import bring_index_up_to_date
from songvec_assets.vectors.load import upload_cached_embeddings_to_database
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import dispose, execute

Batches = Iterable[tuple[list[int], Vectors]]
"""song_ids and vectors, (n, dimensions)."""

DIMENSIONS, TARGET, BIG = 2_000, 0.95, 12_000_000
SMALLER, FASTER, FEWER_PAGES = 20, 3, 10
JUDGED = "ivfflat_bit"
_PAGE = 8192
_CALLERS, _EXPLAINED, _SAMPLED = 16, 40, 20_000
_MEMORY_SHARE, _LEAST_MEMORY = 0.2, 400 << 20
_SEARCH = "SELECT song_id FROM songvec.search(%s, 10)"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of searches."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """From each search's seconds."""
        return cls(*np.percentile(1e3 * np.array(seconds), [50, 99]).tolist())

    def __str__(self) -> str:
        return f"{self.p50:,.1f} / {self.p99:,.0f}"


@dataclass
class Result:
    """What was measured of a kind at one number of rows."""

    kind: str
    n_rows: int
    lists: int
    n_bytes: int
    seconds: float
    report: RecallReport
    by_callers: dict[int, Latency] = field(default_factory=dict)
    pages: float = 0.0
    limited: Latency | None = None

    @property
    def list_pages(self) -> float:
        """Of its pages, those of the lists visited."""
        return self.n_bytes / _PAGE * self.report.probes / self.lists if self.lists else 0.0


@dataclass(frozen=True)
class World:
    """A loaded table on a server of its own.

    Attributes:
        database: with the songs and their vectors.
        folder: of the server's data.
        cache: that the table was loaded from.
    """

    database: Database
    folder: Path
    cache: ModelCache

    @property
    def table(self) -> VectorTable:
        """What is searched."""
        return VectorTable(self.database)

    @property
    def spec(self) -> TableSpec:
        """What it holds."""
        return TableSpec(self.cache.model, self.cache.dimensions)

    def measure(self, kind: str) -> Result:
        """Build a kind, choose its knobs, and search."""
        wanted = IndexSettings(kind=kind, target_recall=TARGET)
        built = bring_index_up_to_date(self.table, self.cache, self.spec, wanted)
        searches = RecallSearches.over(self.table, self.cache)
        report, index = choose_knobs(searches), built.index
        with self.database.get_connection() as connection:
            write_recall(connection, self.table, report)
        result = Result(kind, index.n_rows, index.lists, index.n_bytes, built.seconds, report)
        literals = [json.dumps(query.tolist()) for query in searches.exact.queries]
        result.by_callers = {n: Latency.of(self.search(literals, n)) for n in (1, _CALLERS)}
        result.pages = self.count_pages(literals[:_EXPLAINED])
        [(n_bytes,)] = execute(self.database.adbc_uri, "SELECT pg_table_size('song_embeddings')")
        limit = max(_LEAST_MEMORY, round(_MEMORY_SHARE * n_bytes))
        with limited_memory(self.database.adbc_uri, self.folder, limit) as is_limited:
            if is_limited:
                result.limited = Latency.of(self.search(literals[:_EXPLAINED], 1))
        print(f"{result.n_rows:,} rows, {kind}: {built.reason}", file=sys.stderr, flush=True)
        return result

    def search(self, literals: Sequence[str], n_callers: int) -> list[float]:
        """Seconds of each search; each caller has a connection, and takes the next query."""
        seconds: list[float] = []
        queue, lock = iter([*literals] * (1 if n_callers == 1 else 3)), threading.Lock()

        def call() -> None:
            with closing(psycopg2.connect(self.database.adbc_uri)) as connection, connection.cursor() as cursor:
                connection.autocommit = True
                cursor.execute(_SEARCH, (literals[0],))  # loads the library and the catalog
                while True:
                    with lock:
                        literal = next(queue, None)
                    if literal is None:
                        return
                    started = time.perf_counter()
                    cursor.execute(_SEARCH, (literal,))
                    cursor.fetchall()
                    seconds.append(time.perf_counter() - started)

        threads = [threading.Thread(target=call) for _ in range(n_callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seconds

    def count_pages(self, literals: Sequence[str]) -> float:
        """Pages that a search reads, from the server's buffers or the disk, on average."""
        pages = []
        with closing(psycopg2.connect(self.database.adbc_uri)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            for literal in [literals[0], *literals]:
                cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {_SEARCH}", (literal,))
                plan = cursor.fetchone()[0][0]["Plan"]
                pages.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
        return mean(pages[1:])


def choose_knobs(searches: RecallSearches) -> RecallReport:
    """The fewest candidates and probes that reach the target, by all queries."""
    searches.limit_s, n_queries, probes = math.inf, len(searches.exact.queries), 1
    if searches.candidates is not None:
        choose_candidates(searches, TARGET)

    def reaches(probes: int) -> bool:
        return searches.measure(probes, n_queries).recall >= TARGET

    while not reaches(probes) and probes < searches.lists:
        probes = min(2 * probes, searches.lists)
    return RecallReport.of(searches, TARGET, find_smallest(reaches, searches.tried, searches.lists))


def build_world(folder: Path, n_rows: int, dimensions: int, batches: Batches) -> World:
    """Load rows, with a song each."""
    database = start_embedded_server(folder / "pg")
    ensure_schema(database)
    url = database.adbc_uri
    execute(url, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
    execute(
        url,
        "INSERT INTO songs SELECT n, 'Song ' || n, 'Artist ' || n % 5000, repeat('la ', 300) "
        f"FROM generate_series(0, {n_rows - 1}) n",
    )
    execute(url, "VACUUM ANALYZE songs")
    cache = ModelCache(LocalStorage(folder / "cache"), "made-up", dimensions)
    tiling = Tiling(50_000, 50_000 * math.ceil(n_rows / 50_000))
    for song_ids, vectors in batches:
        cached, _ = load_embeddings_from_cache(cache, tiling.range_of(song_ids[0]))
        write_embeddings_to_file(cached, song_ids, [hash_text(str(each)) for each in song_ids], vectors)
    world = World(database, folder / "pg", cache)
    source = LoadSource(cache, tiling, Snapshots(cache.storage.within("songs")))
    upload_cached_embeddings_to_database(world.table, source, world.spec)
    record_source(database, find_source(database, PostgresSettings()), ())
    return world


def measure(n_rows: int, dimensions: int, batches: Batches | None = None) -> list[Result]:
    """All kinds at one number of rows, made up unless given, on a server that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="search-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        world = build_world(folder, n_rows, dimensions, batches or make_rows(n_rows, dimensions))
        try:
            return [world.measure(kind) for kind in KINDS]
        finally:
            dispose(world.database.url)


def extrapolate(few: Result, many: Result, n_rows: int) -> tuple[float, float, float]:
    """The bytes, probes and pages of a kind at more rows.

    Bytes grow with the rows, and pages of lists with the rows of the lists visited; the other pages stay, as candidates
    do. Probes grow as a power of the rows, as they did between the two sizes, but at least with the square root of the
    lists. The pages of a graph grow with the logarithm of the rows.
    """
    n_bytes = many.n_bytes * n_rows / many.n_rows
    if not many.lists:
        return n_bytes, many.report.probes, many.pages * math.log(n_rows) / math.log(many.n_rows)
    power = math.log(many.report.probes / few.report.probes) / math.log(many.n_rows / few.n_rows)
    probes = many.report.probes * (n_rows / many.n_rows) ** max(0.25, power)
    return n_bytes, probes, many.pages - many.list_pages + n_bytes / _PAGE * probes / choose_lists(n_rows)


def render_measured(results: list[list[Result]]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| rows | kind | index | build s | probes | candidates | recall@10 (95 % interval) | 1 caller, p50 / p99 ms "
        f"| {_CALLERS} callers, ms | pages | in a fifth of the memory, ms |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in (each for of_size in results for each in of_size):
        point, of = each.report.chosen, f" of {each.lists:,}" if each.lists else ""
        lines.append(
            f"| {each.n_rows:,} | {each.kind} | {format_bytes(each.n_bytes)} | {each.seconds:.1f} "
            f"| {point.probes:,}{of} | {each.report.candidates or ''} "
            f"| {point.recall:.3f} ({point.low:.3f}–{point.high:.3f}) | {each.by_callers[1]} "
            f"| {each.by_callers[_CALLERS]} | {each.pages:,.0f} | {each.limited or 'not measured'} |"
        )
    return "\n".join(lines)


def render_extrapolated(results: list[list[Result]]) -> str:
    """What follows from them for 12 million rows, as a table in Markdown."""
    lines = [
        "| 12 M rows, extrapolated | index | smaller | build, faster at the last size | probes | pages | fewer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for few, many in zip(results[0], results[-1], strict=True):
        n_bytes, probes, pages = extrapolate(few, many, BIG)
        lines.append(
            f"| {many.kind} | {n_bytes / 1e9:,.1f} GB | {compare(results, many.kind)[0]:.1f} "
            f"| {compare(results, many.kind)[1]:.1f} | {probes:,.0f} | {pages:,.0f} "
            f"| {compare(results, many.kind)[2]:.1f} |"
        )
    return "\n".join(lines)


def compare(results: list[list[Result]], kind: str) -> tuple[float, float, float]:
    """How many times smaller, faster to build and, at 12 million rows, cheaper to read a kind is than the default."""
    (few, many), (few_of, many_of) = [
        [next(each for each in of_size if each.kind == name) for of_size in (results[0], results[-1])]
        for name in ("ivfflat", kind)
    ]
    pages = extrapolate(few, many, BIG)[2] / extrapolate(few_of, many_of, BIG)[2]
    return many.n_bytes / many_of.n_bytes, many.seconds / many_of.seconds, pages


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs=2, default=[75_000, 300_000])
    given = parser.parse_args()
    sample = np.concatenate([vectors for _, vectors in make_rows(_SAMPLED, DIMENSIONS)])
    share = share_by_bits(np.random.default_rng(0).permutation(sample))
    results = [measure(n_rows, DIMENSIONS) for n_rows in given.rows]
    print(f"{render_measured(results)}\n\n{render_extrapolated(results)}")
    print(f"\nBy bits alone, recall@10 of {_SAMPLED:,} such rows is {share:.2f}.")
    real = [*make_real_rows()]
    n_real = sum(len(song_ids) for song_ids, _ in real)
    print(f"\nReal vectors, by the demo's model:\n\n{render_measured([measure(n_real, DEMO_DIMENSIONS, real)])}")
    goals = dict(zip(("smaller", "faster", "fewer pages"), (SMALLER, FASTER, FEWER_PAGES), strict=True))
    reached = dict(zip(goals, compare(results, JUDGED), strict=True))
    missed = [name for name, goal in goals.items() if reached[name] < goal]
    if not next(each for each in results[-1] if each.kind == JUDGED).report.reached:
        missed.append("recall")
    print(f"{JUDGED} misses: {', '.join(missed)}" if missed else f"{JUDGED} reaches all goals: {goals}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
