"""The pgvector table and the ledger of what is loaded into it: DDL, and loads that write only what changed.

The ledger's row for a range names every song_id and checksum that the table holds for it, and is written in the same
transaction. A range whose count in the table differs from the ledger's was changed by somebody else, and is
loaded anew as a whole.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import psycopg2
import sqlalchemy as sa
import xxhash
from numpy.typing import NDArray
from pgvector import Vector
from pgvector.sqlalchemy import HALFVEC, VECTOR
from psycopg2.extras import execute_values
from sqlalchemy import text

from songvec_assets.cache.shards import (
    ModelCache,
    Shard,
    ShardRows,
    checksum_rows,
    discard_damaged_rows,
    load_embeddings_from_cache,
    lock_name,
    read_embeddings_from_file,
)
from songvec_assets.embedding.wire import find_bad_vectors
from songvec_assets.errors import DamagedShardError, StoreError, TableMismatchError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.postgres.schema import ensure_schema, hold_lock, lock_key, read_fact, write_fact
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.settings import OFFLINE_MODEL
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.copy import CopyStream, encode_rows

TABLE = "song_embeddings"
_FACT = "table"
_COPY = "COPY song_embeddings (song_id, embedding) FROM STDIN (FORMAT binary)"
CHANGES_FACT = "rows_changed_since_index"
_WHOLE_RANGE_SHARE = 0.5
_VACUUM_SHARE = 0.1


@dataclass(frozen=True)
class TableSpec:
    """What the table holds.

    Attributes:
        model: the embedding model's name.
        dimensions: values a vector.
        vector_type: `vector` or `halfvec`.
    """

    model: str
    dimensions: int
    vector_type: str = "vector"

    @property
    def column_type(self) -> str:
        """The column's type as Postgres writes it."""
        return f"{self.vector_type}({self.dimensions})"


@dataclass(frozen=True)
class RangeLoad:
    """What a load did to one range: rows."""

    range: SongIdRange
    n_rows: int
    n_written: int
    n_deleted: int
    seconds: float


@dataclass(frozen=True)
class _LedgerRow:
    n_songs: int
    digest: bytes


def define_table(spec: TableSpec) -> sa.Table:
    """The table as SQLAlchemy sees it."""
    vector = {"vector": VECTOR, "halfvec": HALFVEC}[spec.vector_type](spec.dimensions)
    return sa.Table(
        TABLE,
        sa.MetaData(),
        sa.Column("song_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("embedding", vector, nullable=False),
        sa.Column("created_at", sa.TIMESTAMP, nullable=False, server_default=sa.func.now()),
    )


def check_table(database: Database, spec: TableSpec) -> None:
    """Refuse a table that holds something else than `spec`, before anything is paid for.

    Raises:
        TableMismatchError: another model, size or type; or the table has other columns than ours.
    """
    with database.get_connection() as connection:
        if not _gives_way(database, connection, spec):
            _check_table(connection, spec)


def ensure_table(database: Database, spec: TableSpec) -> None:
    """Create the table where there is none, else check it. The embedded database's offline table gives way.

    Raises:
        TableMismatchError: see `check_table`.
    """
    ensure_schema(database)
    with database.get_connection() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("table")})
        if _gives_way(database, connection, spec):
            connection.execute(text("DROP TABLE IF EXISTS song_embeddings"))
            connection.execute(text("DELETE FROM songvec.loaded_ranges"))
        elif _check_table(connection, spec):
            _record_spec(connection, spec)
            return
        define_table(spec).create(connection)
        # a vector of 2,000 values then stays in its row's page: no TOAST look-ups, and parallel index builds
        connection.execute(text("ALTER TABLE song_embeddings ALTER COLUMN embedding SET STORAGE PLAIN"))
        connection.execute(text("DELETE FROM songvec.loaded_ranges"))
        _record_spec(connection, spec)


def _record_spec(connection: sa.Connection, spec: TableSpec) -> None:
    if _loaded_spec(connection) != spec:
        write_fact(connection, _FACT, {"model": spec.model, "column_type": spec.column_type})


def _gives_way(database: Database, connection: sa.Connection, spec: TableSpec) -> bool:
    """Whether the table holds offline vectors of the embedded database, and something better comes."""
    loaded = _loaded_spec(connection)
    return database.embedded and loaded is not None and loaded.model == OFFLINE_MODEL and loaded != spec


