"""Loads that make the table equal the cache: a range a transaction, and only what changed of it.

A range whose count in the table differs from the ledger's was changed by somebody else, and is loaded anew as a whole.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import psycopg2
import sqlalchemy as sa
from numpy.typing import NDArray
from pgvector import Vector
from psycopg2.extras import execute_values
from sqlalchemy import text

from songvec_assets.cache.format import find_sound_rows
from songvec_assets.cache.marks import Mark, read_mark
from songvec_assets.cache.shards import (
    ModelCache,
    Shard,
    ShardRows,
    discard_damaged_rows,
    load_embeddings_from_cache,
    lock_name,
    read_embeddings_from_file,
)
from songvec_assets.errors import DamagedShardError, StoreError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.postgres.schema import hold_lock, lock_key, read_fact, write_fact
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.copy import CopyStream, encode_rows
from songvec_assets.vectors.ledger import LedgerEntry, count_table_rows, read_ledger, read_loaded_rows, write_ledger
from songvec_assets.vectors.table import CHANGES_FACT, TableSpec, ensure_table

_COPY = "COPY song_embeddings (song_id, embedding) FROM STDIN (FORMAT binary)"
_WHOLE_RANGE_SHARE = 0.5
_VACUUM_SHARE = 0.1


@dataclass(frozen=True)
class RangeLoad:
    """What a load did to one range: rows."""

    range: SongIdRange
    n_rows: int
    n_written: int
    n_deleted: int
    seconds: float


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
        DamagedShardError: shards lost rows, hold rows that do not fit their checksum, or are another's; the other
            ranges are loaded.
    """
    tiles = set(tiling)
    ranges = [song_range for song_range in cache.ranges() if song_range in tiles]
    if not ranges:
        raise StoreError(
            f"no embeddings are cached for model {cache.model!r} in {cache.folder}: fill the cache first, with "
            "`songvec run`, or with `dagster asset materialize --select '*' --partition-range FIRST...LAST`"
        )
    ensure_table(database, spec)
    stop = stop or StopSignal()
    loads: list[RangeLoad] = []
    damaged: list[str] = []
    ledger, counts = read_ledger(database), count_table_rows(database, tiling)
    changed: list[tuple[SongIdRange, int]] = []
    for song_range in ranges:
        stop.check()
        try:
            vectors = _read_vectors(cache, song_range)[1]
        except StoreError as error:
            damaged.append(str(error))
            cache.mark_of(song_range).unlink(missing_ok=True)
            continue
        if ledger.get(song_range) == LedgerEntry.of(vectors) and counts.get(song_range, 0) == vectors.height:
            loads.append(RangeLoad(song_range, vectors.height, 0, 0, 0.0))
        else:
            changed.append((song_range, vectors.height))
    done, total = 0, sum(n_rows for _, n_rows in changed)
    for song_range, n_rows in changed:
        stop.check()
        progress(Progress("load rows", done, total, unit="rows", note=song_range.key))
        try:
            loads.append(_load_or_discard(database, cache, song_range, spec, stop))
        except (DamagedShardError, StoreError) as error:
            damaged.append(str(error))
        done += n_rows
    progress(Progress("load rows", done, total, unit="rows"))
    _vacuum_if_worth_it(database, loads)
    if damaged:
        raise DamagedShardError("; ".join(damaged))
    return loads


def _load_or_discard(
    database: Database, cache: ModelCache, song_range: SongIdRange, spec: TableSpec, stop: StopSignal
) -> RangeLoad:
    """Load a range; damage is discarded, so that the next fill embeds those songs anew.

    Raises:
        DamagedShardError: the range was not loaded.
    """
    with contextlib.suppress(DamagedShardError):
        return _load_range(database, cache, song_range, spec, stop)
    with hold_lock(database, lock_name(song_range), on_wait=stop.check, check=stop.check):
        try:
            # a fill that was just ending may have changed shard and mark while they were read
            return _load_range(database, cache, song_range, spec, stop)
        except DamagedShardError:
            cache.mark_of(song_range).unlink(missing_ok=True)
            discard_damaged_rows(load_embeddings_from_cache(cache, song_range)[0])
            raise


def _read_vectors(cache: ModelCache, song_range: SongIdRange) -> tuple[Shard, pl.DataFrame]:
    shard, live = load_embeddings_from_cache(cache, song_range)
    return shard, live.filter(pl.col("reason").is_null())


