"""Index builds compared with pgvector's defaults on the same rows, recall and latency of both, and what halfvec saves.

    python -m benchmarks.index                     100,000 and 300,000 rows of 2,000 dimensions
    python -m benchmarks.index --rows 20000        another size; --rounds says how often each is built

Rows are made up: the square root of n clusters, of sizes that follow a Pareto distribution; a row is its cluster's
centre plus noise of 0.7 of its length in 64 dimensions, turned into 2,000 by a random matrix, plus a little noise in
all of them, on the unit sphere. Stock is the table as CREATE TABLE makes it (vectors in TOAST) and the server's default
settings, except for the least maintenance_work_mem that the build accepts; with the default it is an error, which is
shown. Ours is this package's table and session settings. Both have the same lists, and are built in a transaction, in
turn, three times; ours also as halfvec, and, once, of the first size while writers go on. The last one is searched.
Ratios are taken within a round. Latency is a search's round trip, of 20; recall is the lower of two kinds of queries,
100 each, against an exact scan, without the time limit that runs have.
Exit code 1 if ours is not 1.2 times as fast as stock, or its recall is over 0.01 lower at equal probes.
"""

import argparse
import math
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.index.build import create_index, swap_names
from songvec_assets.vectors.index.kinds import IVFFLAT
from songvec_assets.vectors.index.probes import find_smallest
from songvec_assets.vectors.index.recall import DEFAULT_TARGET, RecallReport, measure_recall
from songvec_assets.vectors.index.recall_searches import RecallPoint, RecallSearches
from songvec_assets.vectors.index.sizing import (
    choose_lists,
    estimate_build,
    format_bytes,
    kmeans_bytes,
    read_capacity,
)
from songvec_assets.vectors.load import upload_cached_embeddings_to_database
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.table import SERVING, STAGING, TableSpec, VectorTable

FASTER, WITHIN = 1.2, 0.01
DIMENSIONS = 2_000
STOCK, HALF = f"{SERVING}_stock", f"{SERVING}_half"
OURS, HALVED = "ours", "ours, halfvec"
_LATENT, _SPREAD, _EVERYWHERE = 64, 0.7, 0.02
_BATCH = 2_000


@dataclass(frozen=True)
class Build:
    """A build: seconds and bytes."""

    seconds: float
    index_bytes: int
    table_bytes: int
    temporary_bytes: int


@dataclass
class Result:
    """What was measured at one number of rows."""

    n_rows: int
    lists: int
    default_error: str = ""
    builds: dict[str, list[Build]] = field(default_factory=dict)
    recalls: dict[str, RecallReport] = field(default_factory=dict)
    as_run: RecallReport | None = None

    def faster(self, name: str) -> list[float]:
        """Stock's seconds over a build's, round by round."""
        rounds = zip(self.builds["stock"], self.builds[name], strict=True)
        return [stock.seconds / build.seconds for stock, build in rounds]

    @property
    def shared(self) -> list[int]:
        """The probes that all indexes were measured at."""
        return sorted(set.intersection(*({point.probes for point in each.points} for each in self.recalls.values())))

    @property
    def compared(self) -> int:
        """Of those, the ones nearest to the square root of the lists."""
        return min(self.shared, key=lambda probes: abs(math.log(probes / math.sqrt(self.lists))))

    def differs(self, name: str) -> float:
        """Stock's recall less an index's, at the compared probes."""
        return self.at("stock", self.compared).recall - self.at(name, self.compared).recall

    @property
    def reached(self) -> bool:
        """Whether the goal was reached."""
        return median(self.faster(OURS)) >= FASTER and self.differs(OURS) <= WITHIN

    def at(self, name: str, probes: int) -> RecallPoint:
        """A point of an index, at probes that are shared."""
        return next(point for point in self.recalls[name].points if point.probes == probes)