def _loaded_spec(connection: sa.Connection) -> TableSpec | None:
    fact = read_fact(connection, _FACT)
    if fact is None:
        return None
    vector_type, _, dimensions = fact["column_type"].rstrip(")").partition("(")
    return TableSpec(fact["model"], int(dimensions), vector_type)


def loaded_spec(database: Database) -> TableSpec | None:
    """What the table is recorded to hold, or None before a first load."""
    with database.get_connection() as connection:
        return _loaded_spec(connection)


def _check_table(connection: sa.Connection, spec: TableSpec) -> bool:
    """Whether the table exists; raises where it does not fit."""
    rows = connection.execute(
        text("""
            SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
            WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped
        """),
        {"name": TABLE},
    )
    columns: dict[str, str] = {name: kind for name, kind in rows}  # noqa: C416 - rows are no pairs to mypy
    if not columns:
        return False
    expected = {"song_id": "integer", "embedding": spec.column_type}
    wrong = {name: columns.get(name, "missing") for name, kind in expected.items() if columns.get(name) != kind}
    if wrong:
        raise TableMismatchError(
            f"table {TABLE} has {wrong}, expected {expected}: set SONGVEC_EMBEDDING_DIMENSIONS and SONGVEC_VECTOR_TYPE "
            f"to what it holds, or drop the table to have a new one filled from the cache"
        )
    loaded = _loaded_spec(connection)
    n_ranges = connection.scalar(text("SELECT count(*) FROM songvec.loaded_ranges"))
    if loaded is not None and loaded.model != spec.model and n_ranges:
        raise TableMismatchError(
            f"table {TABLE} holds vectors of {loaded.model!r}, the configured model is {spec.model!r}: one table holds "
            f"one model. Set SONGVEC_EMBEDDING_MODEL={loaded.model}, or drop the table to have a new one filled"
        )
    return True


