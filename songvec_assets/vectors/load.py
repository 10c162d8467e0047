"""Loads: the table becomes equal to the cache, in one transaction per range that writes only what changed.

`plan_load` compares, `upload_cached_embeddings_to_database` does what it found. If a range's song_ids in the table
differ from the ledger's, somebody else changed it, and it is loaded again as a whole. When to add here: another way to
insert rows. Keep out: which ranges are loaded (`plan`), and the format of COPY (`copy`).
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import psycopg2
import sqlalchemy as sa
from numpy.typing import NDArray
from pgvector import Vector
from psycopg2.extras import execute_values
from sqlalchemy import text

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.model_cache import lock_name
from songvec_assets.cache.parts import CachedRows
from songvec_assets.errors import DamagedCacheError, DatabaseError, StoreError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.postgres.locks import hold_lock, wait_for_lock
from songvec_assets.postgres.sessions import widen_send_buffer
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors import copy
from songvec_assets.vectors.plan import LoadPlan, LoadSource, check_whole, find_differing, plan_load
from songvec_assets.vectors.spec import SERVING, TableSpec
from songvec_assets.vectors.table import VectorTable

N_CONNECTIONS = 2
"""Ranges loaded at a time: one is encoded, committed and synced while the server takes in another. While searches use
an index, only one range is loaded at a time: searches need a core, too."""

_STEP = "load rows"
_VACUUM_SHARE = 0.1
_SLICE_ROWS = 128
_PAGE_ROWS = 500


@dataclass(frozen=True)
class RangeLoad:
    """What a load did to one range, in rows."""

    range: SongIdRange
    n_rows: int
    n_written: int = 0
    n_deleted: int = 0
    seconds: float = 0.0


def upload_cached_embeddings_to_database(
    table: VectorTable,
    source: LoadSource,
    spec: TableSpec,
    run: RunContext = SILENT,
    *,
    plan: LoadPlan | None = None,
    n_connections: int = N_CONNECTIONS,
) -> list[RangeLoad]:
    """Make a table equal the cache for every range that is cached, each in one transaction.

    Args:
        table: to load; created if it is missing.
        source: the cache.
        run: notified of the rows loaded; a stop ends the load between two ranges, or in the middle of one, which is
            rolled back.
        plan: what `plan_load` found; None: it is called here.
        n_connections: ranges loaded at a time.

    Returns:
        Every range, those with nothing to do included, in order.

    Raises:
        ValueError: the cache is of another model or size than the table.
        StoreError: the cache is empty: nothing was ever filled.
        DamagedCacheError: ranges lost rows, hold rows that do not fit their checksum, or are another's; the other
            ranges are loaded.
    """
    if (source.cache.model, source.cache.dimensions) != (spec.model, spec.dimensions):
        raise ValueError(f"expected a cache of {spec}, got {source.cache.dimensions} values by {source.cache.model}")
    plan = plan or plan_load(table, source, run)
    if table.ensure(spec, plan.models) and plan.unchanged:
        # the table was replaced, so what was compared no longer holds
        plan = plan_load(table, source, run)
    load = _Load(table, source, spec, run, plan.n_changed)
    loads, damaged = load.run_side_by_side(list(plan.changed), n_connections)
    loads += [RangeLoad(song_range, n_rows) for song_range, n_rows in plan.unchanged.items()]
    load.report(plan.n_changed)
    try:
        _vacuum_if_worth_it(table, loads)
    except DatabaseError as error:
        run.check_stop()
        # the rows and the ledger are committed; autovacuum makes up for it
        note = f"the rows are loaded; VACUUM failed and can be run by hand: {error}"
        run.report(Progress(_STEP, plan.n_changed, plan.n_changed, unit="rows", note=note, is_trouble=True))
    if damaged := [*plan.damaged.values(), *damaged]:
        raise DamagedCacheError("; ".join(damaged))
    return sorted(loads, key=lambda each: each.range)


class _Load:
    """One load: what its threads share."""

    def __init__(self, table: VectorTable, source: LoadSource, spec: TableSpec, run: RunContext, n_rows: int) -> None:
        self._table, self._source, self._spec, self._run = table, source, spec, run
        self._n_done, self._n_rows, self._lock = 0, n_rows, threading.Lock()
        self.report(0)

    def report(self, n_rows: int, note: str = "") -> None:
        """Add rows that are loaded."""
        with self._lock:
            self._n_done += n_rows
            self._run.report(Progress(_STEP, min(self._n_done, self._n_rows), self._n_rows, unit="rows", note=note))

    def run_side_by_side(self, ranges: list[SongIdRange], n_connections: int) -> tuple[list[RangeLoad], list[str]]:
        """Load ranges in threads; returns what was loaded and what is damaged. Any other error ends all threads."""
        waiting = iter(ranges)
        loads: list[RangeLoad] = []
        damaged: list[str] = []
        failures: list[BaseException] = []

        def serve() -> None:
            while not failures and (song_range := next(waiting, None)) is not None:
                try:
                    self._run.check_stop()
                    loads.append(self._load_or_discard(song_range))
                except (DamagedCacheError, StoreError) as error:
                    damaged.append(str(error))
                except BaseException as error:  # noqa: BLE001 - it is raised again below
                    failures.append(error)

        # daemons: an interrupted process must be able to end even if the server no longer answers
        threads = [threading.Thread(target=serve, daemon=True, name="songvec-load") for _ in range(n_connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return loads, damaged

    def _load_or_discard(self, song_range: SongIdRange) -> RangeLoad:
        """Load a range; damaged rows are recorded, so that the next fill embeds those songs again."""
        with contextlib.suppress(DamagedCacheError):
            return self._load_range(song_range)
        check = self._run.check_stop
        with hold_lock(self._table.database, lock_name(song_range), on_wait=check, check=check):
            try:
                # a fill that ended just now may have changed the range while it was read
                return self._load_range(song_range)
            except DamagedCacheError:
                cached = self._source.cache.open(song_range)
                sound = cached.find_sound(cached.rows)
                cached.discard(cached.rows.join(sound, on="song_id", how="anti")["song_id"].to_list())
                raise

    def _load_range(self, song_range: SongIdRange) -> RangeLoad:
        started, table = time.monotonic(), self._table
        with table.database.get_connection("parallel") as connection:
            wait_for_lock(connection, f"load {song_range.key}")
            # read under the lock: since the comparison another load may have written newer rows
            cached = self._source.cache.open(song_range)
            vectors, loaded = cached.rows, table.ledger.read_rows(song_range, connection)
            check_whole(cached, loaded)
            differing = find_differing(loaded, vectors, table.read_id_sums_of(connection, song_range))
            if differing is None:
                wanted, condition = vectors, "song_id >= :start AND song_id < :stop"
                values: dict[str, Any] = asdict(song_range)
            else:
                wanted, condition = vectors.filter(pl.col("song_id").is_in(differing.implode())), "song_id = ANY (:ids)"
                values = {"ids": differing.to_list()}
            deleted = connection.execute(text(f"DELETE FROM {table.name} WHERE {condition}"), values)
            store_rows(connection, self._read(cached, wanted), self._spec, table.name)
            table.ledger.write(connection, song_range, vectors, self._spec)
            # a changed row is deleted and written
            table.count_changes(connection, max(wanted.height, deleted.rowcount))
        return RangeLoad(song_range, vectors.height, wanted.height, deleted.rowcount, time.monotonic() - started)

    def _read(self, cached: CachedRange, wanted: pl.DataFrame) -> Iterator[CachedRows]:
        """Vectors of some rows, a few at a time; a vector that does not fit its checksum is not sent.

        Raises:
            DamagedCacheError: some do not fit.
        """
        for batch in cached.iter_vectors(wanted["row"]):
            # few rows per slice: while they are checked, the server works on what the socket's buffer holds
            for start in range(0, len(batch), _SLICE_ROWS):
                self._run.check_stop()
                rows = batch.take(slice(start, start + _SLICE_ROWS))
                wrong = ~rows.find_sound()
                if wrong.any():
                    named = ", ".join(map(str, rows.song_ids[wrong][:5].tolist()))
                    raise DamagedCacheError(
                        f"{cached.folder} was changed on disk: the vectors of {int(wrong.sum())} or more songs do "
                        f"not fit their checksums (song_id {named}, …). They are discarded and the range was not "
                        f"loaded: run `songvec run --ranges {cached.range.key}`, which embeds those songs again, "
                        "and loads them"
                    )
                yield rows
                self.report(len(rows), cached.range.key)


def _vacuum_if_worth_it(table: VectorTable, loads: list[RangeLoad]) -> None:
    """VACUUM after a bulk load: else the first scan rewrites every page, and the planner has no statistics."""
    n_changed = sum(load.n_written + load.n_deleted for load in loads)
    if n_changed <= _VACUUM_SHARE * max(1, sum(load.n_rows for load in loads)):
        return
    if table.database.has_sessions:
        # enough for song_ids, which are unique; the default reads 30,000 rows with their vectors
        with table.database.get_autocommit(default_statistics_target="10") as connection:
            connection.execute(text(f"VACUUM (ANALYZE) {table.name}"))
    else:  # through a pooler no timeout can be lifted for VACUUM, which autovacuum does later
        with table.database.get_connection() as connection:
            connection.execute(text(f"ANALYZE {table.name}"))


def store_rows(connection: sa.Connection, batches: Iterator[CachedRows], spec: TableSpec, table: str) -> None:
    """Insert rows by COPY, or by multi-row statements if a pooler refuses an empty COPY, which is tried first.

    Args:
        connection: in a transaction.
        batches: rows whose song_ids are not in the table.
        table: its name.
    """
    with raw_cursor(connection) as cursor:
        cursor.execute("SAVEPOINT before_copy")
        try:
            _copy(cursor, table, ())
        except (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ProtocolViolation):
            cursor.execute("ROLLBACK TO SAVEPOINT before_copy")
            for rows in batches:
                store_embeddings_batch(connection, rows.song_ids, rows.embeddings, spec, table)
            return
    store_embeddings_copy_bulk(connection, batches, spec, table)


def store_embeddings_copy_bulk(
    connection: sa.Connection, batches: Iterator[CachedRows], spec: TableSpec, table: str = SERVING
) -> None:
    """Insert rows through one binary COPY; see `store_rows` for the arguments."""
    chunks = copy.encode_rows(((rows.song_ids, rows.embeddings) for rows in batches), spec.dimensions, spec.vector_type)
    with raw_cursor(connection) as cursor:
        widen_send_buffer(cursor.connection)
        _copy(cursor, table, chunks)


def _copy(cursor: Any, table: str, chunks: Iterable[bytes]) -> None:
    stream = copy.CopyStream(chunks)
    try:
        cursor.copy_expert(f"COPY {table} (song_id, embedding) FROM STDIN (FORMAT binary)", stream)
    except psycopg2.Error:
        if stream.error is not None:
            raise stream.error from None
        raise


def store_embeddings_batch(
    connection: sa.Connection,
    song_ids: NDArray[np.int32],
    embeddings: NDArray[np.float32],
    spec: TableSpec,
    table: str = SERVING,
) -> None:
    """Insert or update rows by multi-row statements.

    Args:
        connection: in a transaction.
        song_ids: (n,).
        embeddings: (n, dimensions).
        table: its name.
    """
    rows = ((song_id, Vector(vector).to_text()) for song_id, vector in zip(song_ids.tolist(), embeddings, strict=True))
    with raw_cursor(connection) as cursor:
        execute_values(
            cursor,
            f"INSERT INTO {table} (song_id, embedding) VALUES %s "
            "ON CONFLICT (song_id) DO UPDATE SET embedding = excluded.embedding, created_at = now()",
            rows,
            template=f"(%s, %s::{spec.vector_type})",
            page_size=_PAGE_ROWS,
        )
