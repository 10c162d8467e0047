"""The ways to export that `benchmarks.export` compares: each reads a table of songs and leaves zstd-1 Parquet files.

Each is written as its documentation shows it. Imports are in the functions: a process has only its own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

N_RANGES = 20
COLUMNS = "id, name, artist, lyrics"
CODEC: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
CHUNK = 50_000


class Job(NamedTuple):
    """What is to be exported: a table, its number of songs, a libpq URL, and the folder."""

    url: str
    table: str
    n_songs: int
    folder: Path

    @property
    def width(self) -> int:
        """song_ids per range."""
        return max(1, self.n_songs // N_RANGES)


def export_this(job: Job, n_readers: int | None = None) -> None:
    """This package."""
    from songvec_assets.postgres.engine import Database
    from songvec_assets.settings import PostgresSettings
    from songvec_assets.songs.export import ExportOptions, cache_songs_to_parquet
    from songvec_assets.songs.ranges import Tiling
    from songvec_assets.songs.snapshots import Snapshots
    from songvec_assets.songs.source import find_source
    from songvec_assets.storage.local import LocalStorage

    database, names = Database(job.url), PostgresSettings(songs_table=job.table)
    tiling = Tiling(job.width, 999_999_999 // job.width * job.width)
    options = ExportOptions(n_readers=n_readers) if n_readers else ExportOptions()
    cache_songs_to_parquet(find_source(database, names), Snapshots(LocalStorage(job.folder)), tiling, options)


def export_pandas(job: Job) -> None:
    """pandas.read_sql, whose guide gives chunksize and SQLAlchemy's stream_results for large results."""
    import pandas as pd
    import pyarrow as pa

    with _stream(job) as connection:
        for number, chunk in enumerate(pd.read_sql(_select(job), connection, chunksize=CHUNK)):
            _write(job, number, pa.Table.from_pandas(chunk, preserve_index=False))


def export_polars(job: Job) -> None:
    """polars.read_database, in batches."""
    import polars as pl

    with _stream(job) as connection:
        frames = pl.read_database(
            _select(job),
            connection,
            iter_batches=True,
            batch_size=CHUNK,
        )
        for number, frame in enumerate(frames):
            frame.write_parquet(job.folder / f"{number}.parquet", **CODEC)


def export_cursor(job: Job) -> None:
    """psycopg2's server-side cursor."""
    import psycopg2
    import pyarrow as pa

    with psycopg2.connect(job.url) as connection, connection.cursor("songs") as cursor:
        cursor.execute(_select(job))
        number = 0
        while rows := cursor.fetchmany(CHUNK):
            columns = zip(COLUMNS.split(", "), zip(*rows, strict=True), strict=True)
            _write(job, number, pa.table({name: pa.array(values) for name, values in columns}))
            number += 1


def export_connectorx(job: Job) -> None:
    """connectorx.read_sql into one Arrow table, partitioned by id."""
    import connectorx as cx

    _write(
        job, 0, cx.read_sql(_url_of_rust(job), _select(job), return_type="arrow", partition_on="id", partition_num=4)
    )


def export_connectorx_stream(job: Job) -> None:
    """The same as a stream of batches."""
    import connectorx as cx
    import pyarrow.parquet as pq

    options = {"return_type": "arrow_stream", "partition_on": "id", "partition_num": 4, "batch_size": CHUNK}
    batches = cx.read_sql(_url_of_rust(job), _select(job), **options)
    with pq.ParquetWriter(job.folder / "0.parquet", batches.schema, **CODEC) as writer:
        for batch in batches:
            writer.write_batch(batch)


def drain_copy(job: Job, n_connections: int) -> None:
    """Read the songs as COPY sends them, and discard them."""
    import psycopg2

    class Nothing:
        def write(self, piece: bytes) -> int:
            return len(piece)

    def drain(place: int) -> None:
        ends = job.n_songs * place // n_connections, job.n_songs * (place + 1) // n_connections
        select = f"{_select(job)} WHERE id >= {ends[0]} AND id < {ends[1]} ORDER BY id"
        with psycopg2.connect(job.url) as connection, connection.cursor() as cursor:
            cursor.copy_expert(f"COPY ({select}) TO STDOUT (FORMAT binary)", Nothing(), size=1 << 20)

    with ThreadPoolExecutor(n_connections) as threads:
        list(threads.map(drain, range(n_connections)))


def _select(job: Job) -> str:
    return f"SELECT {COLUMNS} FROM {job.table}"


def _stream(job: Job) -> Any:

    from songvec_assets.postgres.engine import get_engine

    return get_engine(job.url).connect().execution_options(stream_results=True)


def _url_of_rust(job: Job) -> str:
    # it wants a host before the path, and takes that of the query
    return job.url.replace("@/", "@localhost/").replace(":@", "@")


def _write(job: Job, number: int, table: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, job.folder / f"{number}.parquet", **CODEC)


class Way(NamedTuple):
    """A way to export, the modules it needs, and whether it leaves files."""

    export: Callable[[Job], None]
    modules: str = ""
    writes: bool = True


_THIS = "songvec_assets.songs.export songvec_assets.songs.source"
WAYS = {
    "this": Way(export_this, _THIS),
    "pandas, SQLAlchemy stream": Way(export_pandas, "pandas pyarrow.parquet sqlalchemy psycopg2"),
    "polars, SQLAlchemy stream": Way(export_polars, "polars sqlalchemy psycopg2"),
    "psycopg2, server-side cursor": Way(export_cursor, "psycopg2 pyarrow.parquet"),
    "connectorx, 4 partitions": Way(export_connectorx, "connectorx pyarrow.parquet"),
    "connectorx, 4 partitions, stream": Way(export_connectorx_stream, "connectorx pyarrow.parquet"),
    "COPY, dropped": Way(partial(drain_copy, n_connections=1), "psycopg2", writes=False),
    "COPY, dropped, 2 connections": Way(partial(drain_copy, n_connections=2), "psycopg2", writes=False),
}
READERS = {f"{n} reader{'s' * (n > 1)}": Way(partial(export_this, n_readers=n), _THIS) for n in (1, 2, 3, 4)}
