"""Faults of the database during a load, a build and a swap: is each reported clearly, and does a rerun repair it?

    python -m benchmarks.chaos_db                 all faults, at several moments; five minutes; exit code 1 on a FAIL
    python -m benchmarks.chaos_db --only killed --rounds 2 --seed 7 --markdown

A real Postgres server over TCP, with a password; a role that is not a superuser; a new database per fault. The fault
is caused at a moment that the server's own views show; then the same command is started again, and table, ledger,
index and catalogue are compared with the cache. The seed draws the moments; timing is the machine's own.
A kill leaves the kernel's page cache intact: a loss of power is not measured here.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres import engine, short_lock
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.search.nearest import search_songs
from songvec_assets.search.queries import embed_queries
from songvec_assets.search.query import Query
from songvec_assets.settings import Settings
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.index import recall_searches
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.neighbors import LoadedRows, sample_queries
from songvec_assets.vectors.index.upkeep import IndexReport, bring_index_up_to_date
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.swap import LoadReport, WantedTable, bring_table_up_to_date
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.proxy import Direction, Proxy
from songvec_assets_tests.servers import (
    NotPermittedError,
    Server,
    SmallDisk,
    running_server,
    running_standby,
    small_disk,
)
from songvec_assets_tests.vectors.world import (
    CLEAR,
    MEANT,
    RERUN,
    TABLE,
    Attempt,
    MissedError,
    Report,
    Round,
    World,
    new_world,
    watched_tracebacks,
)

SONGS, DIMENSIONS = 2_400, 2_000
PHASES = ("performing k-means", "assigning tuples", "loading tuples")
LONG_BUILD_LISTS = 300
"""Enough that a build lasts long enough to be caught in any phase."""
TIMEOUT_S = 0.5
TRIES = 3
"""How often a fault is tried that misses its moment."""
ROOM = 1 << 30
AGAIN = r"start the same command again|is it running"
READ_LOCK = "LOCK TABLE song_embeddings IN ACCESS SHARE MODE"
WRITE_LOCK = "LOCK TABLE song_embeddings IN ACCESS EXCLUSIVE MODE"

Step = Callable[[World, Database | None], Any]
Fault = Callable[[World, Random], None]


def load(world: World, database: Database | None = None) -> LoadReport:
    """Make what searches find equal the cache, as a pipeline does: under the index, or through a staging table."""
    ensure_schema(database or world.database)
    source = LoadSource(world.cache, world.tiling, Snapshots(LocalStorage(world.folder / "songs")))
    wanted = WantedTable(world.spec, IndexSettings(world.lists), world.may_swap, world.staged_from_rows)
    return bring_table_up_to_date(database or world.database, source, wanted)


def build_index(world: World, database: Database | None = None) -> IndexReport:
    """Build the index if that is worth it."""
    table = VectorTable(database or world.database)
    return bring_index_up_to_date(table, world.cache, world.spec, IndexSettings(world.lists))


def attempt(world: World, step: Step, database: Database | None = None) -> Attempt:
    """A step in its own thread."""
    return Attempt(lambda: step(world, database))


def error_of(world: World, step: Step, database: Database | None = None) -> Exception | None:
    """What a step ends with."""
    return attempt(world, step, database).wait()


# What is to be loaded, built or swapped


def prepare_load(world: World, draw: Random) -> None:
    """A first load; or one of changed rows, into the table or a staging table."""
    kind = draw.choice(["first load", "a third changed", "all changed", "staged"])
    if kind != "first load":
        world.run()
        world.change(1, 0.3 if kind == "a third changed" else 1.0)
        world.staged_from_rows = 1 if kind == "staged" else 20_000
    world.moment = kind


def prepare_swap(world: World, other_model: bool = False) -> None:
    """All rows changed, or another model: a staging table is built and replaces the serving one."""
    world.run()
    world.staged_from_rows = 1
    if other_model:
        world.use_model(TableSpec("model-b", world.spec.dimensions // 2))
    else:
        world.change(1)
    world.moment = "another model" if other_model else "all changed"


# Moments: each function returns once the server shows it, or raises MissedError


def wait_in_copy(world: World, running: Attempt, proxy: Proxy) -> None:
    """Until what clients send is held in the middle of a COPY."""
    while running.running:
        if proxy.holding:
            time.sleep(0.05)  # what passed arrives
            rows = world.admin("SELECT bytes_processed FROM pg_stat_progress_copy WHERE datname = current_database()")
            if rows:
                world.note(f"{sum(n_bytes for (n_bytes,) in rows) >> 10} KiB into COPY")
                return
            proxy.hold_after(50_000)
            proxy.release()
        time.sleep(0.005)
    raise MissedError(f"the load ended before: {running.wait()!r}")


def wait_in_build(world: World, running: Attempt, phase: str) -> None:
    """Until an index build is in a phase."""
    statement = "SELECT phase FROM pg_stat_progress_create_index WHERE datname = current_database() AND phase LIKE %s"
    world.wait_for(running, statement, (f"%{phase}%",))
    world.note(f"{phase}")


def wait_for_lock(world: World, running: Attempt, query: str = "") -> None:
    """Until a statement of the package's (that has `query` in it) waits for a lock."""
    [mode] = world.wait_for(
        running,
        "SELECT mode FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND locktype <> 'advisory' "
        "AND datname = current_database() AND application_name LIKE 'songvec%%' AND query LIKE %s",
        (f"%{query}%",),
    )
    world.note(f"waiting for {mode}")


