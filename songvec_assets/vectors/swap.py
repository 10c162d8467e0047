"""From the cache to what searches find: under the index where little changed, else through a staging table.

Searches see the old rows or the new ones, never a part: a range is one transaction, and a swap is one short one. When
to add here: another reason to stage or to refuse a swap, as one more guard of `SwapGuards`. Keep out: what people hang
on a table (`postgres/relations`) and how two tables compare (`samples`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import sqlalchemy as sa

from songvec_assets.errors import DamagedShardError, StoreError, TableMismatchError
from songvec_assets.postgres import relations
from songvec_assets.postgres.brief import run_briefly
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import hold_lock
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors import load
from songvec_assets.vectors.index.preflight import check_target
from songvec_assets.vectors.index.upkeep import IndexReport, IndexSettings, bring_index_up_to_date
from songvec_assets.vectors.ledger import LedgerEntry
from songvec_assets.vectors.load import LoadPlan, LoadSource, RangeLoad
from songvec_assets.vectors.samples import Comparison, compare_tables
from songvec_assets.vectors.table import PREVIOUS, SERVING, STAGING, TableSpec, VectorTable

LOCK = "publish"
"""Held by whoever loads, stages, swaps or drops: one at a time."""

STAGED_SHARE = 0.2
"""Rows changed beyond this share want a new index anyway: a new table is loaded five times as fast without one."""
STAGED_FROM_ROWS = 20_000
"""Fewer rows go in under the index in seconds."""


@dataclass(frozen=True)
class WantedTable:
    """What searches are to find.

    Attributes:
        spec: what the table is to hold.
        index: how a staging table is indexed.
        may_swap: whether another model, size or type may replace what serves now.
        staged_from_rows: changed rows from which an indexed table is not changed but replaced.
    """

    spec: TableSpec
    index: IndexSettings = field(default_factory=IndexSettings)
    may_swap: bool = False
    staged_from_rows: int = STAGED_FROM_ROWS


@dataclass(frozen=True)
class Target:
    """Where the rows go.

    Attributes:
        table: the serving table, or the staging table.
        reason: why there.
        keep: whether what serves now is kept as the previous table.
    """

    table: VectorTable
    reason: str
    keep: bool = False


@dataclass(frozen=True)
class PublishReport:
    """What was decided and done.

    Attributes:
        target: where the rows went, and why.
        loads: a row a range.
        index: of the table that was swapped in; None where none was.
        comparison: of the two tables; None where none was swapped in.
        n_unmanaged: rows of the serving table that somebody else put where nothing was ever loaded.
    """

    target: Target
    loads: list[RangeLoad]
    index: IndexReport | None = None
    comparison: Comparison | None = None
    n_unmanaged: int = 0


def check_publishable(database: Database, wanted: WantedTable) -> VectorTable:
    """Refuse, before anything is paid for, what could not be loaded afterwards; see also `index/preflight`.

    Returns:
        The table that the rows are to go to: the serving one, or the staging table for a swap.

    Raises:
        TableMismatchError: the serving table holds something else and may not be swapped, or something is in the way.
    """
    if _holds(database, wanted):
        return VectorTable(database)
    _check_swappable(database, wanted.spec)
    return VectorTable(database, STAGING)


def publish_embeddings(
    database: Database, source: LoadSource, wanted: WantedTable, run: RunContext = SILENT
) -> PublishReport:
    """Make the serving table equal the cache.

    Args:
        database: where the table is.
        source: the cache and the snapshots.
        wanted: what the table is to hold.
        run: notified of each step; a stop ends it, and the next call goes on from there.

    Raises:
        StoreError: the cache is empty.
        DamagedShardError: see `upload_cached_embeddings_to_database`; what serves stays as it is.
        TableMismatchError: see `check_publishable` and `SwapGuards`.
    """
    serving, staging = VectorTable(database), VectorTable(database, STAGING)
    with _holding_lock(database, run) as check_held:
        plan = load.plan_load(serving, source, run)
        target = _choose_target(database, wanted, plan, check_held)
        guards = SwapGuards(database, source, run, check_held)
        is_staged = target.table == staging
        if is_staged:
            guards.check_before_build()
            plan = load.plan_load(staging, source, run)
        if is_staged or plan.changed:
            check_target(target.table, wanted.spec, wanted.index, plan.n_rows)
        n_connections = 1 if serving.index else load.N_CONNECTIONS
        loads = load.upload_cached_embeddings_to_database(
            target.table, source, wanted.spec, run, plan=plan, n_connections=n_connections
        )
        if not is_staged:
            return PublishReport(target, loads, n_unmanaged=plan.n_unmanaged)
        report = bring_index_up_to_date(staging, source.cache, wanted.spec, wanted.index, run, check_held)
        guards.check()
        comparison = compare_tables(database)
        put_in_place(database, target.keep, guards, run)
        return PublishReport(target, loads, report, comparison)


@contextlib.contextmanager
def _holding_lock(database: Database, run: RunContext) -> Iterator[Callable[[], None]]:
    def report_waiting() -> None:
        run.report(Progress("load rows", 0, 0, unit="rows", note="waiting for another load or swap to end"))

    with hold_lock(database, LOCK, on_wait=report_waiting, check=run.check_stop) as check_held:
        yield check_held


def _choose_target(database: Database, wanted: WantedTable, plan: LoadPlan, check_held: Callable[[], None]) -> Target:
    serving, staging, spec = VectorTable(database), VectorTable(database, STAGING), wanted.spec
    if not _holds(database, wanted):
        served = _check_swappable(database, spec)
        return Target(staging, f"{served or 'the old table'} serves until {spec} is complete and indexed", keep=True)
    changes = f"{plan.n_changed:,} of {plan.n_rows:,} rows changed"
    if serving.index is None:
        return Target(serving, f"{changes}, and there is no index yet that they would slow down")
    with database.get_connection() as connection:
        staged, attachments = staging.read_spec(connection), find_attachments(connection, serving)
    if plan.n_changed <= max(wanted.staged_from_rows, STAGED_SHARE * plan.n_rows):
        if staged == spec:  # left by a load that was killed
            check_held()
            with database.get_connection() as connection:
                staging.drop(connection)
        return Target(serving, f"{changes}: few enough to go in under the index")
    if plan.n_unmanaged:
        attachments.append(f"{plan.n_unmanaged:,} rows that somebody else put there")
    if attachments:
        return Target(serving, f"{changes}, but {', '.join(attachments)} would stay with the old table")
    if staged not in (None, spec):
        return Target(serving, f"{changes}, but the staging table holds {staged}: `songvec swap` finishes or drops it")
    return Target(staging, f"{changes}: loaded into a staging table and swapped in, faster than under the index")


def _holds(database: Database, wanted: WantedTable) -> bool:
    """Whether the serving table is for the spec; raises where it is not, and no other may replace it."""
    serving = VectorTable(database)
    if wanted.may_swap and serving.spec not in (None, wanted.spec):
        return False  # even where it would be replaced without
    try:
        serving.check(wanted.spec)
    except TableMismatchError:
        if not wanted.may_swap:
            raise
        return False
    return True


def _check_swappable(database: Database, spec: TableSpec) -> TableSpec | None:
    """What serves now; raises where another table cannot replace it."""
    serving, staging, previous = (VectorTable(database, name) for name in (SERVING, STAGING, PREVIOUS))
    with database.get_connection() as connection:
        staged = staging.read_spec(connection)
        if previous.exists(connection):
            raise TableMismatchError(
                f"table {PREVIOUS} still holds {previous.read_spec(connection)} from an earlier swap: `songvec swap "
                "--rollback` lets it serve again, `songvec swap --drop-old` drops it; then swap"
            )
        if staging.exists(connection) and staged != spec:
            raise TableMismatchError(
                f"table {STAGING} holds {staged}, which never served, expected {spec} or none: finish it with its "
                "settings, or drop it with `songvec swap --drop-old`; then swap"
            )
        check_attachments(connection, serving)
        return serving.read_spec(connection)


def find_attachments(connection: sa.Connection, serving: VectorTable) -> list[str]:
    """What people added to the serving table that would stay with it when another one takes its name."""
    indexes = serving.index_name, serving.building_index, serving.replaced_index
    return relations.find_attachments(connection, serving.name, indexes)


def check_attachments(connection: sa.Connection, serving: VectorTable) -> None:
    """Refuse to give the serving table's name to another while people's additions would stay behind.

    Raises:
        TableMismatchError: names them.
    """
    if attachments := find_attachments(connection, serving):
        raise TableMismatchError(
            f"{', '.join(attachments)} of table {SERVING} would stay with the old table: drop them, start the same "
            "command again, which goes on from here, and create them again afterwards"
        )


class SwapGuards:
    """What must hold for a staging table to replace the serving one: one list, asked at each stage.

    It is asked before the build, of the cache; again once the staging table is complete; and again in the swap's own
    transaction, since people and other runs go on working during a build of hours.

    No guard lets songs get lost that the serving table has and the other one lacks. Songs are compared by their ids,
    whatever ranges they were divided into: since they were loaded the stop may have been raised. Not missing is a song
    that was deleted from the source or rejected by the export, so that it is not in the snapshots, or that was
    rejected by the provider. Where a range has no snapshot, nothing is known of its songs.

    Args:
        database: where the tables are.
        source: what the staging table is loaded from.
        run: ends a comparison between two ranges.
        check_held: raises where LOCK was lost.
    """

    def __init__(self, database: Database, source: LoadSource, run: RunContext, check_held: Callable[[], None]) -> None:
        self._database, self._source, self._run, self.check_held = database, source, run, check_held
        self._serving, self._staging = VectorTable(database), VectorTable(database, STAGING)
        self._compared: list[dict[SongIdRange, LedgerEntry]] | None = None

    def check_before_build(self) -> None:
        """Ask of the cache, before anything is built. A damaged range counts as whole: its load says what is wrong.

        Raises:
            TableMismatchError, DatabaseError: see `check`.
        """
        self.check(None, lambda _: self._compare("the cache", self._source.ranges(), self._read_loadable))

    def check(
        self,
        connection: sa.Connection | None = None,
        check_missing: Callable[[sa.Connection | None], None] | None = None,
    ) -> None:
        """Ask all guards.

        Args:
            connection: in whose transaction; None: in short ones, since comparing takes a while, and a pooler may have
                no session to spare.
            check_missing: whether songs would get lost; None: asked of the staging table.

        Raises:
            TableMismatchError: a guard does not hold.
            DatabaseError: LOCK was lost.
        """
        with contextlib.nullcontext(connection) if connection else self._database.get_connection() as connected:
            check_attachments(connected, self._serving)
        (check_missing or self._check_staging)(connection)
        self.check_held()

    def _check_staging(self, connection: sa.Connection | None) -> None:
        ledgers = [self._serving.ledger.read(connection), self._staging.ledger.read(connection)]
        if self._compared is None:
            self._compare(STAGING, ledgers[1], lambda each: set(self._staging.ledger.read_song_ids(each)))
            self._compared = ledgers
        elif ledgers != self._compared:
            # the song_ids of millions are not compared while searches wait: what was compared must be what is there
            raise TableMismatchError(
                f"{SERVING} or {STAGING} was loaded by another run meanwhile: {SERVING} was not replaced. Start the "
                "same command again, which goes on from here"
            )

    def _compare(self, name: str, given: Iterable[SongIdRange], read: Callable[[SongIdRange], set[int] | None]) -> None:
        missing: list[int] = []
        cached, exported = self._source.cache.ranges(), self._source.snapshots.ranges()
        for song_range in sorted(self._serving.ledger.read()):
            self._run.check_stop()
            songs = set(self._serving.ledger.read_song_ids(song_range))
            for each in _overlapping(song_range, given):
                there = read(each)
                songs = {song_id for song_id in songs if song_id not in each} if there is None else songs - there
            if not songs:
                continue
            for each in _overlapping(song_range, cached):
                songs -= {rejection.song_id for rejection in self._source.cache.read_manifest(each).rejected}
            known = _overlapping(song_range, exported)
            kept = set[int]().union(*map(self._read_exported, known))
            missing += [song_id for song_id in songs if song_id in kept or not any(song_id in each for each in known)]
        if missing:
            missing.sort()
            keys = [each.key for each in sorted({self._source.tiling.range_of(song_id) for song_id in missing})]
            raise TableMismatchError(
                f"{name} lacks {len(missing):,} songs that {SERVING} has and that were not deleted from the source "
                f"(song_id {', '.join(map(str, missing[:5]))}, …; range {', '.join(keys[:5])}, …): {SERVING} was not "
                f"replaced. Export and fill these ranges for {self._source.cache.model}, then start the same command "
                "again; `songvec swap` does all of it, and names the ranges that fail"
            )

    def _read_loadable(self, song_range: SongIdRange) -> set[int] | None:
        try:
            cached = self._source.cache.open(song_range)
            self._source.check_whole(cached)
        except (StoreError, DamagedShardError):
            return None
        return set(cached.rows["song_id"])

    def _read_exported(self, song_range: SongIdRange) -> set[int]:
        return set(self._source.snapshots.read_embeddable(song_range))


def _overlapping(song_range: SongIdRange, ranges: Iterable[SongIdRange]) -> list[SongIdRange]:
    return [each for each in ranges if each.start < song_range.stop and song_range.start < each.stop]


def put_in_place(database: Database, keep: bool, guards: SwapGuards, run: RunContext) -> None:
    """Let the staging table replace the serving one, with its rights, settings, indexes and records.

    Args:
        database: where they are.
        keep: whether what served is kept as the previous table, or dropped.
        guards: asked while nobody else can change either table.
        run: ends the wait while another session holds a lock on a table.

    Raises:
        DatabaseError: another session held its lock for ten minutes; the old table still serves.
        TableMismatchError: a guard does not hold; both tables are as they were.
    """
    serving, staging = VectorTable(database), VectorTable(database, STAGING)

    def swap(connection: sa.Connection) -> None:
        connection.execute(sa.text(f"LOCK TABLE {SERVING}, {STAGING} IN ACCESS EXCLUSIVE MODE"))
        guards.check(connection)
        with relations.copying_properties(connection, SERVING, STAGING):
            if keep:
                serving.rename_to(connection, PREVIOUS)
            else:
                serving.drop(connection)
            staging.rename_to(connection, SERVING)
        guards.check_held()

    run_briefly(database, swap, run.check_stop)


def roll_back(database: Database, run: RunContext = SILENT) -> TableSpec | None:
    """Let what served before the last swap serve again; what serves now stays as the staging table.

    Args:
        database: where they are.
        run: notified where another load or swap is waited for; ends the wait.

    Returns:
        What serves now; None where that was recorded by another version, and cannot be read.

    Raises:
        TableMismatchError: there is no previous table, one is being staged, or see `check_attachments`.
    """
    serving, staging, previous = (VectorTable(database, name) for name in (SERVING, STAGING, PREVIOUS))

    def swap(connection: sa.Connection) -> None:
        if not previous.exists(connection):
            raise TableMismatchError(
                f"there is no table {PREVIOUS} to go back to: it was dropped, or nothing was swapped"
            )
        if staging.exists(connection):
            raise TableMismatchError(
                f"table {STAGING} is in the way: {staging.read_spec(connection)} is being built there. Finish that "
                f"with `songvec swap`, or let its owner run DROP TABLE {STAGING}; then roll back"
            )
        connection.execute(sa.text(f"LOCK TABLE {SERVING}, {PREVIOUS} IN ACCESS EXCLUSIVE MODE"))
        check_attachments(connection, serving)
        with relations.copying_properties(connection, SERVING, PREVIOUS):
            serving.rename_to(connection, STAGING)
            previous.rename_to(connection, SERVING)
        check_held()

    with _holding_lock(database, run) as check_held:
        run_briefly(database, swap, run.check_stop)
    return serving.spec


def drop_others(database: Database, run: RunContext = SILENT) -> list[str]:
    """Drop the previous table and the staging table.

    Args:
        database: where they are.
        run: notified where another load or swap is waited for; ends the wait.

    Returns:
        The names of the tables that were there.
    """
    others = [VectorTable(database, name) for name in (STAGING, PREVIOUS)]
    dropped: list[str] = []

    def drop(connection: sa.Connection) -> None:
        dropped[:] = [table.name for table in others if table.exists(connection)]
        for table in others:
            table.drop(connection)
        check_held()

    with _holding_lock(database, run) as check_held:
        run_briefly(database, drop, run.check_stop)
    return dropped
