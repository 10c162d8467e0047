"""Loads that make a table equal the cache: a range a transaction, and only what changed of it.

A range whose count in the table differs from the ledger's was changed by somebody else, and is loaded anew as a whole.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl
from sqlalchemy import text

from songvec_assets.cache.parts import CachedRows
from songvec_assets.cache.shards import CachedRange, ModelCache, lock_name
from songvec_assets.errors import DamagedShardError, DatabaseError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import hold_lock, lock_key
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.backlog import Backlog, check_whole, compare_with_cache, find_stale_rows
from songvec_assets.vectors.ledger import read_loaded_rows, write_ledger
from songvec_assets.vectors.table import TABLE, TableSpec, count_changes, ensure_table
from songvec_assets.vectors.write import store_rows

N_CONNECTIONS = 2
"""Ranges loaded at a time: one range is encoded, committed and synced while the server takes in another. Only one where
searches use an index meanwhile: they want a core, too."""
_VACUUM_SHARE = 0.1
_SLICE_ROWS = 128


@dataclass(frozen=True)
class RangeLoad:
    """What a load did to one range: rows."""

    range: SongIdRange
    n_rows: int
    n_written: int = 0
    n_deleted: int = 0
    seconds: float = 0.0


def upload_cached_embeddings_to_database(
    database: Database,
    cache: ModelCache,
    spec: TableSpec,
    tiling: Tiling,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
    *,
    table: str = TABLE,
    n_connections: int = N_CONNECTIONS,
    backlog: Backlog | None = None,
) -> list[RangeLoad]:
    """Make a table equal the cache for every range that has a shard, each in one transaction.

    Args:
        database: where the table is.
        cache: the shards to load.
        spec: what the table holds.
        tiling: how song_ids are cut.
        progress: told the rows loaded.
        stop: ends the load between two ranges, or in the middle of one, which is rolled back.
        table: its name.
        n_connections: ranges loaded at a time.
        backlog: what `compare_with_cache` found; None: it is asked.

    Returns:
        Every range, those with nothing to do included, in order.

    Raises:
        ValueError: the cache is of another model or size than the table.
        StoreError: the cache is empty: nothing was ever filled.
        DamagedShardError: shards lost rows, hold rows that do not fit their checksum, or are another's; the other
            ranges are loaded.
    """
    if (cache.model, cache.dimensions) != (spec.model, spec.dimensions):
        raise ValueError(f"expected a cache of {spec}, got {cache.dimensions} values by {cache.model}")
    stop = stop or StopSignal()
    backlog = backlog or compare_with_cache(database, cache, tiling, stop, table)
    if ensure_table(database, spec, table) and backlog.unchanged:
        # a table that gave way took with it what was compared
        backlog = compare_with_cache(database, cache, tiling, stop, table)
    meter = _Meter(backlog.n_changed, progress)
    target = _Target(database, cache, spec, table, stop, meter)
    loads, damaged = _load_side_by_side(target, list(backlog.changed), n_connections)
    loads += [RangeLoad(song_range, n_rows) for song_range, n_rows in backlog.unchanged.items()]
    damaged = [*backlog.damaged, *damaged]
    meter.add(backlog.n_changed, "")
    try:
        _vacuum_if_worth_it(database, loads, table)
    except DatabaseError as error:
        stop.check()
        # the rows are committed and the ledger has them; autovacuum does it later
        note = f"the rows are loaded; VACUUM failed and can be run by hand: {error}"
        total = backlog.n_changed
        progress(Progress("load rows", total, total, unit="rows", note=note, is_trouble=True))
    if damaged:
        raise DamagedShardError("; ".join(damaged))
    return sorted(loads, key=lambda each: each.range)


class _Meter:
    """Adds up the rows of all connections."""

    def __init__(self, total: int, progress: ReportProgress) -> None:
        self._done, self._total = 0, total
        self._progress = progress
        self._lock = threading.Lock()
        self.add(0, "")

    def add(self, n_rows: int, note: str) -> None:
        with self._lock:
            self._done += n_rows
            self._progress(Progress("load rows", min(self._done, self._total), self._total, unit="rows", note=note))


@dataclass(frozen=True)
class _Target:
    """What all ranges of a load have in common."""

    database: Database
    cache: ModelCache
    spec: TableSpec
    table: str
    stop: StopSignal
    meter: _Meter


def _load_side_by_side(
    target: _Target, ranges: list[SongIdRange], n_connections: int
) -> tuple[list[RangeLoad], list[str]]:
    """Load ranges in some threads; what was loaded, and what is damaged. Any other error ends all of them."""
    waiting = iter(ranges)
    loads: list[RangeLoad] = []
    damaged: list[str] = []
    failures: list[BaseException] = []

    def serve() -> None:
        while not failures and (song_range := next(waiting, None)) is not None:
            try:
                target.stop.check()
                loads.append(_load_or_discard(song_range, target))
            except (DamagedShardError, StoreError) as error:
                damaged.append(str(error))
            except BaseException as error:  # noqa: BLE001 - it is raised again below
                failures.append(error)

    # daemons: where a server no longer answers, an interrupted process must be able to end
    threads = [threading.Thread(target=serve, daemon=True, name="songvec-load") for _ in range(n_connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return loads, damaged


def _load_or_discard(song_range: SongIdRange, target: _Target) -> RangeLoad:
    """Load a range; damage is discarded, so that the next fill embeds those songs anew.

    Raises:
        DamagedShardError: the range was not loaded.
    """
    with contextlib.suppress(DamagedShardError):
        return _load_range(song_range, target)
    with hold_lock(target.database, lock_name(song_range), on_wait=target.stop.check, check=target.stop.check):
        try:
            # a fill that was just ending may have changed the range while it was read
            return _load_range(song_range, target)
        except DamagedShardError:
            shard = target.cache.open(song_range)
            damaged = shard.rows.join(shard.find_sound(shard.rows), on="song_id", how="anti")["song_id"]
            shard.discard(damaged.to_list())
            raise


def _load_range(song_range: SongIdRange, target: _Target) -> RangeLoad:
    started, cache, table = time.monotonic(), target.cache, target.table
    with target.database.get_connection("parallel") as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(f"load {song_range.key}")})
        # read under the lock: what an earlier load wrote meanwhile may be newer than what was compared
        shard = cache.open(song_range)
        vectors, loaded = shard.rows, read_loaded_rows(connection, song_range, table)
        check_whole(shard, loaded)
        stale = find_stale_rows(connection, song_range, vectors, loaded, table)
        bounds = {"start": song_range.start, "stop": song_range.stop}
        if stale is None:
            wanted = vectors
            deleted = connection.execute(
                text(f"DELETE FROM {table} WHERE song_id >= :start AND song_id < :stop"), bounds
            )
        else:
            wanted = vectors.filter(~pl.col("song_id").is_in(stale.kept))
            deleted = connection.execute(
                text(f"DELETE FROM {table} WHERE song_id = ANY (:song_ids)"), {"song_ids": stale.written_anew}
            )
        store_rows(connection, _check_rows(shard, wanted, target), target.spec, table)
        write_ledger(connection, song_range, vectors, target.spec, table)
        # a changed row is deleted and written
        count_changes(connection, max(wanted.height, deleted.rowcount), table)
    return RangeLoad(song_range, vectors.height, wanted.height, deleted.rowcount, time.monotonic() - started)


def _check_rows(shard: CachedRange, wanted: pl.DataFrame, target: _Target) -> Iterator[CachedRows]:
    """Read rows and hold them against their checksums; a vector that is zero or not finite never gets further."""
    for rows in _slices(shard.iter_vectors(wanted["row"])):
        target.stop.check()
        wrong = ~rows.find_sound()
        if wrong.any():
            named = ", ".join(map(str, rows.song_ids[wrong][:5].tolist()))
            raise DamagedShardError(
                f"{shard.describe} was changed on disk: the vectors of {int(wrong.sum())} or more songs do not fit "
                f"their checksums (song_id {named}, …). They are discarded and the range was not loaded: materialize "
                f"embedding_cache for {shard.range.key}, which embeds those songs again, then load again"
            )
        yield rows
        target.meter.add(len(rows.song_ids), shard.range.key)


def _slices(batches: Iterator[CachedRows]) -> Iterator[CachedRows]:
    """Views of a few rows: the server goes on with what the socket holds while they are checked."""
    for rows in batches:
        for start in range(0, len(rows.song_ids), _SLICE_ROWS):
            yield rows.take(slice(start, start + _SLICE_ROWS))


def _vacuum_if_worth_it(database: Database, loads: list[RangeLoad], table: str) -> None:
    """After a bulk load the first scan would rewrite every page, and the planner would know nothing."""
    n_changed = sum(load.n_written + load.n_deleted for load in loads)
    if n_changed <= _VACUUM_SHARE * max(1, sum(load.n_rows for load in loads)):
        return
    if database.has_sessions:
        with database.get_autocommit() as connection:
            connection.execute(text(f"VACUUM (ANALYZE) {table}"))
    else:  # through a pooler no timeout can be lifted for VACUUM, which autovacuum does later
        with database.get_connection() as connection:
            connection.execute(text(f"ANALYZE {table}"))