def _load_range(
    database: Database, cache: ModelCache, song_range: SongIdRange, spec: TableSpec, stop: StopSignal
) -> RangeLoad:
    started = time.monotonic()
    with database.get_connection() as connection:
        _lift_timeout(connection, for_transaction=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(f"load {song_range.key}")})
        # read under the lock: what an earlier load wrote meanwhile may be newer than what was compared
        shard, vectors = _read_vectors(cache, song_range)
        _check_whole(connection, shard, vectors.height, read_mark(cache.mark_of(song_range)))
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
        write_ledger(connection, song_range, vectors, spec)
        changed = read_fact(connection, CHANGES_FACT) or 0
        write_fact(connection, CHANGES_FACT, changed + wanted.height + deleted.rowcount)
    return RangeLoad(song_range, vectors.height, wanted.height, deleted.rowcount, time.monotonic() - started)


def _check_whole(connection: sa.Connection, shard: Shard, n_vectors: int, mark: Mark | None) -> None:
    """Refuse a shard that lost rows: that a song is not in it does not say that the song is gone.

    Where a complete fill left its mark, the file must be as it was then. Where a fill is on its way, it may end in a
    torn write, but each loaded song must be in it, if only to be told gone.
    """
    song_range = shard.identity.range
    n_missing_bytes = max(0, mark.n_bytes - shard.n_bytes) if mark else 0
    n_lost = 0
    if mark and mark.n_bytes == shard.n_bytes:
        n_lost = max(0, mark.n_songs - mark.n_set_aside - n_vectors)
        is_damaged = n_lost > 0 or shard.n_bytes_damaged > 0
    else:
        loaded = read_loaded_rows(connection, song_range)
        if loaded is not None:
            n_lost = int((~loaded["song_id"].is_in(shard.told_song_ids().to_list())).sum())
        is_damaged = n_lost > 0 or n_missing_bytes > 0 or shard.n_bytes_skipped > 0
    if is_damaged:
        raise DamagedShardError(
            f"{shard.path} was changed on disk: {shard.n_bytes_damaged:,} bytes are damaged, {n_missing_bytes:,} are "
            f"missing, and {n_lost:,} songs are no longer in it. The range was not loaded: materialize "
            f"embedding_cache for {song_range.key}, which embeds what is lost anew, then load again"
        )


@dataclass(frozen=True)
class _StaleRows:
    kept: list[int]
    written_anew: list[int]


def _find_stale_rows(connection: sa.Connection, song_range: SongIdRange, vectors: pl.DataFrame) -> _StaleRows | None:
    """Compare what the ledger says is loaded with the cache; None: write the whole range."""
    loaded = read_loaded_rows(connection, song_range)
    count = connection.scalar(
        text("SELECT count(*) FROM song_embeddings WHERE song_id >= :start AND song_id < :stop"),
        {"start": song_range.start, "stop": song_range.stop},
    )
    if loaded is None or loaded.height != count:
        return None
    kept = loaded.join(vectors, on=["song_id", "checksum"], how="semi")
    n_rows = max(loaded.height, vectors.height)
    if n_rows - kept.height > _WHOLE_RANGE_SHARE * n_rows:
        return None
    # the new songs' ids too: a foreign row may be in their place
    changed = pl.concat([loaded["song_id"], vectors["song_id"]]).unique()
    return _StaleRows(kept["song_id"].to_list(), changed.filter(~changed.is_in(kept["song_id"].to_list())).to_list())


def _check_rows(shard: Shard, wanted: pl.DataFrame, stop: StopSignal) -> Iterator[ShardRows]:
    """Read rows and hold them against their checksums; a vector that is zero or not finite never gets further."""
    text_hashes = dict(wanted.select("song_id", "text_hash").iter_rows())
    for rows in read_embeddings_from_file(shard, wanted["row"]):
        stop.check()
        hashes = [text_hashes[song_id] for song_id in rows.song_ids.tolist()]
        wrong = ~find_sound_rows(rows.song_ids, hashes, rows.checksums, rows.embeddings)
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
    stream = CopyStream(chunks)
    with raw_cursor(connection) as cursor:
        try:
            cursor.copy_expert(_COPY, stream, size=1 << 18)
        except psycopg2.Error:
            if stream.error is not None:
                raise stream.error from None
            raise


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


def _lift_timeout(connection: sa.Connection, for_transaction: bool) -> None:
    """A role's statement_timeout is made for queries: it would end the load of a range every time."""
    connection.execute(text("SELECT set_config('statement_timeout', '0', :local)"), {"local": for_transaction})


def _vacuum_if_worth_it(database: Database, loads: list[RangeLoad]) -> None:
    """After a bulk load the first scan would rewrite every page, and the planner would know nothing."""
    n_changed = sum(load.n_written + load.n_deleted for load in loads)
    if n_changed > _VACUUM_SHARE * max(1, sum(load.n_rows for load in loads)):
        with database.get_autocommit() as connection:
            _lift_timeout(connection, for_transaction=False)
            connection.execute(text("VACUUM (ANALYZE) song_embeddings"))
