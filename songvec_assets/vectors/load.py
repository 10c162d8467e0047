"""Loads that make a table equal the cache: a range per transaction, and only what changed of it.

`plan_load` compares the cache with the ledger and the table's own song_ids; `upload_cached_embeddings_to_database`
does what it found. A range whose song_ids in the table differ from the ledger's was changed by somebody else, and is
loaded again as a whole. When to add here: another reason to load a range, or another call into the cache, all of which
`LoadSource` has, or another way in for rows. Keep out: the format of COPY (`copy`), and whether a table may be
replaced (`swap`).
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psycopg2
import sqlalchemy as sa
from numpy.typing import NDArray
from pgvector import Vector
from psycopg2.extras import execute_values
from sqlalchemy import text

from songvec_assets.cache.marks import read_mark
from songvec_assets.cache.shards import (
    ModelCache,
    Shard,
    ShardRows,
    load_embeddings_from_cache,
    lock_name,
    read_embeddings_from_file,
)
from songvec_assets.cache.upkeep import discard_damaged_rows
from songvec_assets.errors import DamagedShardError, DatabaseError, StoreError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.postgres.schema import hold_lock, lock_key
from songvec_assets.postgres.sessions import widen_send_buffer
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.source import IdSums
from songvec_assets.vectors import copy
from songvec_assets.vectors.ledger import LedgerEntry
from songvec_assets.vectors.table import SERVING, TableSpec, VectorTable

N_CONNECTIONS = 2
"""Ranges loaded at a time: one range is encoded, committed and synced while the server takes in another. Only one where
searches use an index meanwhile: they want a core, too."""

_STEP = "load rows"
_WHOLE_RANGE_SHARE = 0.5
_VACUUM_SHARE = 0.1
_SLICE_ROWS = 128
_PAGE_ROWS = 500


@dataclass(frozen=True)
class LoadSource:
    """What a table is loaded from.

    Attributes:
        cache: of the table's model.
        tiling: how song_ids are divided into ranges.
        songs_folder: the snapshots, which say what songs there are; only a swap reads them.
    """

    cache: ModelCache
    tiling: Tiling
    songs_folder: Path = Path()

    def ranges(self) -> list[SongIdRange]:
        """The ranges that are cached, as song_ids are divided now.

        Raises:
            StoreError: none is: nothing was ever filled.
        """
        tiles = set(self.tiling)
        ranges = [song_range for song_range in self.cache.ranges() if song_range in tiles]
        if not ranges:
            raise StoreError(
                f"no embeddings are cached for model {self.cache.model!r} in {self.cache.folder}: fill the cache "
                "first, with `songvec run`, or with `dagster asset materialize --select '*' --partition-range "
                "FIRST...LAST`"
            )
        return ranges

    def read(self, song_range: SongIdRange) -> tuple[Shard, pl.DataFrame]:
        """A range's shard, and those of its songs (song_id, checksum, row) that have a vector."""
        shard, live = load_embeddings_from_cache(self.cache, song_range)
        return shard, live.filter(pl.col("reason").is_null())

    def read_rejected(self, song_range: SongIdRange) -> set[int]:
        """Songs of a range that the provider rejected."""
        live = load_embeddings_from_cache(self.cache, song_range)[1]
        return set(live.filter(pl.col("reason").is_not_null())["song_id"])

    def check_whole(self, shard: Shard, n_vectors: int, loaded: pl.DataFrame | None = None) -> None:
        """Refuse a shard that lost rows: that a song is not in it does not say that the song was deleted.

        Where a complete fill left its mark, the file must be as it was then. Where a fill is on its way, it may end in
        a torn write, but each loaded song must be in it, if only as deleted.

        Raises:
            DamagedShardError: it lost rows.
        """
        song_range, n_lost = shard.identity.range, 0
        mark = read_mark(self.cache.mark_of(song_range))
        n_missing_bytes = max(0, mark.n_bytes - shard.n_bytes) if mark else 0
        if mark and mark.n_bytes == shard.n_bytes:
            n_lost = max(0, mark.n_songs - mark.n_set_aside - n_vectors)
            is_damaged = n_lost > 0 or shard.n_bytes_damaged > 0
        else:
            if loaded is not None:
                n_lost = int((~loaded["song_id"].is_in(shard.told_song_ids().to_list())).sum())
            is_damaged = n_lost > 0 or n_missing_bytes > 0 or shard.n_bytes_skipped > 0
        if is_damaged:
            raise DamagedShardError(
                f"{shard.path} was changed on disk: {shard.n_bytes_damaged:,} bytes are damaged, {n_missing_bytes:,} "
                f"are missing, and {n_lost:,} songs are no longer in it. The range was not loaded: materialize "
                f"embedding_cache for {song_range.key}, which embeds what is lost again, then load again"
            )

    def read_embeddings(self, shard: Shard, wanted: pl.DataFrame) -> Iterator[ShardRows]:
        """Vectors of some rows, a few at a time; a vector that does not fit its checksum gets no further.

        Raises:
            DamagedShardError: some do not fit.
        """
        for batch in read_embeddings_from_file(shard, wanted["row"]):
            # few rows a slice: the server goes on with what the socket holds while they are checked
            for start in range(0, len(batch.song_ids), _SLICE_ROWS):
                rows = batch.take(slice(start, start + _SLICE_ROWS))
                wrong = ~rows.find_sound()
                if wrong.any():
                    named = ", ".join(map(str, rows.song_ids[wrong][:5].tolist()))
                    raise DamagedShardError(
                        f"{shard.path} was changed on disk: the vectors of {int(wrong.sum())} or more songs do not fit "
                        f"their checksums (song_id {named}, …). They are discarded and the range was not loaded: "
                        f"materialize embedding_cache for {shard.identity.range.key}, which embeds those songs again, "
                        "then load again"
                    )
                yield rows

    def doubt(self, song_range: SongIdRange) -> None:
        """Let the next fill look at every row of a range, as if it had never been complete."""
        self.cache.mark_of(song_range).unlink(missing_ok=True)

    def discard_damage(self, song_range: SongIdRange) -> None:
        """Remove damaged rows of a range, so that the next fill embeds those songs again."""
        self.doubt(song_range)
        discard_damaged_rows(load_embeddings_from_cache(self.cache, song_range)[0])


