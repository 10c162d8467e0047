"""From the cache to what searches find: under the index where little changed, else built beside and swapped in whole.

Searches see the old rows or the new ones, never a part: a range is one transaction, and a swap is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from songvec_assets.cache.shards import ModelCache
from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import hold_lock
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.backlog import Backlog, compare_with_cache
from songvec_assets.vectors.comparison import Comparison, MissingSongs, compare_tables
from songvec_assets.vectors.ivfflat import IndexReport, IndexSettings, bring_index_up_to_date, find_index
from songvec_assets.vectors.ledger import LedgerEntry, read_ledger_within
from songvec_assets.vectors.load import N_CONNECTIONS, RangeLoad, upload_cached_embeddings_to_database
from songvec_assets.vectors.preflight import check_target
from songvec_assets.vectors.swap import LOCK, check_attachments, find_attachments, put_in_place
from songvec_assets.vectors.table import (
    BESIDE,
    KEPT,
    TABLE,
    TableSpec,
    check_table,
    drop_table,
    loaded_spec,
    read_spec,
    table_exists,
)

BESIDE_SHARE = 0.2
"""Rows changed beyond this share want a new index anyway: a new table is loaded five times as fast without one."""
BESIDE_FROM_ROWS = 20_000
"""Fewer rows go in under the index in seconds."""


@dataclass(frozen=True)
class Place:
    """Where the rows go.

    Attributes:
        table: the serving one, or the one beside it.
        reason: why there.
        keep: whether what serves now is kept when the other takes its place.
    """

    table: str
    reason: str
    keep: bool = False


@dataclass(frozen=True)
class PublishReport:
    """What was decided and done.

    Attributes:
        place: where the rows went, and why.
        loads: a row a range.
        index: of the table that was swapped in; None where none was.
        comparison: of the two tables; None where none was swapped in.
        n_foreign: rows of the serving table that somebody else put where nothing was ever loaded.
    """

    place: Place
    loads: list[RangeLoad]
    index: IndexReport | None = None
    comparison: Comparison | None = None
    n_foreign: int = 0


def check_publishable(database: Database, spec: TableSpec, swap: bool) -> str:
    """Refuse, before anything is paid for, what could not be loaded afterwards; see also `preflight`.

    Returns:
        The table that the rows are to go to: the serving one, or BESIDE for a swap.

    Raises:
        TableMismatchError: the serving table holds something else and may not be swapped, or something is in the way.
    """
    if _holds(database, spec, swap):
        return TABLE
    _check_swappable(database, spec)
    return BESIDE


def publish_embeddings(
    database: Database,
    cache: ModelCache,
    spec: TableSpec,
    tiling: Tiling,
    songs_folder: Path,
    index: IndexSettings,
    *,
    swap: bool = False,
    beside_from_rows: int = BESIDE_FROM_ROWS,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> PublishReport:
    """Make the serving table equal the cache.

    Args:
        database: where the table is.
        cache: the shards to load.
        spec: what the table is to hold.
        tiling: how song_ids are cut.
        songs_folder: the snapshots.
        index: how a table built beside is indexed.
        swap: whether another model, size or type may take the serving one's place.
        beside_from_rows: changed rows from which a table is built beside an indexed one.
        progress: told as it goes.
        stop: ends it; the next call goes on from there.

    Raises:
        StoreError: the cache is empty.
        DamagedShardError: see `upload_cached_embeddings_to_database`; what serves stays as it is.
        TableMismatchError: see `check_publishable`; `MissingSongs`, asked before the build and again
            after it; `check_attachments`, asked again in the swap itself.
    """
    stop = stop or StopSignal()

    def tell_waiting() -> None:
        progress(Progress("load rows", 0, 0, unit="rows", note="waiting for another load or swap to end"))

    with hold_lock(database, LOCK, on_wait=tell_waiting, check=stop.check) as check_held:
        backlog = compare_with_cache(database, cache, tiling, stop)
        place = _choose_place(database, spec, backlog, swap, beside_from_rows, check_held)
        missing = MissingSongs(database, cache, tiling, songs_folder, stop)
        if place.table == BESIDE:
            missing.check_cache()
            backlog = compare_with_cache(database, cache, tiling, stop, BESIDE)
        if place.table == BESIDE or backlog.changed:
            check_target(database, spec, index, backlog.n_rows, place.table)
        n_connections = 1 if find_index(database) else N_CONNECTIONS
        loads = upload_cached_embeddings_to_database(
            database, cache, spec, tiling, progress, stop, table=place.table, n_connections=n_connections,
            backlog=backlog,
        )  # fmt: skip
        if place.table == TABLE:
            return PublishReport(place, loads, n_foreign=backlog.n_foreign)
        report = bring_index_up_to_date(
            database, cache, spec, index, table=BESIDE, progress=progress, stop=stop, check_held=check_held
        )
        compared = _read_ledgers(database)
        missing.check_table()
        comparison = compare_tables(database)

        def confirm(connection: sa.Connection) -> None:
            # the song_ids of millions are not compared while searches wait: what was compared must be what is there
            if _read_ledgers_within(connection) != compared:
                raise TableMismatchError(
                    f"{TABLE} or {BESIDE} was loaded by another run meanwhile: {TABLE} was not replaced. Start the "
                    "same command again, which goes on from here"
                )

        put_in_place(database, place.keep, stop.check, check_held, confirm)
        return PublishReport(place, loads, report, comparison)


def _read_ledgers(database: Database) -> list[dict[SongIdRange, LedgerEntry]]:
    with database.get_connection() as connection:
        return _read_ledgers_within(connection)


def _read_ledgers_within(connection: sa.Connection) -> list[dict[SongIdRange, LedgerEntry]]:
    return [read_ledger_within(connection, table) for table in (TABLE, BESIDE)]


def _choose_place(
    database: Database,
    spec: TableSpec,
    backlog: Backlog,
    swap: bool,
    beside_from_rows: int,
    check_held: Callable[[], None],
) -> Place:
    if not _holds(database, spec, swap):
        serving = _check_swappable(database, spec)
        return Place(BESIDE, f"{serving or 'the old table'} serves until {spec} is whole and indexed", keep=True)
    told = f"{backlog.n_changed:,} of {backlog.n_rows:,} rows changed"
    if find_index(database) is None:
        return Place(TABLE, f"{told}, and there is no index yet that they would slow down")
    with database.get_connection() as connection:
        beside, attachments = read_spec(connection, BESIDE), find_attachments(connection)
    if backlog.n_changed <= max(beside_from_rows, BESIDE_SHARE * backlog.n_rows):
        if beside == spec:
            check_held()
            _drop_beside(database)
        return Place(TABLE, f"{told}: few enough to go in under the index")
    if backlog.n_foreign:
        attachments.append(f"{backlog.n_foreign:,} rows that somebody else put there")
    if attachments:
        return Place(TABLE, f"{told}, but {', '.join(attachments)} would stay with the old table")
    if beside not in (None, spec):
        return Place(TABLE, f"{told}, but {beside} is being built beside: `songvec swap` finishes or drops it")
    return Place(BESIDE, f"{told}: built beside and swapped in, faster than under the index")


def _holds(database: Database, spec: TableSpec, swap: bool) -> bool:
    """Whether the serving table is for `spec`; raises where it is not, and no other may take its place."""
    if swap and loaded_spec(database) not in (None, spec):
        return False  # even where it would give way
    try:
        check_table(database, spec)
    except TableMismatchError:
        if not swap:
            raise
        return False
    return True


def _drop_beside(database: Database) -> None:
    """Remove what a load that was killed left behind."""
    with database.get_connection() as connection:
        drop_table(connection, BESIDE)


def _check_swappable(database: Database, spec: TableSpec) -> TableSpec | None:
    """What serves now; raises where another cannot take its place."""
    with database.get_connection() as connection:
        serving, beside, kept = (read_spec(connection, table) for table in (TABLE, BESIDE, KEPT))
        if table_exists(connection, KEPT):
            raise TableMismatchError(
                f"table {KEPT} still holds {kept} from an earlier swap: `songvec swap --rollback` lets it serve again, "
                "`songvec swap --drop-old` drops it; then swap"
            )
        if table_exists(connection, BESIDE) and beside != spec:
            raise TableMismatchError(
                f"table {BESIDE} holds {beside}, which never took its place, expected {spec} or none: finish it with "
                "its settings, or drop it with `songvec swap --drop-old`; then swap"
            )
        check_attachments(connection)
    return serving
