"""Ways to get rows into `song_embeddings`: this package's, the server's own, and peers' as their documentation shows.

Each is prepared (imports, connections, rows in memory) before the clock starts, and is timed to its commit. All read
the vectors from the same memory-mapped files; only this package verifies checksums. Peers, read 2026-11:

- psycopg 3 loop: pgvector-python's examples/loading/example.py.
- SQLAlchemy: pgvector-python's README and SQLAlchemy 2.1's "ORM bulk inserts" and "INSERT" tutorials.
- execute_values: psycopg2's "Fast execution helpers", with pgvector-python's register_vector.
- ADBC: `adbc_ingest` of Arrow lists as real[] into a temporary table, then a cast: it knows no vector type.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.sessions import widen_send_buffer
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.vectors.copy import HEADER, TRAILER, encode_rows
from songvec_assets.vectors.load import upload_cached_embeddings_to_database
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.table import TableSpec, VectorTable


class Job(NamedTuple):
    """What one client is to load, and where to.

    Attributes:
        url: of the database; the table is there and empty, except for this package, which makes it.
        cache, tiling, spec: the cached ranges and what they hold.
        ready: folder of the same rows as files for a server-side COPY, one per range.
        n_rows: how many of the first ones.
    """

    url: str
    cache: ModelCache
    tiling: Tiling
    spec: TableSpec
    ready: Path
    n_rows: int

    @property
    def uri(self) -> str:
        """The URL as libpq reads it."""
        return Database(self.url).adbc_uri

    def ranges(self) -> Iterator[CachedRange]:
        """Those that hold the rows, in order."""
        for song_range in self.cache.ranges():
            if song_range.start < self.n_rows:
                yield load_embeddings_from_cache(self.cache, song_range)[0]

    def rows(self) -> Iterator[tuple[NDArray[np.int32], Float32Matrix]]:
        """song_ids and mapped vectors, a stored batch at a time."""
        n_left = self.n_rows
        for cached in self.ranges():
            for batch in cached.iter_vectors(cached.rows["row"]):
                n_rows = min(n_left, len(batch))
                if n_rows:
                    yield batch.song_ids[:n_rows], batch.embeddings[:n_rows]
                n_left -= n_rows


class Loading(NamedTuple):
    """A load that has ended: when it committed, and when it passed on each hundredth of its rows."""

    committed_at: float
    marks_at: list[float]


Load = Callable[[], Loading | None]


def prepare_this(job: Job, n_connections: int) -> Load:
    """The whole path: compare, read and check the cache, COPY, ledger, one commit per range; then VACUUM (ANALYZE)."""
    database = Database(job.url)
    # a first range opened and a first connection import what they need: pandas, where it is installed
    next(job.ranges())
    with database.get_connection():
        pass

    def load() -> Loading:
        marks: list[float] = []
        reported_at = 0.0

        def receive(progress: Progress) -> None:
            nonlocal reported_at
            reported_at = time.perf_counter()
            while progress.total and len(marks) <= 100 * progress.done // progress.total:
                marks.append(reported_at)

        source = LoadSource(job.cache, job.tiling, Snapshots(job.cache.storage.within("songs")))
        run = RunContext(receive)
        upload_cached_embeddings_to_database(VectorTable(database), source, job.spec, run, n_connections=n_connections)
        # its last report comes after the last commit, and before VACUUM
        return Loading(reported_at, [*marks[:100], reported_at])

    return load


def write_ready_files(job: Job) -> None:
    """Write what a server-side COPY reads, a file per range."""
    job.ready.mkdir(exist_ok=True)
    for cached in job.ranges():
        with (job.ready / cached.range.key).open("wb") as file:
            file.write(HEADER)
            rows = ((each.song_ids, each.embeddings) for each in cached.iter_vectors(cached.rows["row"]))
            file.writelines(encode_rows(rows, job.spec.dimensions, job.spec.vector_type))
            file.write(TRAILER)


def prepare_server(job: Job, n_connections: int) -> Load:
    """The limit: the server reads ready files, each in one transaction."""

    def copy(cursor: Any, path: Path) -> None:
        cursor.execute(f"COPY song_embeddings (song_id, embedding) FROM '{path}' (FORMAT binary)")

    return _prepare_ready(job, n_connections, copy)


def prepare_socket(job: Job, n_connections: int) -> Load:
    """The limit of a client: the bytes of ready files, sent as they are; nothing is read, checked or recorded."""

    def copy(cursor: Any, path: Path) -> None:
        widen_send_buffer(cursor.connection)
        with path.open("rb") as file:
            cursor.copy_expert("COPY song_embeddings (song_id, embedding) FROM STDIN (FORMAT binary)", file, 1 << 17)

    return _prepare_ready(job, n_connections, copy)


def _prepare_ready(job: Job, n_connections: int, copy: Callable[[Any, Path], None]) -> Load:
    """Ready files, divided among the connections; one file, one transaction."""
    import psycopg2

    files = sorted(job.ready.iterdir())
    connections = [psycopg2.connect(job.uri) for _ in range(n_connections)]

    def serve(number: int) -> None:
        with connections[number].cursor() as cursor:
            for path in files[number::n_connections]:
                copy(cursor, path)
                connections[number].commit()

    def load() -> None:
        with ThreadPoolExecutor(n_connections) as pool:
            list(pool.map(serve, range(n_connections)))

    return load


def prepare_psycopg3(job: Job) -> Load:
    """pgvector-python's documented loop: row by row, binary."""
    import psycopg
    from pgvector import Vector
    from pgvector.psycopg import register_vector

    connection = psycopg.connect(job.uri, autocommit=True)
    register_vector(connection)
    rows = list(job.rows())

    def load() -> None:
        statement = "COPY song_embeddings (song_id, embedding) FROM STDIN WITH (FORMAT BINARY)"
        with connection.cursor().copy(statement) as copy:
            copy.set_types(["int4", "vector"])
            for song_ids, embeddings in rows:
                for song_id, embedding in zip(song_ids.tolist(), embeddings, strict=True):
                    copy.write_row([song_id, Vector(embedding)])

    return load


