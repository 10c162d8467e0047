"""The kinds of index compared: bytes, build, recall, latency, and the pages that a search reads.

    python -m benchmarks.search                    75,000 and 300,000 rows of 2,000 values: about 20 minutes
    python -m benchmarks.search --rows 20000       one other size
    python -m benchmarks.search --demo 20000       only the demo model's vectors, of generated lyrics

Rows are made up to lie as published models' vectors do: about a common mean that has 40 % of their squared length; half
of the rest is shared by the rows of one of √n clusters, whose sizes follow a Pareto distribution; the variance of the
k-th of 512 directions falls as a power of k; with noise in all values. `share by bits alone` shows how near that is:
the share of the true ten nearest rows that are among the ten nearest by bits. Published for 1 M × 1536 real vectors
are 0.67 to 0.69.

Each kind is built as `songvec index` builds it, while the one before serves. Probes and candidates are the fewest that
reach 95 % of all 200 queries: rows of the table, and others between two rows; recall is the lower of both.
Latency is that of `SELECT … FROM songvec.search(…)`, 10 songs, by one caller and by 16 at once. Pages are those of
EXPLAIN (ANALYZE, BUFFERS) of the same statement: index, rows, songs and system catalog, those put into exact order included.
With memory limited to a fifth of the table, by a control group of the server's own, the same searches are made once
more; MB are what the disk gave. 12 M rows are extrapolated as the last table says. Exit code 1 if a goal is missed.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
import psycopg2
from numpy.typing import NDArray

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.search.nearest import record_source
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import SourceNames, find_source
from songvec_assets.songs.text import hash_text
from songvec_assets.storage import Storage
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.probes import find_smallest
from songvec_assets.vectors.index.recall import RecallReport, choose_candidates, write_recall
from songvec_assets.vectors.index.recall_searches import RecallPoint, Searches, to_literal
from songvec_assets.vectors.index.upkeep import bring_index_up_to_date
from songvec_assets.vectors.kinds import KINDS
from songvec_assets.vectors.load import upload_cached_embeddings_to_database
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute

DIMENSIONS, TARGET = 2_000, 0.95
MUCH_SMALLER, FASTER, FEWER_PAGES = 20, 3, 10
_LATENT, _MEAN, _BETWEEN, _FALL, _NOISE = 512, 0.4, 0.5, 0.5, 0.1
_BATCH = 2_000
_CALLERS, _SEARCHES, _EXPLAINED = 16, 200, 40
_CGROUP = Path("/sys/fs/cgroup/memory")
_MEMORY_SHARE, _LEAST_MEMORY = 0.2, 400 << 20
_BIG = 12_000_000

Vectors = NDArray[np.float32]


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
    limited_mb: float = 0.0

    @property
    def point(self) -> RecallPoint:
        """The measurement at the chosen knobs."""
        return self.report.chosen


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

    def measure(self, kind: str) -> Result:
        """Build a kind, choose its knobs, and search."""
        spec = TableSpec(self.cache.model, self.cache.dimensions)
        built = bring_index_up_to_date(self.table, self.cache, spec, IndexSettings(kind=kind, target_recall=TARGET))
        searches = Searches.over(self.table, self.cache)
        searches.limit_s, n_queries = math.inf, len(searches.exact.queries)
        if searches.candidates is not None:
            choose_candidates(searches, TARGET)

        def reaches(probes: int) -> bool:
            return searches.measure(probes, n_queries).recall >= TARGET

        probes = 1
        while not reaches(probes) and probes < searches.lists:
            probes = min(2 * probes, searches.lists)
        report = RecallReport.of(searches, TARGET, find_smallest(reaches, searches.tried, searches.lists))
        with self.database.get_connection() as connection:
            write_recall(connection, self.table, report)
        index = built.index
        result = Result(kind, index.n_rows, index.lists, index.n_bytes, built.seconds, report)
        literals = [to_literal(query) for query in searches.exact.queries]
        for n_callers in (1, _CALLERS):
            result.by_callers[n_callers] = Latency.of(self.search(literals, n_callers))
        result.pages = self.count_pages(literals[:_EXPLAINED])
        with self.limited() as read_bytes:
            if read_bytes is not None:
                before = read_bytes()
                result.limited = Latency.of(self.search(literals, 1))
                result.limited_mb = (read_bytes() - before) / len(literals) / 1e6
        return result

    def search(self, literals: Sequence[str], n_callers: int) -> list[float]:
        """Seconds of each search; each caller has a connection and takes the next query."""
        seconds: list[float] = []
        queue = iter([*literals] * (1 if n_callers == 1 else 3))
        lock = threading.Lock()

        def call() -> None:
            with closing(psycopg2.connect(self.database.adbc_uri)) as connection, connection.cursor() as cursor:
                connection.autocommit = True
                cursor.execute(_SEARCH, (literals[0],))
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

    @contextmanager
    def limited(self) -> Iterator[object]:
        """Keep the server within a fifth of the table's bytes; gives a function of the bytes read from disk, or None."""
        [(n_bytes,)] = execute(self.database.adbc_uri, "SELECT pg_table_size('song_embeddings')")
        group = _CGROUP / f"songvec-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            yield None
            return
        postmaster = (self.folder / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0]
        execute(self.database.adbc_uri, "CHECKPOINT")
        for path in self.folder.glob("base/*/*"):
            with path.open("rb") as file:  # what is in memory now counts in nobody's group
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        limit = max(_LEAST_MEMORY, int(_MEMORY_SHARE * n_bytes))
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(postmaster)
        for pid in _children(postmaster):
            (group / "cgroup.procs").write_text(pid)

        def read_bytes() -> int:
            total = 0
            for pid in (group / "cgroup.procs").read_text().split():
                try:
                    text = Path(f"/proc/{pid}/io").read_text(encoding="utf-8")
                except OSError:
                    continue
                total += int(text.split("\nread_bytes: ")[1].split()[0])
            return total

        try:
            yield read_bytes
        finally:
            for pid in (group / "cgroup.procs").read_text().split():
                (_CGROUP / "cgroup.procs").write_text(pid)
            group.rmdir()


_SEARCH = "SELECT song_id FROM songvec.search(%s, 10)"