# The server is killed


def kill_in_copy(world: World, draw: Random) -> None:
    """While rows are sent."""
    prepare_load(world, draw)
    with world.proxied() as (proxy, database):
        proxy.hold_after(int(world.n_bytes * draw.uniform(0.05, 0.95)))
        running = attempt(world, load, database)
        wait_in_copy(world, running, proxy)
        kill_and_restart(world, running, draw)
    world.finish()


def kill_in_build(world: World, draw: Random) -> None:
    """Of the index of the serving or of the staging table."""
    if draw.random() < 0.5:
        prepare_swap(world)
        step: Step = load
    else:
        load(world)
        step = build_index
        world.moment = "serving table"
    world.lists = LONG_BUILD_LISTS
    running = attempt(world, step)
    wait_in_build(world, running, draw.choice(PHASES))
    kill_and_restart(world, running, draw)
    world.finish()


def kill_in_swap(world: World, draw: Random) -> None:
    """Of tables, or of indexes."""
    step, query = prepare_some_swap(world, draw)
    with world.session(READ_LOCK):
        running = attempt(world, step)
        wait_for_lock(world, running, query)
        kill_and_restart(world, running, draw)
    world.expect_one_state()
    world.finish()


def prepare_some_swap(world: World, draw: Random) -> tuple[Step, str]:
    """One of the three kinds; returns what swaps, and its statement that waits for readers."""
    kind = draw.choice(["table", "model", "index"])
    if kind == "index":
        world.run()
        world.lists, world.moment = 12, "other lists"
        return build_index, "DROP INDEX"
    prepare_swap(world, other_model=kind == "model")
    return load, "LOCK TABLE"


def kill_and_restart(world: World, running: Attempt, draw: Random) -> None:
    """kill -9 of the postmaster, or of all its processes; a call meanwhile; the server back; what is in the table."""
    everything = draw.random() < 0.3
    world.note("all processes" if everything else "the postmaster")
    world.server.kill(everything)
    world.expect_clear(error_of(world, load), "is it running")
    world.expect_clear(running.wait(), AGAIN)
    world.server.start()
    world.expect_whole()
    world.expect_settled()


# The disk is full


def disk_full_in_copy(world: World, draw: Random) -> None:
    """On a first load, or on the way to a swap."""
    with on_small_disk(world, ROOM) as disk:
        if staged := draw.random() < 0.5:
            prepare_swap(world)
        n_bytes = int(world.n_table_bytes * draw.uniform(0.2, 0.9))
        disk.resize(disk.n_used() + n_bytes)
        world.moment = f"{n_bytes >> 20} MiB for {world.n_table_bytes >> 20}, {'staged' if staged else 'first load'}"
        world.expect_clear(error_of(world, load), "disk is full: free space")
        world.expect_whole()
        world.expect_settled()
        disk.resize(ROOM)
        world.finish()