def prepare_sqlalchemy_orm(job: Job) -> Load:
    """`Session.add_all` of mapped objects."""
    import sqlalchemy as sa
    from pgvector.sqlalchemy import VECTOR
    from sqlalchemy.orm import DeclarativeBase, Session, mapped_column

    class Base(DeclarativeBase):
        pass

    class SongEmbedding(Base):
        __tablename__ = "song_embeddings"
        song_id = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
        embedding = mapped_column(VECTOR(job.spec.dimensions))

    rows = [pair for ids, vectors in job.rows() for pair in zip(ids.tolist(), vectors, strict=True)]
    session = Session(sa.create_engine(job.uri))
    session.connection()

    def load() -> None:
        session.add_all(SongEmbedding(song_id=song_id, embedding=embedding) for song_id, embedding in rows)
        session.commit()

    return load


def prepare_sqlalchemy_core(job: Job) -> Load:
    """One `insert` with a list of dictionaries."""
    import sqlalchemy as sa

    from songvec_assets.vectors.table import define_table

    rows = [
        {"song_id": song_id, "embedding": embedding}
        for ids, vectors in job.rows()
        for song_id, embedding in zip(ids.tolist(), vectors, strict=True)
    ]
    connection = sa.create_engine(job.uri).connect()

    def load() -> None:
        connection.execute(sa.insert(define_table(job.spec)), rows)
        connection.commit()

    return load


def prepare_execute_values(job: Job) -> Load:
    """psycopg2's multi-row INSERT."""
    import psycopg2
    from pgvector.psycopg2 import register_vector
    from psycopg2.extras import execute_values

    connection = psycopg2.connect(job.uri)
    register_vector(connection)
    rows = [pair for ids, vectors in job.rows() for pair in zip(ids.tolist(), vectors, strict=True)]

    def load() -> None:
        with connection.cursor() as cursor:
            execute_values(cursor, "INSERT INTO song_embeddings (song_id, embedding) VALUES %s", rows)
        connection.commit()

    return load


def prepare_adbc(job: Job) -> Load:
    """Arrow to a temporary table of real[], then INSERT … SELECT with a cast."""
    import adbc_driver_postgresql.dbapi

    connection = adbc_driver_postgresql.dbapi.connect(job.uri)
    width = job.spec.dimensions
    batches = [
        pa.record_batch({"song_id": ids, "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), width)})
        for ids, vectors in job.rows()
    ]
    rows = pa.Table.from_batches(batches)

    def load() -> None:
        with closing(connection.cursor()) as cursor:
            cursor.adbc_ingest("staged", rows, mode="create", temporary=True)
            cast = f"embedding::{job.spec.column_type}"
            cursor.execute(f"INSERT INTO song_embeddings (song_id, embedding) SELECT song_id, {cast} FROM staged")
        connection.commit()

    return load


class Client(NamedTuple):
    """A way to load.

    Attributes:
        prepare: gets it ready; the result is timed.
        plain: whether vectors are stored in their row (PLAIN), or outside of it, pgvector's default (EXTERNAL).
        share: of the rows that it loads: slow ones get fewer, at the same rate.
        makes_table: whether it makes the table itself.
    """

    prepare: Callable[[Job], Load]
    plain: bool = False
    share: float = 1.0
    makes_table: bool = False


THIS, THIS_TWO = "this, one connection", "this, two connections"
SERVER, SERVER_TWO = "limit: server-side COPY", "limit, two connections"
SOCKET, SOCKET_TWO = "limit over a socket: ready bytes", "limit over two sockets"
PSYCOPG3, PSYCOPG3_PLAIN = "psycopg 3 COPY loop", "psycopg 3 COPY loop, PLAIN"
ORM, CORE = "SQLAlchemy ORM", "SQLAlchemy insert"
CLIENTS = {
    SERVER: Client(partial(prepare_server, n_connections=1), plain=True),
    SOCKET: Client(partial(prepare_socket, n_connections=1), plain=True),
    THIS: Client(partial(prepare_this, n_connections=1), plain=True, makes_table=True),
    THIS_TWO: Client(partial(prepare_this, n_connections=2), plain=True, makes_table=True),
    SERVER_TWO: Client(partial(prepare_server, n_connections=2), plain=True),
    SOCKET_TWO: Client(partial(prepare_socket, n_connections=2), plain=True),
    PSYCOPG3: Client(prepare_psycopg3),
    PSYCOPG3_PLAIN: Client(prepare_psycopg3, plain=True),
    "ADBC, cast": Client(prepare_adbc, share=0.1),
    "execute_values": Client(prepare_execute_values, share=0.01),
    CORE: Client(prepare_sqlalchemy_core, share=0.01),
    ORM: Client(prepare_sqlalchemy_orm, share=0.01),
}
