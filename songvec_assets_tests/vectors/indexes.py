"""Tables and indexes as an administrator sees and makes them, and builds in threads and processes of their own."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import psycopg2
from numpy.typing import NDArray

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, ReportProgress, RunContext, StopSignal, ignore_progress
from songvec_assets.songs.text import hash_text
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.upkeep import IndexReport, bring_index_up_to_date
from songvec_assets.vectors.table import SERVING, TableSpec, VectorTable
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.vectors.conftest import SPEC, TILING

INDEX, BUILDING, REPLACED = (f"embeddings_ivfflat_idx{end}" for end in ("", "_building", "_replaced"))


def fill(database: Database, first: int, last: int, spec: TableSpec = SPEC, table: str = SERVING) -> None:
    """Insert random rows past the cache, and count them as changes, as a load does."""
    execute(
        database.adbc_uri,
        f"""
        INSERT INTO {table} SELECT n, array_agg(random() - 0.5)::vector::{spec.vector_type}
        FROM generate_series({first}, {last}) n, generate_series(1, {spec.dimensions}) GROUP BY n
        """,
    )
    change(database, last - first + 1, table)


def change(database: Database, n_rows: int, table: str = SERVING) -> None:
    """Count rows as changed since the index was built."""
    with database.get_connection() as connection:
        VectorTable(database, table).count_changes(connection, n_rows)


def build_index(
    database: Database,
    cache: ModelCache,
    spec: TableSpec = SPEC,
    wanted: IndexSettings | None = None,
    *,
    table: str = SERVING,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> IndexReport:
    """Bring a table's index up to date."""
    run = RunContext(progress, stop or StopSignal())
    return bring_index_up_to_date(VectorTable(database, table), cache, spec, wanted or IndexSettings(), run)


def put_clusters(cache: ModelCache, first: int, stop: int, n_clusters: int, seed: int = 0) -> None:
    """Store made-up songs around so many centres, in one batch a range."""
    draw = np.random.default_rng(seed)
    song_ids = np.arange(first, stop, dtype=np.int32)
    centres = draw.standard_normal((n_clusters, cache.dimensions))
    vectors = centres[draw.integers(n_clusters, size=len(song_ids))]
    vectors = (vectors + 0.5 * draw.standard_normal(vectors.shape)).astype(np.float32)
    for song_range in {TILING.range_of(song_id) for song_id in (*song_ids[::50].tolist(), stop - 1)}:
        here = (song_ids >= song_range.start) & (song_ids < song_range.stop)
        cached, _ = load_embeddings_from_cache(cache, song_range)
        hashes = [hash_text(f"{song_id} {seed}") for song_id in song_ids[here]]
        write_embeddings_to_file(cached, song_ids[here].tolist(), hashes, vectors[here])


def put_vectors(cache: ModelCache, vectors: NDArray[np.float32]) -> None:
    """Store songs with these vectors; song_ids count from 0."""
    for song_range in sorted({TILING.range_of(song_id) for song_id in range(len(vectors))}):
        here = [song_id for song_id in range(len(vectors)) if song_id in song_range]
        cached, _ = load_embeddings_from_cache(cache, song_range)
        write_embeddings_to_file(cached, here, [hash_text("made up")] * len(here), vectors[here])


def read_indexes(database: Database, table: str = SERVING) -> dict[str, tuple[bool, str]]:
    """Every index of a table but its key: name to validity and definition."""
    rows = execute(
        database.adbc_uri,
        f"""
        SELECT c.relname, i.indisvalid, pg_get_indexdef(c.oid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE i.indrelid = '{table}'::regclass AND NOT i.indisprimary
        """,
    )
    return {name: (valid, definition) for name, valid, definition in rows}


def read_identity(database: Database, index: str = INDEX) -> tuple:
    """Object and file of an index: both change when it is built anew."""
    return execute(database.adbc_uri, f"SELECT oid, relfilenode FROM pg_class WHERE relname = '{index}'")[0]


def definition(lists: int, opclass: str = "vector_cosine_ops", index: str = INDEX, table: str = SERVING) -> str:
    """The index as Postgres spells it; for vector columns the operator class is not the default one, so it is shown."""
    return f"CREATE INDEX {index} ON public.{table} USING ivfflat (embedding {opclass}) WITH (lists='{lists}')"


@contextmanager
def transaction(database: Database, statement: str) -> Iterator[None]:
    """Another program's open transaction, after a statement."""
    with closing(psycopg2.connect(database.adbc_uri, application_name="another")) as connection:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        yield
        connection.rollback()


WRITE = "INSERT INTO song_embeddings SELECT -1, embedding FROM song_embeddings LIMIT 1"
"""Until such a transaction ends, CREATE INDEX CONCURRENTLY waits."""


class Builder(threading.Thread):
    """A call that brings the index up to date, in a thread of its own."""

    def __init__(
        self,
        database: Database,
        cache: ModelCache,
        wanted: IndexSettings | None = None,
        table: str = SERVING,
        stop: StopSignal | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._database, self._cache, self._wanted = database, cache, wanted or IndexSettings()
        self._table, self._stop_signal = table, stop
        self.reported: list[Progress] = []
        self.report: IndexReport | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Build; keep what it returns or raises."""
        try:
            self.report = build_index(
                self._database,
                self._cache,
                SPEC,
                self._wanted,
                table=self._table,
                progress=self.reported.append,
                stop=self._stop_signal,
            )
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def wait_for_new_index(self) -> None:
        """Until the index that is being built is in the catalogue, not valid yet."""
        wait_until(lambda: self.error or BUILDING in read_indexes(self._database))
        assert self.error is None

    def finish(self) -> None:
        """Until it ends."""
        self.join(timeout=30)
        assert not self.is_alive()


_PROCESS = """
import sys
from pathlib import Path
from songvec_assets.storage.local import LocalStorage
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index.upkeep import bring_index_up_to_date
from songvec_assets.vectors.table import TableSpec, VectorTable
url, folder = sys.argv[1:]
cache = ModelCache(LocalStorage(Path(folder)), "model-a", 8)
bring_index_up_to_date(VectorTable(Database(url)), cache, TableSpec("model-a", 8))
"""


@contextmanager
def building_process(database: Database, cache: ModelCache) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that builds the index; killed at the end of the block, where it still runs."""
    with running(_PROCESS, database.url, str(cache.storage)) as process:
        yield process


@contextmanager
def running(code: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Python code in a process of its own; killed at the end of the block, where it still runs."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