def disk_full_in_build(world: World, draw: Random) -> None:
    """Of the index, or of the temporary files that it is sorted in."""
    with on_small_disk(world, ROOM) as disk:
        load(world)
        n_bytes = int(world.n_table_bytes * draw.uniform(0.1, 0.8))
        disk.resize(disk.n_used() + n_bytes)
        world.moment = f"{n_bytes >> 20} MiB for {world.n_table_bytes >> 20}"
        world.expect_clear(error_of(world, build_index), "disk is full: free space")
        world.expect_whole()
        world.expect_settled()
        world.expect_no_index()
        disk.resize(ROOM)
        world.finish()


@contextlib.contextmanager
def on_small_disk(world: World, n_bytes: int) -> Iterator[SmallDisk]:
    """What the world's database makes, and its temporary files, go to a disk of this size in bytes."""
    with small_disk(world.server, n_bytes) as disk:
        world.admin(f"GRANT CREATE ON TABLESPACE {disk.tablespace} TO {world.name}")
        for setting in ("default_tablespace", "temp_tablespaces"):
            world.admin(f"ALTER DATABASE {world.name} SET {setting} = {disk.tablespace}")
        try:
            yield disk
        finally:
            world.drop()


# The connection breaks


def drop_in_copy(world: World, draw: Random) -> None:
    """While rows are sent."""
    prepare_load(world, draw)
    with world.proxied() as (proxy, database):
        proxy.hold_after(int(world.n_bytes * draw.uniform(0.05, 0.95)))
        running = attempt(world, load, database)
        wait_in_copy(world, running, proxy)
        proxy.drop()
        proxy.release()
        world.expect_clear(running.wait(), AGAIN)
    world.expect_whole()
    world.expect_settled()
    world.finish()


def drop_in_build(world: World, draw: Random) -> None:
    """While the server builds on, for nobody."""
    load(world)
    world.lists = LONG_BUILD_LISTS
    with world.proxied() as (proxy, database):
        running = attempt(world, build_index, database)
        wait_in_build(world, running, draw.choice(PHASES))
        proxy.drop()
        world.expect_clear(running.wait(), AGAIN)
    world.finish()


def drop_in_swap(world: World, draw: Random) -> None:
    """While it waits for a reader to end."""
    step, query = prepare_some_swap(world, draw)
    with world.session(READ_LOCK), world.proxied() as (proxy, database):
        running = attempt(world, step, database)
        wait_for_lock(world, running, query)
        proxy.drop()
        world.expect_clear(running.wait(), AGAIN)
    world.expect_settled()
    world.expect_one_state()
    world.finish()


def drop_anywhere(world: World, draw: Random) -> None:
    """All connections at a byte that clients sent or the server answered, once."""
    prepare_load(world, draw)
    step = draw.choice([load, load, build_index])
    if step is build_index:
        load(world)
    direction: Direction = draw.choice(["sent", "answered"])
    n_bytes = int(10 ** draw.uniform(1.0, 4.3))
    world.note(f"{step.__name__}, {n_bytes:,} bytes {direction}")
    with world.proxied() as (proxy, database):
        proxy.drop_after(n_bytes, direction)
        if error := error_of(world, step, database):
            world.expect_clear(error, AGAIN)
        if not proxy.n_dropped:
            world.note("which it does not come to")
    world.expect_whole()
    world.finish()


# Other sessions


def lock_released(world: World, _: Random) -> None:
    """Load, build and swap wait for it, then complete."""
    world.run()
    world.change(1)
    expect_completed(world, load, WRITE_LOCK)
    expect_completed(world, build_index, WRITE_LOCK)
    world.change(2)
    world.staged_from_rows = 1
    expect_completed(world, load, READ_LOCK, "LOCK TABLE")
    world.finish()


def lock_kept(world: World, _: Random) -> None:
    """Load, build and swap give up; the timeouts of 60 s and ten minutes are made short here."""
    world.run()
    world.change(1)
    short = engine._BEGIN_LONG.replace("'60s'", "'300ms'")
    hurried = SimpleNamespace(monotonic=lambda: 1000 * time.monotonic(), sleep=time.sleep)
    with (
        mock.patch.object(engine, "_BEGIN_LONG", short),
        mock.patch.object(short_lock, "time", hurried),
        world.proxied() as (_, database),
    ):
        steps: list[tuple[Step, str, int]] = [(load, WRITE_LOCK, 20_000), (load, READ_LOCK, 1)]
        for step, statement, staged_from_rows in [*steps, (build_index, WRITE_LOCK, 1)]:
            world.staged_from_rows = staged_from_rows
            with world.session(statement):
                world.moment = f"{step.__name__}, {statement.partition(' IN ')[2]}"
                world.expect_clear(error_of(world, step, database), "another session holds a lock.*wait for it")
            world.expect_settled()
            world.expect_one_state()
    world.finish()