def upload_cached_embeddings_to_database(
    database: Database,
    cache: ModelCache,
    spec: TableSpec,
    tiling: Tiling,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> list[RangeLoad]:
    """Make the table equal the cache for every range that has a shard, each in one transaction.

    Args:
        database: where the table is.
        cache: the shards to load.
        spec: what the table holds.
        tiling: how song_ids are cut.
        progress: told the rows compared or loaded.
        stop: ends the load between two ranges, or in the middle of one, which is rolled back.

    Returns:
        Every range, those with nothing to do included.

    Raises:
        StoreError: the cache is empty: nothing was ever filled.
        DamagedShardError: rows of a shard do not fit their checksum; the other ranges are loaded.
    """
    ranges = [song_range for song_range in cache.ranges() if song_range in set(tiling)]
    if not ranges:
        raise StoreError(
            f"no embeddings are cached for model {cache.model!r} in {cache.folder}: fill the cache first, with "
            "`songvec run`, or with `dagster asset materialize --select '*' --partition-range FIRST...LAST`"
        )
    ensure_table(database, spec)
    stop = stop or StopSignal()
    loads: list[RangeLoad] = []
    damaged: list[str] = []
    ledger, counts = _read_ledger(database), count_table_rows(database, tiling)
    done = 0
    for song_range in ranges:
        stop.check()
        shard, live = load_embeddings_from_cache(cache, song_range)
        vectors = live.filter(pl.col("reason").is_null())
        loaded = ledger.get(song_range)
        if loaded == _LedgerRow(vectors.height, _digest(vectors)) and counts.get(song_range, 0) == vectors.height:
            loads.append(RangeLoad(song_range, vectors.height, 0, 0, 0.0))
        else:
            try:
                loads.append(_load_range(database, shard, vectors, spec, stop))
            except DamagedShardError as error:
                damaged.append(str(error))
                with hold_lock(database, lock_name(song_range), on_wait=stop.check, check=stop.check):
                    # opened anew under the lock: a fill may have appended since
                    discard_damaged_rows(load_embeddings_from_cache(cache, song_range)[0])
        done += vectors.height
        progress(Progress("load rows", done, 0, unit="rows", note=song_range.key))
    _vacuum_if_worth_it(database, sum(load.n_written + load.n_deleted for load in loads), done)
    if damaged:
        raise DamagedShardError("; ".join(damaged))
    return loads


def count_table_rows(database: Database, tiling: Tiling) -> dict[SongIdRange, int]:
    """The table's rows by range, from its primary key; empty where there is no table."""
    with database.get_connection() as connection:
        if connection.scalar(text("SELECT to_regclass(:name) IS NULL"), {"name": TABLE}):
            return {}
        rows = connection.execute(
            text(
                "SELECT least(song_id, :stop) / :width AS tile, count(*) FROM song_embeddings "
                "WHERE song_id >= 0 GROUP BY tile"
            ),
            {"stop": tiling.stop, "width": tiling.width},
        )
        return {tiling.range_of(tile * tiling.width): count for tile, count in rows}


def loaded_ranges(database: Database) -> dict[SongIdRange, int]:
    """Songs by range, as the ledger has them."""
    return {song_range: row.n_songs for song_range, row in _read_ledger(database).items()}


def _read_ledger(database: Database) -> dict[SongIdRange, _LedgerRow]:
    with database.get_connection() as connection:
        if connection.scalar(text("SELECT to_regclass('songvec.loaded_ranges') IS NULL")):
            return {}
        rows = connection.execute(text("SELECT range_start, range_stop, n_songs, digest FROM songvec.loaded_ranges"))
        return {SongIdRange(start, stop): _LedgerRow(n_songs, bytes(digest)) for start, stop, n_songs, digest in rows}


def _digest(vectors: pl.DataFrame) -> bytes:
    state = xxhash.xxh3_128(vectors["song_id"].to_numpy().tobytes())
    state.update(vectors["checksum"].to_numpy().tobytes())
    return state.digest()


def _load_range(
    database: Database, shard: Shard, vectors: pl.DataFrame, spec: TableSpec, stop: StopSignal
) -> RangeLoad:
    started = time.monotonic()
    song_range = shard.identity.range
    with database.get_connection() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(f"load {song_range.key}")})
        stale = _find_stale_rows(connection, song_range, vectors)
        bounds = {"start": song_range.start, "stop": song_range.stop}
        if stale is None:
            wanted = vectors
            deleted = connection.execute(
                text("DELETE FROM song_embeddings WHERE song_id >= :start AND song_id < :stop"), bounds
            )
        else:
            wanted = vectors.filter(~pl.col("song_id").is_in(stale.kept))
            deleted = connection.execute(
                text("DELETE FROM song_embeddings WHERE song_id = ANY (:song_ids)"), {"song_ids": stale.written_anew}
            )
        _store(connection, _check_rows(shard, wanted, stop), spec)
        _write_ledger(connection, song_range, vectors, spec)
        changed = read_fact(connection, CHANGES_FACT) or 0
        write_fact(connection, CHANGES_FACT, changed + wanted.height + deleted.rowcount)
    return RangeLoad(song_range, vectors.height, wanted.height, deleted.rowcount, time.monotonic() - started)


@dataclass(frozen=True)
class _StaleRows:
    kept: list[int]
    written_anew: list[int]


def _find_stale_rows(connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame) -> _StaleRows | None:
    """Compare what the ledger says is loaded with the cache; None: write the whole range."""
    bounds = {"start": song_range.start, "stop": song_range.stop}
    row = connection.execute(
        text("""
            SELECT n_songs, song_ids, checksums FROM songvec.loaded_ranges
            WHERE range_start = :start AND range_stop = :stop FOR UPDATE
        """),
        bounds,
    ).one_or_none()
    count = connection.scalar(
        text("SELECT count(*) FROM song_embeddings WHERE song_id >= :start AND song_id < :stop"), bounds
    )
    if row is None or row.n_songs != count:
        return None
    loaded = pl.DataFrame(
        {
            "song_id": np.frombuffer(row.song_ids, dtype="<i4"),
            "checksum": np.frombuffer(row.checksums, dtype="<u8"),
        }
    )
    kept = loaded.join(vectors, on=["song_id", "checksum"], how="semi")
    n_changed = loaded.height - kept.height + vectors.height - kept.height
    if n_changed > _WHOLE_RANGE_SHARE * max(loaded.height, vectors.height):
        return None
    return _StaleRows(kept["song_id"].to_list(), loaded.join(kept, on="song_id", how="anti")["song_id"].to_list())