def make_rows(n_rows: int, dimensions: int, seed: int = 1) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Clustered unit vectors, a batch at a time: song_ids and (n, dimensions)."""
    draw = np.random.default_rng(seed)
    n_clusters = choose_lists(n_rows)
    turn = draw.standard_normal((_LATENT, dimensions), dtype=np.float32) / np.float32(math.sqrt(dimensions))
    centres = draw.standard_normal((n_clusters, _LATENT), dtype=np.float32)
    sizes = draw.pareto(1.2, n_clusters) + 0.1
    for start in range(0, n_rows, _BATCH):
        n_here = min(_BATCH, n_rows - start)
        latent = centres[draw.choice(n_clusters, n_here, p=sizes / sizes.sum())]
        latent += np.float32(_SPREAD) * draw.standard_normal(latent.shape, dtype=np.float32)
        vectors = latent @ turn
        vectors += np.float32(_EVERYWHERE) * draw.standard_normal(vectors.shape, dtype=np.float32)
        yield list(range(start, start + n_here)), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(database: Database, cache: ModelCache, n_rows: int, n_rounds: int, writers_go_on: bool) -> Result:
    """Load, build and search one number of rows.

    Args:
        database: with our schema, and no table; of a server on this machine.
        cache: empty.
        n_rows: to make up.
        n_rounds: of builds.
        writers_go_on: whether it is also built while they do.
    """
    spec = TableSpec(cache.model, cache.dimensions)
    tiling = Tiling(50_000, 50_000 * math.ceil(n_rows / 50_000))
    for song_ids, vectors in make_rows(n_rows, cache.dimensions):
        cached, _ = load_embeddings_from_cache(cache, tiling.range_of(song_ids[0]))
        write_embeddings_to_file(cached, song_ids, [hash_text(str(each)) for each in song_ids], vectors)
    source = LoadSource(cache, tiling, Snapshots(cache.storage.within("songs")))
    upload_cached_embeddings_to_database(VectorTable(database, STAGING), source, spec)
    result = Result(n_rows, choose_lists(n_rows))
    with database.get_connection() as connection:
        data_folder = Path(str(connection.scalar(sa.text("SHOW data_directory"))))
    run = _Run(database, data_folder, cache, result)
    half = TableSpec(cache.model, cache.dimensions, "halfvec")
    _copy_table(database, STOCK, spec, "EXTERNAL")
    _copy_table(database, HALF, half, "PLAIN")
    for _ in range(n_rounds):
        run.build_stock(spec)
        run.build_ours(OURS, STAGING, spec)
        run.build_ours(HALVED, HALF, half)
    for name, table in (("stock", STOCK), (OURS, STAGING), (HALVED, HALF)):
        run.search(name, table)
        if table != STAGING:
            _drop(database, table)
    if writers_go_on:
        upload_cached_embeddings_to_database(VectorTable(database), source, spec)
        run.build_ours("ours, while writers go on", SERVING, spec)
        _drop(database, SERVING)
    _drop(database, STAGING)
    return result


@dataclass(frozen=True)
class _Run:
    database: Database
    data_folder: Path
    cache: ModelCache
    result: Result

    @property
    def stock(self) -> VectorTable:
        """The table as CREATE TABLE makes it."""
        return VectorTable(self.database, STOCK)

    def build_stock(self, spec: TableSpec) -> None:
        """With the server's defaults; if that is an error, with the least memory that it accepts."""
        build = sa.text(
            f"CREATE INDEX {self.stock.index_name} ON {STOCK} USING ivfflat (embedding {spec.vector_type}_cosine_ops) "
            f"WITH (lists = {self.result.lists})"
        )
        needed = kmeans_bytes(self.result.lists, spec.dimensions, spec.vector_type) * 1001 // 1000
        with self.database.get_connection() as connection:
            connection.execute(sa.text(f"DROP INDEX IF EXISTS {self.stock.index_name}"))

        def build_with(kilobytes: int) -> None:
            with self._timed("stock", STOCK), self.database.get_connection() as connection:
                connection.execute(sa.text(f"SET LOCAL maintenance_work_mem = '{kilobytes}kB'"))
                connection.execute(build)

        try:
            build_with(64 << 10)
        except DatabaseError as error:
            self.result.default_error = str(error)
            build_with(needed // 1024 + 1)

    def build_ours(self, name: str, table: str, spec: TableSpec) -> None:
        """As the package builds: CONCURRENTLY if the table serves, else in a transaction."""
        capacity, result = read_capacity(self.database), self.result
        estimate = estimate_build(result.n_rows, result.lists, spec.dimensions, spec.vector_type, capacity.workers)
        with self._timed(name, table):
            definition = IVFFLAT.define(spec.vector_type, spec.dimensions, result.lists)
            create_index(VectorTable(self.database, table), definition, estimate, capacity.workers)
        swap_names(VectorTable(self.database, table), lambda _: None)

    def search(self, name: str, table: str) -> None:
        """The sweep of probes, with all queries."""
        searches = RecallSearches.over(VectorTable(self.database, table), self.cache)
        searches.limit_s, n_queries = math.inf, len(searches.exact.queries)
        for power in range(searches.lists.bit_length() + 1):
            searches.measure(min(2**power, searches.lists), n_queries)

        def reaches(probes: int) -> bool:
            return searches.measure(probes, n_queries).recall >= DEFAULT_TARGET

        probes = find_smallest(reaches, searches.tried, searches.lists)
        self.result.recalls[name] = RecallReport.of(searches, DEFAULT_TARGET, probes)
        if name == OURS:
            self.result.as_run = measure_recall(VectorTable(self.database, table), self.cache)

    @contextmanager
    def _timed(self, name: str, table: str) -> Iterator[None]:
        peak, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                peak[0] = max(peak[0], _folder_bytes(self.data_folder / "base" / "pgsql_tmp"))

        watcher = threading.Thread(target=watch, daemon=True)
        with self.database.get_autocommit() as connection:
            connection.execute(sa.text("CHECKPOINT"))  # what was written before is not this build's to sync
        watcher.start()
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            ended.set()
            watcher.join()
        with self.database.get_connection() as connection:
            sizes = sa.text("SELECT pg_table_size(:table), coalesce(pg_relation_size(to_regclass(:building)), "
                            "pg_relation_size(to_regclass(:index)))")  # fmt: skip
            of = VectorTable(self.database, table)
            names = {"table": table, "building": of.building_index, "index": of.index_name}
            table_bytes, index_bytes = connection.execute(sizes, names).one()
        build = Build(seconds, index_bytes, table_bytes, peak[0])
        self.result.builds.setdefault(name, []).append(build)


def _copy_table(database: Database, table: str, spec: TableSpec, storage: str) -> None:
    """The rows of the staging table in another one, with the ledger of what is loaded."""
    VectorTable(database, table).ensure(spec)
    columns = "range_start, range_stop, model, dimensions, n_songs, digest, song_ids, checksums"
    with database.get_connection() as connection:
        connection.execute(sa.text(f"ALTER TABLE {table} ALTER COLUMN embedding SET STORAGE {storage}"))
        connection.execute(
            sa.text(
                f"INSERT INTO {table} (song_id, embedding) "
                f"SELECT song_id, embedding::{spec.column_type} FROM {STAGING} ORDER BY song_id"
            )
        )
        connection.execute(
            sa.text(
                f"INSERT INTO songvec.loaded_ranges (table_name, {columns}) "
                f"SELECT :table, {columns} FROM songvec.loaded_ranges WHERE table_name = '{STAGING}'"
            ),
            {"table": table},
        )
    with database.get_autocommit() as connection:
        connection.execute(sa.text(f"VACUUM (ANALYZE) {table}"))


def _drop(database: Database, table: str) -> None:
    with database.get_connection() as connection:
        VectorTable(database, table).drop(connection)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # it was removed meanwhile
    return total


def render(results: list[Result]) -> str:
    """The results as Markdown tables."""
    builds = [
        "| rows | lists | build | seconds | min–max | index | table | peak temporary files |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    recalls = [
        "| rows | probes | index | recall@10 | rows | made-up queries | median ms | p99 ms |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    summary = [
        f"| rows | build | faster than stock (to reach: >= {FASTER}) | min–max | at probes "
        f"| recall, stock less this (<= {WITHIN}) | probes for 95 %, stock / this |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in results:
        for name, rounds in each.builds.items():
            build, seconds = rounds[-1], [one.seconds for one in rounds]
            builds.append(
                f"| {each.n_rows:,} | {each.lists:,} | {name} | {median(seconds):.1f} "
                f"| {min(seconds):.1f}–{max(seconds):.1f} "
                f"| {format_bytes(build.index_bytes)} | {format_bytes(build.table_bytes)} "
                f"| {format_bytes(max(one.temporary_bytes for one in rounds))} |"
            )
        for probes in each.shared:
            for name in each.recalls:
                point = each.at(name, probes)
                recalls.append(
                    f"| {each.n_rows:,} | {probes} | {name} | {point.recall:.4f} | {point.recall_of_rows:.4f} "
                    f"| {point.recall_of_synthetic:.4f} | {point.ms_median:.2f} | {point.ms_p99:.2f} |"
                )
        for name in (OURS, HALVED):
            ratios = each.faster(name)
            summary.append(
                f"| {each.n_rows:,} | {name} | {median(ratios):.2f} | {min(ratios):.2f}–{max(ratios):.2f} "
                f"| {each.compared} | {each.differs(name):+.4f} "
                f"| {each.recalls['stock'].probes} / {each.recalls[name].probes} |"
            )
    errors = [f"With the default memory, {each.n_rows:,} rows: {each.default_error}" for each in results]
    measured = [
        f"Measured within the time limit, {each.n_rows:,} rows: {each.as_run.describe()}; {each.as_run.seconds:.1f} s"
        for each in results
        if each.as_run
    ]
    return "\n".join([*summary, "", *errors, *measured, "", *builds, "", *recalls])


def main() -> None:
    """One size after the other, each in a new database."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="index-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        database = start_embedded_server(folder / "pg")
        ensure_schema(database)
        results = []
        for place, n_rows in enumerate(asked.rows):
            cache = ModelCache(LocalStorage(folder / f"cache_{place}"), "made-up", DIMENSIONS)
            results.append(measure(database, cache, n_rows, asked.rounds, writers_go_on=place == 0))
            shutil.rmtree(cache.storage.root)
    print(render(results))
    sys.exit(0 if all(result.reached for result in results) else 1)


if __name__ == "__main__":
    main()
