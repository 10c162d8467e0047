"""Builds while others use the table, and builds that fail, are cancelled or killed: they cost nobody anything."""

import re
import signal
import time
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import DatabaseError, StoppedError
from songvec_assets.postgres import short_lock
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value
from songvec_assets.progress import Progress, StopSignal
from songvec_assets.vectors.index import build, sizing
from songvec_assets.vectors.index.build import read_progress
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets.vectors.table import STAGING, VectorTable
from songvec_assets_tests.administration import dispose, execute, login_role, wait_until, with_parts
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.vectors.conftest import SPEC
from songvec_assets_tests.vectors.indexes import (
    BUILDING,
    INDEX,
    REPLACED,
    WRITE,
    Builder,
    build_index,
    building_process,
    change,
    definition,
    fill,
    read_identity,
    read_indexes,
    transaction,
)

WHOLE = {INDEX: (True, definition(20))}
BUILDS = f"""
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'active' AND query LIKE 'CREATE INDEX CONCURRENTLY {BUILDING} %'
"""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is looked at ten times a second, and a lock that is held is tried for again as soon."""
    monkeypatch.setattr(build, "_POLL_S", 0.1)
    monkeypatch.setattr(short_lock, "_PAUSE_S", 0.1)


@pytest.fixture
def table(database: Database) -> Database:
    """A database whose table has 400 rows, song_ids 1 to 400."""
    VectorTable(database).ensure(SPEC)
    fill(database, 1, 400)
    return database


@pytest.fixture
def indexed(table: Database, cache: ModelCache) -> Database:
    """The same with an index that is to be built anew, with 30 lists."""
    bring(table, cache)
    fill(table, 401, 900)
    return table


def bring(database: Database, cache: ModelCache) -> IndexReport:
    """Bring the index up to date."""
    return build_index(database, cache, SPEC)


class TestSettings:
    def test_the_memory_that_k_means_needs_is_set_for_the_build(
        self, database: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # so that a table of test size needs more than is set at least
        monkeypatch.setattr(sizing, "MIN_BUILD_MEMORY", 64 << 10)
        monkeypatch.setattr(sizing, "SORT_MEMORY_PER_PROCESS", 1)
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET maintenance_work_mem = '64kB'")
        VectorTable(database).ensure(SPEC)
        fill(database, 1, 10_000)
        assert build_index(database, cache, SPEC, IndexSettings(lists=150)).index.lists == 150

    def test_the_roles_timeouts_do_not_end_it(self, table: Database, cache: ModelCache) -> None:
        with login_role(table.adbc_uri, "SUPERUSER") as role:
            for timeout in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                execute(table.adbc_uri, f"ALTER ROLE {role} SET {timeout} = '400ms'")
            seen = Database(with_parts(table.url, username=role))
            builder = Builder(seen, cache)
            with transaction(table, WRITE):
                builder.start()
                wait_until(lambda: builder.reported or not builder.is_alive())
                builder.join(1.2)  # three times as long
            builder.finish()
            dispose(seen.url)
            assert builder.error is None
            assert read_indexes(table) == WHOLE
            execute(table.adbc_uri, f"REASSIGN OWNED BY {role} TO postgres")


class TestProgress:
    def test_estimate_phase_and_end_are_told(self, table: Database, cache: ModelCache) -> None:
        builder = Builder(table, cache)
        with transaction(table, WRITE):
            builder.start()
            wait_until(lambda: len(builder.reported) >= 2 or not builder.is_alive())
        builder.finish()
        assert builder.error is None
        first, second = builder.reported[:2]
        assert (first.step, first.done, first.total, first.unit) == ("build index", 0, 100, "%")
        assert re.match(r"estimated: 20 lists, \d+ MiB of memory, 0 MiB of disk.*$", first.note)
        assert second.note == "waiting for writers before build"
        assert Progress("build index", 100, 100, unit="%") in builder.reported

    @pytest.mark.parametrize(
        ("phase", "counters", "expected"),
        [
            ("building index: performing k-means", (0, 0, 0, 0), (0, 0, "rows")),
            ("building index: assigning tuples", (10, 100, 0, 0), (10, 100, "blocks")),
            ("building index: loading tuples", (100, 100, 7, 400), (7, 400, "rows")),
            ("index validation: scanning table", (3, 100, 400, 400), (3, 100, "blocks")),
            ("waiting for old snapshots", (100, 100, 400, 400), (0, 0, "rows")),
        ],
    )
    def test_a_phase_is_told_by_the_servers_own_counters(
        self, phase: str, counters: tuple[int, ...], expected: tuple[int, int, str]
    ) -> None:
        names = ("phase", "blocks_done", "blocks_total", "tuples_done", "tuples_total")
        progress = read_progress(SimpleNamespace(**dict(zip(names, (phase, *counters), strict=True))))
        assert (progress.step, progress.note) == ("build index", phase)
        assert (progress.done, progress.total, progress.unit) == expected


class TestUnderWay:
    def test_searches_use_the_old_index_and_rows_are_written_meanwhile(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        builder = Builder(indexed, cache)
        with transaction(indexed, WRITE):
            builder.start()
            builder.wait_for_new_index()
            assert read_indexes(indexed)[INDEX] == (True, definition(20))
            execute(indexed.adbc_uri, "SET lock_timeout = '1s'; INSERT INTO song_embeddings "
                    "SELECT 9999, embedding FROM song_embeddings WHERE song_id = 5")  # fmt: skip
        builder.finish()
        assert builder.error is None
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}

    def test_a_transaction_that_reads_holds_up_neither_the_swap_nor_other_searches(
        self, indexed: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "_DROP_LOCK_TIMEOUT", "100ms")
        monkeypatch.setattr(build, "_REPLACED_PATIENCE_S", 0.3)
        search = "SET enable_seqscan = off; SELECT song_id FROM song_embeddings ORDER BY embedding <=> " \
                 "(SELECT embedding FROM song_embeddings WHERE song_id = 5) LIMIT 1"  # fmt: skip
        with transaction(indexed, f"{search}"):
            assert bring(indexed, cache).built
            assert read_indexes(indexed) == {INDEX: (True, definition(30)),
                                             REPLACED: (False, definition(20, index=REPLACED))}  # fmt: skip
            assert execute(indexed.adbc_uri, f"SET lock_timeout = '1s'; {search}") == [(5,)]
        assert not bring(indexed, cache).built
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}, "the next run dropped it"

    def test_a_lock_on_the_index_is_waited_for_a_moment_at_a_time(self, indexed: Database, cache: ModelCache) -> None:
        builder = Builder(indexed, cache)
        with transaction(indexed, f"ALTER INDEX {INDEX} SET (lists = 20)"):
            builder.start()
            wait_until(lambda: read_indexes(indexed).get(BUILDING, (False,))[0] or not builder.is_alive())
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'ALTER INDEX%'"
            )
            wait_until(lambda: execute(indexed.adbc_uri, waiting) == [(1,)])
            wait_until(lambda: execute(indexed.adbc_uri, waiting) == [(0,)])
        builder.finish()
        assert builder.error is None
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}

    def test_of_two_at_once_the_second_waits_says_so_and_finds_it_done(
        self, table: Database, cache: ModelCache
    ) -> None:
        builders = [Builder(table, cache), Builder(table, cache)]
        with transaction(table, WRITE):
            builders[0].start()
            builders[0].wait_for_new_index()
            builders[1].start()
            wait_until(lambda: builders[1].reported)
        for builder in builders:
            builder.finish()
        assert [builder.error for builder in builders] == [None, None]
        assert [builder.report.built for builder in builders if builder.report] == [True, False]
        assert builders[1].reported[0].note == "waiting for another run that builds or checks it"
        assert read_indexes(table) == WHOLE

    def test_a_table_beside_is_built_in_one_transaction(self, table: Database, cache: ModelCache) -> None:
        VectorTable(table, STAGING).ensure(SPEC)
        fill(table, 1, 400, table=STAGING)
        execute(table.adbc_uri, "CREATE TABLE seen (command text)")
        execute(
            table.adbc_uri,
            "CREATE FUNCTION see() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen "
            "SELECT current_query() WHERE current_query() LIKE 'CREATE INDEX%'; END $$;"
            "CREATE EVENT TRIGGER see ON ddl_command_start EXECUTE FUNCTION see()",
        )
        try:
            for name in ("song_embeddings", STAGING):
                build_index(table, cache, SPEC, table=name)
        finally:
            execute(table.adbc_uri, "DROP EVENT TRIGGER see; DROP FUNCTION see")
        [serving], [beside] = execute(table.adbc_uri, "SELECT left(command, 30) FROM seen")
        assert serving.startswith("CREATE INDEX CONCURRENTLY ")
        assert beside.startswith("CREATE INDEX embeddings_ivf")

    def test_behind_a_pooler_in_transaction_mode_it_is_built_in_one_transaction_and_says_so(
        self, table: Database, cache: ModelCache
    ) -> None:
        bring(table, cache)
        before = read_identity(table)
        fill(table, 401, 900)
        with running_pgbouncer(table.url) as url:
            pooled = Database(url)
            report = bring(pooled, cache)
            dispose(url)
        assert report.built
        assert "loads waited meanwhile: a pooler in transaction mode" in report.reason
        assert read_indexes(table) == {INDEX: (True, definition(30))}
        assert read_identity(table) != before


class TestInterrupted:
    def test_a_cancelled_build_leaves_no_leftover_and_keeps_the_old_index(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        before = read_identity(indexed)
        builder = Builder(indexed, cache)
        with transaction(indexed, WRITE):
            builder.start()
            builder.wait_for_new_index()
            indexed.cancel()
            # a cancellation is on its way for a while: a build that the lock lets go before it would be done
            building = "SELECT pid FROM pg_stat_progress_create_index WHERE datname = current_database()"
            wait_until(lambda: not execute(indexed.adbc_uri, building))
        builder.finish()
        assert isinstance(builder.error, DatabaseError)
        assert "the statement was cancelled" in str(builder.error)
        assert read_indexes(indexed) == WHOLE
        assert read_identity(indexed) == before
        assert bring(indexed, cache).reason.startswith("900 rows want 30 lists, it has 20")

    def test_a_stop_ends_the_servers_work_too(self, indexed: Database, cache: ModelCache) -> None:
        stop = StopSignal()
        builder = Builder(indexed, cache, stop=stop)
        with transaction(indexed, WRITE):
            builder.start()
            builder.wait_for_new_index()
            stop.set()
            wait_until(lambda: not execute(indexed.adbc_uri, BUILDS))
        builder.finish()
        assert isinstance(builder.error, StoppedError)
        assert read_indexes(indexed) == WHOLE

    def test_a_cancelled_build_whose_leftover_is_held_leaves_it_to_the_next(
        self, indexed: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "_DROP_LOCK_TIMEOUT", "100ms")
        builder = Builder(indexed, cache)
        with transaction(indexed, WRITE):
            builder.start()
            builder.wait_for_new_index()
            indexed.cancel()
            builder.finish()
        assert "the statement was cancelled" in str(builder.error)
        assert read_indexes(indexed)[BUILDING][0] is False
        assert bring(indexed, cache).built
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}

    def test_a_build_whose_connection_breaks_keeps_the_old_index_and_can_be_done_again(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        builder = Builder(indexed, cache)
        with transaction(indexed, WRITE):
            builder.start()
            builder.wait_for_new_index()
            [(pid,)] = execute(indexed.adbc_uri, BUILDS)
            assert execute(indexed.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,)) == [(True,)]
        builder.finish()
        assert isinstance(builder.error, DatabaseError)
        assert read_indexes(indexed)[INDEX] == (True, definition(20))
        assert bring(indexed, cache).built
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}

    def test_of_a_killed_process_the_server_ends_the_build_and_the_next_run_does_not_wait_for_it(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        with transaction(indexed, WRITE):
            with building_process(indexed, cache) as process:
                wait_until(lambda: BUILDING in read_indexes(indexed))
                process.send_signal(signal.SIGKILL)
                process.wait()
            orphans = execute(indexed.adbc_uri, BUILDS)
            assert len(orphans) == 1, "the server goes on for a client that is gone"
            builder = Builder(indexed, cache)
            builder.start()
            # first the server must notice that the killed run's lock has no client any more
            ending = "ending a build whose run was killed"
            wait_until(lambda: ending in [each.note for each in builder.reported])
            wait_until(lambda: orphans[0] not in execute(indexed.adbc_uri, BUILDS))
        builder.finish()
        assert builder.error is None
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}

    def test_an_index_that_was_whole_when_its_run_was_killed_is_taken_over(
        self, indexed: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("songvec_assets.vectors.index.build.swap_names", die)
            bring(indexed, cache)
        built = read_identity(indexed, BUILDING)
        change(indexed, 3)
        report = bring(indexed, cache)
        assert "a killed run had built it" in report.reason
        assert read_identity(indexed) == built
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}
        with indexed.get_connection() as connection:
            assert read_value(connection, "rows_changed_since_index") == 3
            assert read_value(connection, "building") is None

    @pytest.mark.parametrize(("lists", "n_changed"), [(29, 0), (30, 181)])
    def test_one_with_other_lists_or_of_long_ago_is_not(
        self, indexed: Database, cache: ModelCache, lists: int, n_changed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("songvec_assets.vectors.index.build.swap_names", die)
            build_index(indexed, cache, SPEC, IndexSettings(lists=lists))
        built = read_identity(indexed, BUILDING)
        change(indexed, n_changed)
        assert "a killed run had built it" not in bring(indexed, cache).reason
        assert read_identity(indexed) != built
        assert read_indexes(indexed) == {INDEX: (True, definition(30))}

    @pytest.mark.parametrize("name", [BUILDING, REPLACED, f"{INDEX}_ccnew"])
    def test_leftovers_are_dropped_even_where_nothing_is_built(
        self, table: Database, cache: ModelCache, name: str
    ) -> None:
        bring(table, cache)
        execute(
            table.adbc_uri,
            f"CREATE INDEX {name} ON song_embeddings USING ivfflat (embedding vector_cosine_ops) WITH (lists = 7);"
            f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass",
        )
        assert set(read_indexes(table)) == {INDEX, name}
        assert not bring(table, cache).built
        assert read_indexes(table) == WHOLE

    @pytest.mark.slow
    def test_a_build_goes_on_where_its_progress_cannot_be_read(
        self, table: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "_POLL_S", 0.05)
        name, elsewhere = sa.make_url(table.url).database, with_parts(table.url, database="postgres")
        watchers = f"""
            SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
            WHERE datname = '{name}' AND state LIKE 'idle%' AND query ~ 'ROLLBACK|pg_stat_progress_create_index'
        """
        builder = Builder(table, cache)
        with transaction(table, WRITE):
            builder.start()
            wait_until(lambda: len(builder.reported) > 3)
            execute(elsewhere, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            try:
                wait_until(lambda: execute(elsewhere, watchers))
                reported = len(builder.reported)
                time.sleep(0.3)
                assert len(builder.reported) <= reported + 1
            finally:
                execute(elsewhere, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        builder.finish()
        assert builder.error is None
        assert read_indexes(table) == WHOLE