@dataclass(frozen=True)
class LoadPlan:
    """What a table lacks compared with the cache.

    Attributes:
        unchanged: rows of each range with nothing to do.
        changed: rows of each range that differs.
        n_changed: rows of all ranges that differ.
        damaged: what is wrong with the ranges that cannot be read.
        n_unmanaged: rows of ranges that nothing was ever loaded of: somebody else's, and left alone.
    """

    unchanged: dict[SongIdRange, int] = field(default_factory=dict)
    changed: dict[SongIdRange, int] = field(default_factory=dict)
    n_changed: int = 0
    damaged: dict[SongIdRange, str] = field(default_factory=dict)
    n_unmanaged: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of all ranges."""
        return sum(self.unchanged.values()) + sum(self.changed.values())


@dataclass(frozen=True)
class RangeLoad:
    """What a load did to one range: rows."""

    range: SongIdRange
    n_rows: int
    n_written: int = 0
    n_deleted: int = 0
    seconds: float = 0.0


def plan_load(table: VectorTable, source: LoadSource, run: RunContext = SILENT) -> LoadPlan:
    """Compare the cache with the ledger and the table's own song_ids. Reads no vector and changes nothing.

    Raises:
        StoreError: the cache is empty: nothing was ever filled.
    """
    ranges, ledger = source.ranges(), table.ledger.read()
    in_table, below = table.read_id_sums(source.tiling)
    unmanaged = in_table.keys() - ledger.keys() - set(ranges)
    unchanged, changed, damaged, n_changed = {}, {}, {}, 0
    for song_range in ranges:
        run.check_stop()
        try:
            vectors = source.read(song_range)[1]
        except StoreError as error:
            damaged[song_range] = str(error)
            continue
        entry, there = ledger.get(song_range), in_table.get(song_range, IdSums())
        if entry == LedgerEntry.of(vectors) and there == IdSums.of(vectors["song_id"]):
            unchanged[song_range] = vectors.height
            continue
        changed[song_range] = n_range = vectors.height
        if entry is not None and there.n_rows:
            with table.database.get_connection() as connection:
                loaded = table.ledger.read_rows(song_range, connection)
                changes = _find_changes(connection, table, song_range, vectors, loaded)
            n_range = n_range if changes is None else len(changes.rewritten)
        n_changed += n_range
    n_unmanaged = below.n_rows + sum(in_table[each].n_rows for each in unmanaged)
    return LoadPlan(unchanged, changed, n_changed, damaged, n_unmanaged)


@dataclass(frozen=True)
class _RangeChanges:
    """What changed of a range: song_ids whose rows stay, and of those that are deleted or rewritten."""

    kept: list[int]
    rewritten: list[int]


def _find_changes(
    connection: sa.Connection,
    table: VectorTable,
    song_range: SongIdRange,
    vectors: pl.DataFrame,
    loaded: pl.DataFrame | None,
) -> _RangeChanges | None:
    """Compare what the ledger says is loaded of a range with the cache; None: write the whole range."""
    if loaded is None or IdSums.of(loaded["song_id"]) != table.read_id_sums_of(connection, song_range):
        return None
    kept = loaded.join(vectors, on=["song_id", "checksum"], how="semi")["song_id"]
    n_rows = max(loaded.height, vectors.height)
    if n_rows - len(kept) > _WHOLE_RANGE_SHARE * n_rows:
        return None
    # the new songs' ids too: an unmanaged row may be in their place
    songs = pl.concat([loaded["song_id"], vectors["song_id"]]).unique()
    return _RangeChanges(kept.to_list(), songs.filter(~songs.is_in(kept.implode())).to_list())


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
        table: to load; created where it is missing.
        source: the cache.
        spec: what the table holds.
        run: notified of the rows loaded; a stop ends the load between two ranges, or in the middle of one, which is
            rolled back.
        plan: what `plan_load` found; None: it is asked.
        n_connections: ranges loaded at a time.

    Returns:
        Every range, those with nothing to do included, in order.

    Raises:
        ValueError: the cache is of another model or size than the table.
        StoreError: the cache is empty: nothing was ever filled.
        DamagedShardError: ranges lost rows, hold rows that do not fit their checksum, or are another's; the other
            ranges are loaded.
    """
    if (source.cache.model, source.cache.dimensions) != (spec.model, spec.dimensions):
        raise ValueError(f"expected a cache of {spec}, got {source.cache.dimensions} values by {source.cache.model}")
    plan = plan or plan_load(table, source, run)
    if table.ensure(spec) and plan.unchanged:
        # a table that was replaced took with it what was compared
        plan = plan_load(table, source, run)
    for song_range in plan.damaged:
        source.doubt(song_range)
    load = _Load(table, source, spec, run, plan.n_changed)
    loads, damaged = load.run_side_by_side(list(plan.changed), n_connections)
    loads += [RangeLoad(song_range, n_rows) for song_range, n_rows in plan.unchanged.items()]
    load.report(plan.n_changed)
    try:
        _vacuum_if_worth_it(table, loads)
    except DatabaseError as error:
        run.check_stop()
        # the rows are committed and the ledger has them; autovacuum does it later
        note = f"the rows are loaded; VACUUM failed and can be run by hand: {error}"
        run.report(Progress(_STEP, plan.n_changed, plan.n_changed, unit="rows", note=note, is_trouble=True))
    if damaged := [*plan.damaged.values(), *damaged]:
        raise DamagedShardError("; ".join(damaged))
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
        """Load ranges in some threads; what was loaded, and what is damaged. Any other error ends all of them."""
        waiting = iter(ranges)
        loads: list[RangeLoad] = []
        damaged: list[str] = []
        failures: list[BaseException] = []

        def serve() -> None:
            while not failures and (song_range := next(waiting, None)) is not None:
                try:
                    self._run.check_stop()
                    loads.append(self._load_or_discard(song_range))
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

    def _load_or_discard(self, song_range: SongIdRange) -> RangeLoad:
        """Load a range; damage is discarded, so that the next fill embeds those songs again."""
        with contextlib.suppress(DamagedShardError):
            return self._load_range(song_range)
        check = self._run.check_stop
        with hold_lock(self._table.database, lock_name(song_range), on_wait=check, check=check):
            try:
                # a fill that was just ending may have changed shard and mark while they were read
                return self._load_range(song_range)
            except DamagedShardError:
                self._source.discard_damage(song_range)
                raise

    def _load_range(self, song_range: SongIdRange) -> RangeLoad:
        started, table = time.monotonic(), self._table
        with table.database.get_connection("parallel") as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(f"load {song_range.key}")})
            # read under the lock: what an earlier load wrote meanwhile may be newer than what was compared
            shard, vectors = self._source.read(song_range)
            loaded = table.ledger.read_rows(song_range, connection)
            self._source.check_whole(shard, vectors.height, loaded)
            changes = _find_changes(connection, table, song_range, vectors, loaded)
            if changes is None:
                wanted, condition = vectors, "song_id >= :start AND song_id < :stop"
                values: dict[str, Any] = {"start": song_range.start, "stop": song_range.stop}
            else:
                wanted, condition = vectors.filter(~pl.col("song_id").is_in(changes.kept)), "song_id = ANY (:song_ids)"
                values = {"song_ids": changes.rewritten}
            deleted = connection.execute(text(f"DELETE FROM {table.name} WHERE {condition}"), values)
            store_rows(connection, self._read(shard, wanted), self._spec, table.name)
            table.ledger.write(connection, song_range, vectors, self._spec)
            # a changed row is deleted and written
            table.count_changes(connection, max(wanted.height, deleted.rowcount))
        return RangeLoad(song_range, vectors.height, wanted.height, deleted.rowcount, time.monotonic() - started)

    def _read(self, shard: Shard, wanted: pl.DataFrame) -> Iterator[ShardRows]:
        for rows in self._source.read_embeddings(shard, wanted):
            self._run.check_stop()
            yield rows
            self.report(len(rows.song_ids), shard.identity.range.key)


def _vacuum_if_worth_it(table: VectorTable, loads: list[RangeLoad]) -> None:
    """After a bulk load the first scan would rewrite every page, and the planner would know nothing."""
    n_changed = sum(load.n_written + load.n_deleted for load in loads)
    if n_changed <= _VACUUM_SHARE * max(1, sum(load.n_rows for load in loads)):
        return
    if table.database.has_sessions:
        with table.database.get_autocommit() as connection:
            connection.execute(text(f"VACUUM (ANALYZE) {table.name}"))
    else:  # through a pooler no timeout can be lifted for VACUUM, which autovacuum does later
        with table.database.get_connection() as connection:
            connection.execute(text(f"ANALYZE {table.name}"))


def store_rows(connection: sa.Connection, batches: Iterator[ShardRows], spec: TableSpec, table: str = SERVING) -> None:
    """Insert rows by COPY; an empty one finds out whether a pooler in between takes it, else by row batches.

    Args:
        connection: in a transaction.
        batches: rows whose song_ids are not in the table.
        spec: what the table holds.
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
    connection: sa.Connection, batches: Iterator[ShardRows], spec: TableSpec, table: str = SERVING
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
        spec: what the table holds.
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