def expect_completed(world: World, step: Step, statement: str, query: str = "", held_s: float = 0.0) -> None:
    """A step waits for another session's lock, and completes when that is released."""
    world.moment = step.__name__
    with world.session(statement) as session:
        running = attempt(world, step)
        wait_for_lock(world, running, query)
        time.sleep(held_s)
        session.rollback()
        error = running.wait()
        world.expect(RERUN, error is None, f"it did not complete: {error}")


def unmanaged_row(statement: str) -> Fault:
    """Another program writes to the loaded table; {mine} is one of our song_ids, {free} one of nobody's."""

    def fault(world: World, draw: Random) -> None:
        world.run()
        mine = draw.choice(world.song_ids)
        values = {"mine": mine, "free": mine - mine % 10 + 9, "above": world.tiling.stop + 7, "vector": zeros(world)}
        world.moment = statement.format(**values)
        world.admin(world.moment)
        if "{mine}" not in statement and "{free}" not in statement:
            n_unmanaged = load(world).n_unmanaged
            world.expect(CLEAR, n_unmanaged == 1, f"{n_unmanaged} unmanaged rows were reported, not 1")
            world.admin(f"DELETE FROM song_embeddings WHERE song_id < 0 OR song_id > {world.tiling.stop}")
        world.finish()

    return fault


def unmanaged_row_in_the_way(world: World, draw: Random) -> None:
    """Its transaction is open when our COPY comes to its song_id, then committed."""
    world.run()
    world.change(1)
    world.admin("DELETE FROM song_embeddings")
    mine = draw.choice(world.song_ids)
    with world.session(f"INSERT INTO song_embeddings VALUES ({mine}, {zeros(world)})") as session:
        running = attempt(world, load)
        wait_for_lock(world, running, "COPY")
        session.commit()
        if error := running.wait():
            world.expect_clear(error, "again")
    world.expect_settled()
    world.finish()


def zeros(world: World) -> str:
    """A vector of zeros, as SQL."""
    return f"array_fill(0, ARRAY[{world.spec.dimensions}])::vector"


UNMANAGED_ROWS = {
    "an unmanaged row among ours": "INSERT INTO song_embeddings VALUES ({free}, {vector})",
    "an unmanaged row where no range is cached": "INSERT INTO song_embeddings VALUES ({above}, {vector})",
    "an unmanaged row with a negative song_id": "INSERT INTO song_embeddings VALUES (-7, {vector})",
    "an unmanaged row in place of one of ours": "UPDATE song_embeddings SET song_id = {free} WHERE song_id = {mine}",
}


# What the database is like


def other_size(world: World, _: Random) -> None:
    """A table of ours that somebody made, with half the size."""
    world.moment = f"vector({world.spec.dimensions // 2})"
    columns = f"song_id integer PRIMARY KEY, embedding {world.moment} NOT NULL, created_at timestamp DEFAULT now()"
    world.admin(f"CREATE TABLE song_embeddings ({columns})")
    world.admin(f"ALTER TABLE song_embeddings OWNER TO {world.name}")
    world.may_swap = False
    world.expect_clear(error_of(world, load), f"expected .*{world.spec.dimensions}.*SONGVEC_EMBEDDING_DIMENSIONS")
    world.expect_settled()
    world.admin("DROP TABLE song_embeddings")
    world.finish()


def no_create(world: World, _: Random) -> None:
    """First none on the database, then none on the schema."""
    world.admin(f"ALTER DATABASE {world.name} OWNER TO postgres")
    for what in (f"DATABASE {world.name}", "SCHEMA public"):
        world.moment = what.split()[0]
        world.expect_clear(error_of(world, load), "let .*(GRANT|grant)")
        world.expect_settled()
        world.admin(f"GRANT CREATE ON {what} TO {world.name}")
    world.finish()