def _check_rows(shard: Shard, wanted: pl.DataFrame, stop: StopSignal) -> Iterator[ShardRows]:
    """Read rows and hold them against their checksums; a vector that is zero or not finite never gets further."""
    text_hashes = dict(wanted.select("song_id", "text_hash").iter_rows())
    for rows in read_embeddings_from_file(shard, wanted["row"]):
        stop.check()
        hashes = [text_hashes[song_id] for song_id in rows.song_ids.tolist()]
        wrong = checksum_rows(rows.song_ids, hashes, rows.embeddings) != rows.checksums
        wrong[find_bad_vectors(rows.embeddings)] = True
        if wrong.any():
            named = ", ".join(map(str, rows.song_ids[wrong][:5].tolist()))
            raise DamagedShardError(
                f"{shard.path} was changed on disk: the vectors of {int(wrong.sum())} or more songs do not fit their "
                f"checksums (song_id {named}, …). They are discarded and the range was not loaded: materialize "
                f"embedding_cache for {shard.identity.range.key}, which embeds those songs anew, then load again"
            )
        yield rows


def _store(connection: sa.Connection, batches: Iterator[ShardRows], spec: TableSpec) -> None:
    """COPY, or row batches where a pooler in between takes no COPY: an empty one finds out."""
    with raw_cursor(connection) as cursor:
        cursor.execute("SAVEPOINT before_copy")
        try:
            cursor.copy_expert(_COPY, CopyStream(()))
        except (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ProtocolViolation):
            cursor.execute("ROLLBACK TO SAVEPOINT before_copy")
            for rows in batches:
                store_embeddings_batch(connection, rows.song_ids, rows.embeddings, spec)
            return
    store_embeddings_copy_bulk(connection, batches, spec)


def store_embeddings_copy_bulk(connection: sa.Connection, batches: Iterator[ShardRows], spec: TableSpec) -> None:
    """Insert rows through one binary COPY, within the connection's transaction.

    Args:
        connection: in a transaction.
        batches: rows whose song_ids are not in the table.
        spec: what the table holds.
    """
    chunks = (chunk for rows in batches for chunk in encode_rows(rows.song_ids, rows.embeddings, spec.vector_type))
    with raw_cursor(connection) as cursor:
        cursor.copy_expert(_COPY, CopyStream(chunks), size=1 << 18)


def store_embeddings_batch(
    connection: sa.Connection, song_ids: NDArray[np.int32], embeddings: NDArray[np.float32], spec: TableSpec
) -> None:
    """Insert or update rows by multi-row statements, within the connection's transaction: where COPY is not allowed.

    Args:
        connection: in a transaction.
        song_ids: (n,).
        embeddings: (n, dimensions).
        spec: what the table holds.
    """
    rows = ((song_id, Vector(vector).to_text()) for song_id, vector in zip(song_ids.tolist(), embeddings, strict=True))
    with raw_cursor(connection) as cursor:
        execute_values(
            cursor,
            """
            INSERT INTO song_embeddings (song_id, embedding) VALUES %s
            ON CONFLICT (song_id) DO UPDATE SET embedding = excluded.embedding, created_at = now()
            """,
            rows,
            template=f"(%s, %s::{spec.vector_type})",
            page_size=500,
        )


def _write_ledger(connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame, spec: TableSpec) -> None:
    # a raised stop leaves the old tail's row behind, which overlaps the new ranges
    connection.execute(
        text("DELETE FROM songvec.loaded_ranges WHERE range_start < :stop AND range_stop > :start"),
        {"start": song_range.start, "stop": song_range.stop},
    )
    connection.execute(
        text("""
            INSERT INTO songvec.loaded_ranges
                (range_start, range_stop, model, dimensions, n_songs, digest, song_ids, checksums)
            VALUES (:start, :stop, :model, :dimensions, :n_songs, :digest, :song_ids, :checksums)
        """),
        {
            "start": song_range.start,
            "stop": song_range.stop,
            "model": spec.model,
            "dimensions": spec.dimensions,
            "n_songs": vectors.height,
            "digest": _digest(vectors),
            "song_ids": vectors["song_id"].to_numpy().astype("<i4").tobytes(),
            "checksums": vectors["checksum"].to_numpy().astype("<u8").tobytes(),
        },
    )


def _vacuum_if_worth_it(database: Database, n_changed: int, n_rows: int) -> None:
    """After a bulk load the first scan would rewrite every page, and the planner would know nothing."""
    if n_changed > _VACUUM_SHARE * max(1, n_rows):
        with database.get_autocommit() as connection:
            connection.execute(text("VACUUM (ANALYZE) song_embeddings"))
