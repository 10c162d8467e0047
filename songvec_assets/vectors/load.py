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

from songvec_assets.cache.parts import CachedRows
from songvec_assets.cache.shards import CachedRange, ModelCache, RangeSummary, lock_name
from songvec_assets.errors import DamagedShardError, DatabaseError, StoreError
from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.postgres.schema import hold_lock, lock_key
from songvec_assets.postgres.sessions import widen_send_buffer
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.storage import Storage
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
        snapshots: say what songs there are; only a swap reads them.
    """

    cache: ModelCache
    tiling: Tiling
    snapshots: Snapshots = field(default_factory=lambda: Snapshots(Storage(Path())))

    def ranges(self) -> list[SongIdRange]:
        """The ranges that are cached, as song_ids are divided now.

        Raises:
            StoreError: none is: nothing was ever filled.
        """
        tiles = set(self.tiling)
        ranges = [song_range for song_range in self.cache.ranges() if song_range in tiles]
        if not ranges:
            raise StoreError(
                f"no embeddings are cached for model {self.cache.model!r} in {self.cache.storage}: fill the cache "
                "first, with `songvec run`, or with `dagster asset materialize --select '*' --partition-range "
                "FIRST...LAST`"
            )
        return ranges

    def check_whole(self, cached: CachedRange, loaded: pl.DataFrame | None = None) -> None:
        """Refuse a range that lost rows: that a song is not in it does not say that the song was deleted.

        Its manifest names the files that must be there, and songs whose rows were found damaged. Without a manifest
        each loaded song must be in a file.

        Raises:
            DamagedShardError: it lost rows.
        """
        n_lost = 0
        if loaded is not None:
            found = loaded["song_id"].is_in(cached.rows["song_id"].implode())
            lost = loaded["song_id"].is_in([*cached.manifest.damaged]) if cached.is_read else pl.lit(True)
            n_lost = loaded.filter(~found & lost).height
        if cached.damaged or n_lost:
            named = "; ".join(f"{name}: {why}" for name, why in cached.damaged.items()) or "none"
            raise DamagedShardError(
                f"{cached.describe} was changed on disk: {len(cached.damaged):,} files cannot be read ({named}), and "
                f"the vectors of {n_lost:,} loaded songs are lost. The range was not loaded: materialize "
                f"embedding_cache for {cached.range.key}, which embeds again what is lost, then load again"
            )

    def read_embeddings(self, cached: CachedRange, wanted: pl.DataFrame) -> Iterator[CachedRows]:
        """Vectors of some rows, a few at a time; a vector that does not fit its checksum gets no further.

        Raises:
            DamagedShardError: some do not fit.
        """
        for batch in cached.iter_vectors(wanted["row"]):
            # few rows a slice: the server goes on with what the socket holds while they are checked
            for start in range(0, len(batch.song_ids), _SLICE_ROWS):
                rows = batch.take(slice(start, start + _SLICE_ROWS))
                wrong = ~rows.find_sound()
                if wrong.any():
                    named = ", ".join(map(str, rows.song_ids[wrong][:5].tolist()))
                    raise DamagedShardError(
                        f"{cached.describe} was changed on disk: the vectors of {int(wrong.sum())} or more songs do "
                        f"not fit their checksums (song_id {named}, …). They are discarded and the range was not "
                        f"loaded: materialize embedding_cache for {cached.range.key}, which embeds those songs again, "
                        "then load again"
                    )
                yield rows

    def discard_damage(self, song_range: SongIdRange) -> None:
        """Record damaged rows of a range, so that the next fill embeds those songs again."""
        cached = self.cache.open(song_range)
        sound = cached.find_sound(cached.rows)
        cached.discard(cached.rows.join(sound, on="song_id", how="anti")["song_id"].to_list())


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


@dataclass(frozen=True)
class RangeState:
    """What the cache, the ledger and the table have of a range.

    Attributes:
        cached: by the cache's manifest.
        loaded: by the ledger; None: it was never loaded.
        in_table: by the table's primary key.
    """

    cached: RangeSummary
    loaded: LedgerEntry | None
    in_table: IdSums

    @property
    def is_loaded(self) -> bool:
        """Whether all three have the same rows, and no file is damaged: a load names it."""
        is_recorded = self.loaded == LedgerEntry(self.cached.n_vectors, self.cached.digest)
        return is_recorded and self.in_table == self.cached.ids and not self.cached.is_damaged


def compare(
    table: VectorTable, cache: ModelCache, tiling: Tiling, opens_files: bool = False
) -> tuple[dict[SongIdRange, RangeState], int]:
    """What there is of each range, in order.

    Args:
        table: whose rows and ledger are looked at.
        cache: of its model.
        tiling: how song_ids are divided into ranges.
        opens_files: see `ModelCache.summarize`.

    Returns:
        Every range that is cached, loaded or has rows; and the number of rows with a negative song_id.
    """
    ledger, (in_table, below) = table.ledger.read(), table.read_id_sums(tiling)
    ranges = sorted({*cache.ranges(), *ledger, *in_table})
    states = {
        each: RangeState(cache.summarize(each, opens_files), ledger.get(each), in_table.get(each, IdSums()))
        for each in ranges
    }
    return states, below.n_rows


def plan_load(table: VectorTable, source: LoadSource, run: RunContext = SILENT) -> LoadPlan:
    """Compare the cache with the ledger and the table's own song_ids. Reads no vector and changes nothing.

    Raises:
        StoreError: the cache is empty: nothing was ever filled.
    """
    ranges = source.ranges()
    # each file is opened once: a load that has nothing to do still finds what a disk changed
    states, n_unmanaged = compare(table, source.cache, source.tiling, opens_files=True)
    unchanged, changed, damaged, n_changed = {}, {}, {}, 0
    for song_range, state in states.items():
        run.check_stop()
        n_rows = state.cached.n_vectors
        if song_range not in ranges:
            n_unmanaged += 0 if state.loaded else state.in_table.n_rows
        elif state.cached.error:
            damaged[song_range] = state.cached.error
        elif state.is_loaded:
            unchanged[song_range] = n_rows
        else:
            changed[song_range] = n_rows
            if state.loaded is not None and state.in_table.n_rows:
                vectors, loaded = source.cache.open(song_range).rows, table.ledger.read_rows(song_range)
                changes = _find_changes(loaded, vectors, state.in_table)
                n_rows = n_rows if changes is None else len(changes.rewritten)
            n_changed += n_rows
    return LoadPlan(unchanged, changed, n_changed, damaged, n_unmanaged)


@dataclass(frozen=True)
class _RangeChanges:
    """What changed of a range: song_ids whose rows stay, and of those that are deleted or rewritten."""

    kept: list[int]
    rewritten: list[int]


def _find_changes(loaded: pl.DataFrame | None, vectors: pl.DataFrame, in_table: IdSums) -> _RangeChanges | None:
    """Compare what the ledger says is loaded of a range with the cache; None: write the whole range."""
    if loaded is None or IdSums.of(loaded["song_id"]) != in_table:
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
                # a fill that was just ending may have changed the range while it was read
                return self._load_range(song_range)
            except DamagedShardError:
                self._source.discard_damage(song_range)
                raise

    def _load_range(self, song_range: SongIdRange) -> RangeLoad:
        started, table = time.monotonic(), self._table
        with table.database.get_connection("parallel") as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(f"load {song_range.key}")})
            # read under the lock: what an earlier load wrote meanwhile may be newer than what was compared
            cached = self._source.cache.open(song_range)
            vectors, loaded = cached.rows, table.ledger.read_rows(song_range, connection)
            self._source.check_whole(cached, loaded)
            changes = _find_changes(loaded, vectors, table.read_id_sums_of(connection, song_range))
            if changes is None:
                wanted, condition = vectors, "song_id >= :start AND song_id < :stop"
                values: dict[str, Any] = {"start": song_range.start, "stop": song_range.stop}
            else:
                wanted, condition = vectors.filter(~pl.col("song_id").is_in(changes.kept)), "song_id = ANY (:song_ids)"
                values = {"song_ids": changes.rewritten}
            deleted = connection.execute(text(f"DELETE FROM {table.name} WHERE {condition}"), values)
            store_rows(connection, self._read(cached, wanted), self._spec, table.name)
            table.ledger.write(connection, song_range, vectors, self._spec)
            # a changed row is deleted and written
            table.count_changes(connection, max(wanted.height, deleted.rowcount))
        return RangeLoad(song_range, vectors.height, wanted.height, deleted.rowcount, time.monotonic() - started)

    def _read(self, cached: CachedRange, wanted: pl.DataFrame) -> Iterator[CachedRows]:
        for rows in self._source.read_embeddings(cached, wanted):
            self._run.check_stop()
            yield rows
            self.report(len(rows.song_ids), cached.range.key)


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


def store_rows(connection: sa.Connection, batches: Iterator[CachedRows], spec: TableSpec, table: str = SERVING) -> None:
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