def read_only_standby(world: World, _: Random) -> None:
    """Load, build and swap there; then on the primary."""
    with running_standby(world.server) as standby:
        there = world.reach(standby.port)
        world.moment = "first load"
        world.expect_clear(error_of(world, load, there), "put the primary's address into POSTGRES_URL")
        world.run()
        world.change(1, 0.3)
        [(position,)] = world.admin("SELECT pg_current_wal_lsn()")
        replayed = "SELECT pg_last_wal_replay_lsn() >= %s"
        wait_until(lambda: execute(standby.url(), replayed, (position,)) == [(True,)])
        world.lists = 12
        for step, staged_from_rows in ((load, 20_000), (load, 1), (build_index, 1)):
            world.staged_from_rows = staged_from_rows
            world.moment = f"{step.__name__} of what is there"
            world.expect_clear(error_of(world, step, there), "put the primary's address into POSTGRES_URL")
    world.finish()


def statement_timeout(world: World, draw: Random) -> None:
    """Load, build and swap take longer than it."""
    world.admin(f"ALTER ROLE {world.name} SET statement_timeout = '{TIMEOUT_S * 1000:.0f}ms'")
    held_s = 1.3 * TIMEOUT_S
    prepare_load(world, draw)
    with world.proxied() as (proxy, database):
        proxy.hold_after(int(world.n_bytes * draw.uniform(0.05, 0.95)))
        running = attempt(world, load, database)
        wait_in_copy(world, running, proxy)
        time.sleep(held_s)
        proxy.release()
        error = running.wait()
        world.expect(RERUN, error is None, f"it did not complete: {error}")
    world.lists = 12
    expect_completed(world, build_index, "LOCK TABLE song_embeddings IN ROW EXCLUSIVE MODE", held_s=held_s)
    world.change(2)
    world.staged_from_rows = 1
    expect_completed(world, load, READ_LOCK, "LOCK TABLE", held_s)
    world.finish()


def names(world: World, _: Random) -> None:
    """From the songs table to a search."""
    schema, table = 'My "Schema"', 'The "Songs"'
    columns = {"song_id": "Song ID", "name": 'Na"me', "artist": "ARTIST", "lyrics": "Lyrics; -- 'x' %s :y"}
    world.schema, relation = _quote(schema), f"{_quote(schema)}.{_quote(table)}"
    world.extra = {f"table {relation}", f"index {world.schema}.{_quote(f'{table}_pkey')}"}
    song_id, name, artist, lyrics = quoted = [_quote(column) for column in columns.values()]
    for statement in (
        f"CREATE SCHEMA {world.schema} AUTHORIZATION {world.name}",
        f"ALTER DATABASE {world.name} SET search_path = {world.schema}, public",
        f"CREATE TABLE {relation} ({song_id} integer PRIMARY KEY, {name} text, {artist} text, {lyrics} text)",
        f"INSERT INTO {relation} SELECT n, 'Song ' || n, 'Ann', repeat('storm ', n % 7) FROM generate_series(1, 300) n",
        f"GRANT SELECT ON {relation} TO {world.name}",
    ):
        world.admin(statement)
    settings = {f"{kind}_column": column for kind, column in columns.items()} | {
        "postgres_url": world.database.url,
        "storage": str(world.folder / "store"),
        "songs_table": f"{schema}.{table}",
        "embedding_model": "offline-v1",
        "embedding_dimensions": world.spec.dimensions,
        "range_size": world.tiling.width,
        "song_id_stop": world.tiling.stop,
    }
    pipeline = Pipeline(Settings(**settings))
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, world.tiling)
    pipeline.filler().fill_ranges(list(world.tiling), lambda _: None)
    world.cache, world.spec = pipeline.cache, pipeline.table_spec
    world.moment = f"{relation} ({', '.join(quoted)})"
    world.finish()
    [query] = embed_queries(pipeline.embedder(), ["Song 7 by Ann"], None)
    hits = search_songs(world.database, pipeline.source, Query(query, limit=3, model=world.spec.model))
    world.expect(TABLE, len(hits) == 3 and hits[0].artist == "Ann", f"a search finds {hits}")


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


FAULTS: dict[str, tuple[Fault, int]] = {
    "server killed during COPY": (kill_in_copy, 8),
    "server killed during an index build": (kill_in_build, 8),
    "server killed during a swap": (kill_in_swap, 8),
    "disk full during COPY": (disk_full_in_copy, 4),
    "disk full during an index build": (disk_full_in_build, 4),
    "connection dropped during COPY": (drop_in_copy, 4),
    "connection dropped during an index build": (drop_in_build, 3),
    "connection dropped during a swap": (drop_in_swap, 4),
    "connection dropped at any byte": (drop_anywhere, 20),
    "lock of another session, released": (lock_released, 1),
    "lock of another session, kept": (lock_kept, 1),
    **{name: (unmanaged_row(statement), 1) for name, statement in UNMANAGED_ROWS.items()},
    "an unmanaged row committed during COPY": (unmanaged_row_in_the_way, 1),
    "a column of another size": (other_size, 1),
    "a user without CREATE": (no_create, 1),
    "the URL of a read-only standby": (read_only_standby, 1),
    "statement_timeout set on the role": (statement_timeout, 3),
    "names with quotes, capitals and spaces": (names, 1),
}
"""What is done to the database, and at how many moments in the full campaign."""


def run_fault(name: str, server: Server, folder: Path, report: Report, draw: Random, n_songs: int = SONGS) -> Round:
    """Cause one fault in a new world; what is found goes into the report."""
    fault, _ = FAULTS[name]
    began, n_before = time.monotonic(), report.n_failures
    for tried in range(1, TRIES + 1):
        with (
            watched_tracebacks(report),
            new_world(server, folder, report, load, build_index, n_songs, DIMENSIONS) as world,
        ):
            world.fault = name
            try:
                fault(world, draw)
            except NotPermittedError as error:
                report.not_run[name] = str(error)
            except MissedError as error:
                if tried < TRIES:
                    continue
                world.expect(MEANT, False, str(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding, and the campaign goes on
                world.expect(MEANT, False, f"{type(error).__name__}: {error}")
            break
    verdict = "not run" if name in report.not_run else "FAIL" if report.n_failures > n_before else "PASS"
    reported = report.not_run.get(name, world.reported)
    report.rounds.append(Round(name, world.moment, reported, round(time.monotonic() - began, 1), verdict))
    return report.rounds[-1]


def find_usual_relations(server: Server, folder: Path, n_songs: int = SONGS) -> set[str]:
    """What an undisturbed run leaves in a database.

    Raises:
        RuntimeError: even that run left something else.
    """
    with new_world(server, folder, Report(), load, build_index, n_songs, DIMENSIONS) as world:
        world.finish()
        if not world.report.passed:
            raise RuntimeError(f"an undisturbed run is not in order: {world.report.failures}")
        return world.read_relations()


@contextlib.contextmanager
def prepared_server() -> Iterator[tuple[Server, Path]]:
    """A server, and a folder for the worlds' caches."""
    # fsync guards against a loss of power, which no kill is
    settings = {"fsync": "off", "shared_buffers": "32MB", "max_prepared_transactions": 4, "scram_iterations": 1}
    with (
        tempfile.TemporaryDirectory(prefix="songvec-chaos-db-", ignore_cleanup_errors=True) as folder,
        running_server(**settings) as server,
        mock.patch.object(recall_searches, "sample_queries", sample_few_queries),
    ):
        execute(server.url("template1"), "CREATE EXTENSION vector")
        yield server, Path(folder)


def sample_few_queries(rows: LoadedRows) -> Float32Matrix:
    """Ten queries: recall is measured elsewhere, and would take longer than everything else here."""
    return sample_queries(rows)[:10]


def run_campaign(
    faults: list[str], seed: int = 0, rounds: int | None = None, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Cause each fault, at as many moments as FAULTS or `rounds` says.

    Args:
        faults: names.
        seed: of the moments.
        rounds: moments per fault; None: as FAULTS says.
        say: called with each round.
    """
    draw = Random(seed)
    with prepared_server() as (server, folder):
        report = Report(usual=find_usual_relations(server, folder))
        for name in faults:
            for _ in range(rounds or FAULTS[name][1]):
                say(str(run_fault(name, server, folder, report, draw)))
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos_db", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="moments a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--markdown", action="store_true", help="tables for the documentation")
    given = parser.parse_args()
    began = time.monotonic()
    faults = [name for name in FAULTS if given.only in name]
    report = run_campaign(faults, given.seed, given.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    print(report.render(given.markdown))
    print(f"\n{len(report.rounds)} rounds in {(time.monotonic() - began) / 60:.1f} minutes")
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
