"""What is made in a database on first use, facts, and locks that end with their process."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.errors import DatabaseError, StoppedError
from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import (
    check_pgvector_version,
    describe_pgvector,
    ensure_schema,
    hold_lock,
    lock_key,
    read_migrations,
    read_record,
    read_value,
    write_value,
)
from songvec_assets.progress import StopSignal
from songvec_assets_tests.administration import as_role, execute, wait_until, with_parts
from songvec_assets_tests.conftest import TEMPLATE

TABLES = {("songvec", name) for name in ("settings", "rate_limits", "rate_seconds", "loaded_ranges", "budgets")}

EARLIER_TABLES = """
    CREATE SCHEMA songvec;
    CREATE TABLE songvec.settings (key text PRIMARY KEY, value jsonb NOT NULL);
    CREATE TABLE songvec.rate_limits (
        name text PRIMARY KEY,
        requests_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        tokens_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    CREATE TABLE songvec.loaded_ranges (
        range_start bigint NOT NULL,
        range_stop bigint NOT NULL,
        model text NOT NULL,
        dimensions integer NOT NULL,
        n_songs integer NOT NULL,
        digest bytea NOT NULL,
        song_ids bytea NOT NULL,
        checksums bytea NOT NULL,
        loaded_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (range_start, range_stop)
    );
    INSERT INTO songvec.settings VALUES ('mine', '1');
    INSERT INTO songvec.rate_limits (name) VALUES ('provider');
    INSERT INTO songvec.loaded_ranges VALUES (0, 100, 'model', 64, 1, '', '', '');
"""
"""Of the first version, with a row each."""

LATER_TABLES = (
    EARLIER_TABLES
    + """
    ALTER TABLE songvec.rate_limits
        ADD paused_until timestamptz NOT NULL DEFAULT 'epoch', ADD busy_since timestamptz NOT NULL DEFAULT 'epoch',
        ADD slowed_at timestamptz NOT NULL DEFAULT 'epoch', ADD share double precision NOT NULL DEFAULT 1;
    CREATE TABLE songvec.rate_seconds (
        name text, slot smallint, second bigint NOT NULL, n_requests bigint NOT NULL, n_tokens bigint NOT NULL,
        PRIMARY KEY (name, slot)
    );
    CREATE TABLE songvec.budgets (
        name text PRIMARY KEY, n_tokens bigint NOT NULL, updated_at timestamptz NOT NULL DEFAULT now()
    );
"""
)
"""Of a later release, which recorded no version either."""

UNVERSIONED_TABLES = (
    LATER_TABLES
    + """
    ALTER TABLE songvec.rate_limits
        ADD seen_at timestamptz NOT NULL DEFAULT 'epoch', ADD ahead_s double precision NOT NULL DEFAULT 0,
        ALTER requests_at SET DEFAULT 'epoch', ALTER tokens_at SET DEFAULT 'epoch';
    ALTER TABLE songvec.loaded_ranges
        ADD table_name text NOT NULL DEFAULT 'song_embeddings', DROP CONSTRAINT loaded_ranges_pkey,
        ADD PRIMARY KEY (table_name, range_start, range_stop);
    ALTER TABLE songvec.budgets
        DROP n_tokens, ADD usd numeric NOT NULL DEFAULT 0, ADD reserved_usd numeric NOT NULL DEFAULT 0;
"""
)
"""Of the last release that recorded no version."""

NEWEST = len(read_migrations())

READ_COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable
    FROM information_schema.columns WHERE table_schema = 'songvec' ORDER BY 1, 2
"""

READ_KEYS = """
    SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'songvec'::regnamespace AND contype = 'p' ORDER BY 1
"""

END_HOLDERS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND datname = current_database()
"""

HOLDER = """
import sys, time
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import hold_lock
with hold_lock(Database(sys.argv[1]), "range", on_wait=lambda: None, check=lambda: None):
    print("held", flush=True)
    time.sleep(120)
"""


@dataclass(frozen=True)
class Mine:
    """A record."""

    n: int


def nothing() -> None:
    """Neither waits nor checks."""


def read_tables(url: str) -> set[tuple[str, str]]:
    """Schema and name of our tables."""
    rows = execute(url, "SELECT schemaname, tablename FROM pg_tables WHERE schemaname = 'songvec'")
    return set(rows)


def run_at_once(work: Callable[[], None], n_threads: int) -> list[BaseException]:
    """Run the same work in threads that start together; what they raise."""
    barrier, errors = threading.Barrier(n_threads), []

    def run() -> None:
        barrier.wait()
        try:
            work()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


class TestEnsureSchema:
    def test_the_first_use_creates_the_extension_and_the_tables(self, bare_url: str) -> None:
        ensure_schema(Database(bare_url))
        assert execute(bare_url, "SELECT 1 FROM pg_extension WHERE extname = 'vector'") == [(1,)]
        assert read_tables(bare_url) == TABLES

    def test_a_second_use_leaves_everything_as_it_is(self, bare_url: str) -> None:
        database = Database(bare_url)
        ensure_schema(database)
        with database.get_connection() as connection:
            write_value(connection, "mine", 1)
        # rows that are written anew, were it only by an update, have a new xmin
        catalogue = """
            SELECT oid, xmin::text FROM pg_class WHERE relnamespace = 'songvec'::regnamespace
            UNION ALL SELECT oid, xmin::text FROM pg_extension
            UNION ALL SELECT oid, xmin::text FROM pg_namespace ORDER BY 1
        """
        before = execute(bare_url, catalogue)
        ensure_schema(database)
        assert execute(bare_url, catalogue) == before
        with database.get_connection() as connection:
            assert read_value(connection, "mine") == 1

    @pytest.mark.parametrize("tables", [EARLIER_TABLES, LATER_TABLES], ids=["the first", "a later one"])
    def test_the_tables_of_an_earlier_version_get_what_is_new_and_keep_what_they_hold(
        self, bare_url: str, server_url: str, tables: str
    ) -> None:
        execute(bare_url, tables)
        database = Database(bare_url)
        ensure_schema(database)
        assert read_tables(bare_url) == TABLES
        assert execute(bare_url, READ_COLUMNS) == execute(with_parts(server_url, database=TEMPLATE), READ_COLUMNS)
        with database.get_connection() as connection:
            assert read_value(connection, "mine") == 1
        assert execute(bare_url, "SELECT table_name, range_start, range_stop, model FROM songvec.loaded_ranges") == [
            ("song_embeddings", 0, 100, "model")
        ]
        keys = execute(bare_url, READ_KEYS)
        assert keys == execute(with_parts(server_url, database=TEMPLATE), READ_KEYS)
        assert ("loaded_ranges_pkey", "PRIMARY KEY (table_name, range_start, range_stop)") in keys
        assert execute(bare_url, "SELECT name, share, slowed_at < now() FROM songvec.rate_limits") == [
            ("provider", 1.0, True)
        ]
        limiter = RateLimiter(database.get_engine("web"), "provider", 1, 1)
        limiter.slow_down(limiter.reserve(1), 100)
        assert limiter.reserve(0).wait_s > 50

    def test_the_last_schema_without_a_version_is_taken_over_as_it_is(self, bare_url: str, server_url: str) -> None:
        execute(bare_url, UNVERSIONED_TABLES)
        # whatever is done to a table, were it only that it is locked and left as it is, writes its rows of the catalog
        catalog = "SELECT oid, xmin::text FROM pg_class WHERE relnamespace = 'songvec'::regnamespace ORDER BY 1"
        ranges = "SELECT *, xmin::text FROM songvec.loaded_ranges"
        before = execute(bare_url, catalog), execute(bare_url, ranges)
        database = Database(bare_url)
        ensure_schema(database)
        assert (execute(bare_url, catalog), execute(bare_url, ranges)) == before
        assert execute(bare_url, READ_COLUMNS) == execute(with_parts(server_url, database=TEMPLATE), READ_COLUMNS)
        with database.get_connection() as connection:
            assert (read_value(connection, "mine"), read_value(connection, "schema_version")) == (1, NEWEST)

    def test_who_may_not_migrate_an_earlier_schema_is_told_who_may_and_may_look_at_it_afterwards(
        self, bare_url: str
    ) -> None:
        execute(bare_url, f"{UNVERSIONED_TABLES}; CREATE EXTENSION vector")
        with as_role(Database(bare_url)) as seen:
            role = sa.make_url(seen.url).username
            execute(bare_url, f"GRANT USAGE ON SCHEMA songvec TO {role}; GRANT SELECT ON songvec.settings TO {role}")
            with pytest.raises(DatabaseError, match=rf"version 1, expected {NEWEST}.*let its owner run"):
                ensure_schema(seen)
            ensure_schema(Database(bare_url))
            ensure_schema(seen)

    def test_a_schema_of_a_newer_version_is_refused_and_left_as_it_is(self, bare_url: str) -> None:
        database = Database(bare_url)
        ensure_schema(database)
        with database.get_connection() as connection:
            write_value(connection, "schema_version", 7)
        with pytest.raises(DatabaseError, match=rf"newer songvec, to version 7 .* knows version {NEWEST}: upgrade"):
            ensure_schema(database)
        with database.get_connection() as connection:
            assert read_value(connection, "schema_version") == 7

    def test_migrations_are_ascii_as_databases_have_other_encodings(self) -> None:
        assert all(migration.isascii() for migration in read_migrations())

    def test_a_later_migration_runs_once_over_what_is_there_and_one_that_fails_changes_nothing(
        self, bare_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        execute(bare_url, UNVERSIONED_TABLES)
        database, first = Database(bare_url), read_migrations()
        second = "ALTER TABLE songvec.loaded_ranges ADD note text NOT NULL DEFAULT ':a 50% b'"
        for broken in (["CREATE TABLE songvec.half (n integer)", "SELECT 1 / 0"], ["SELECT 1 / 0"]):
            monkeypatch.setattr(schema, "read_migrations", lambda each=broken: [*first, second, *each])
            with pytest.raises(DatabaseError, match="division by zero"):
                ensure_schema(database)
            assert read_tables(bare_url) == TABLES
        monkeypatch.setattr(schema, "read_migrations", lambda: [*first, second])
        ensure_schema(database)
        ensure_schema(database)
        assert execute(bare_url, "SELECT range_stop, note FROM songvec.loaded_ranges") == [(100, ":a 50% b")]
        with database.get_connection() as connection:
            assert read_value(connection, "schema_version") == NEWEST + 1

    def test_what_another_version_recorded_counts_as_not_recorded(self, database: Database) -> None:
        with database.get_connection() as connection:
            for value in ({"n": "one"}, {"m": 1}, [1], "n", None):
                write_value(connection, "mine", value)
                assert read_record(connection, "mine", Mine) is None
            write_value(connection, "mine", {"n": 1, "since": 2030})
            assert read_record(connection, "mine", Mine) == Mine(1)
            assert read_record(connection, "none", Mine) is None

    def test_first_uses_at_once_over_an_earlier_version_do_not_collide(self, bare_url: str) -> None:
        execute(bare_url, EARLIER_TABLES)
        assert run_at_once(lambda: ensure_schema(Database(bare_url)), 6) == []
        assert read_tables(bare_url) == TABLES

    def test_first_uses_at_once_do_not_collide(self, bare_url: str) -> None:
        for _ in range(3):
            assert run_at_once(lambda: ensure_schema(Database(bare_url)), 6) == []
            assert read_tables(bare_url) == TABLES
            execute(bare_url, "DROP SCHEMA songvec CASCADE; DROP EXTENSION vector")

    def test_first_uses_at_once_where_only_the_extension_is_missing_do_not_collide(self, bare_url: str) -> None:
        ensure_schema(Database(bare_url))
        for _ in range(3):
            execute(bare_url, "DROP EXTENSION vector CASCADE")
            assert run_at_once(lambda: ensure_schema(Database(bare_url)), 6) == []
            assert execute(bare_url, "SELECT to_regproc('songvec.search') IS NOT NULL") == [(True,)]

    def test_a_user_who_may_not_create_the_extension_is_told_who_may(self, bare_url: str) -> None:
        with as_role(Database(bare_url), database_right="CREATE, CONNECT") as seen:
            with pytest.raises(
                DatabaseError, match="let a superuser run CREATE EXTENSION vector; in this database once"
            ):
                ensure_schema(seen)
            assert read_tables(bare_url) == set()
            execute(bare_url, "CREATE EXTENSION vector")
            ensure_schema(seen)
            assert read_tables(bare_url) == TABLES

    def test_a_search_path_that_names_no_schema_is_said_so(self, bare_url: str) -> None:
        execute(bare_url, f"ALTER DATABASE {sa.make_url(bare_url).database} SET search_path = nowhere")
        with pytest.raises(DatabaseError, match="search_path of this user names no schema that is there"):
            ensure_schema(Database(bare_url))

    def test_an_extension_that_is_too_old_is_refused(self, bare_url: str) -> None:
        database = Database(bare_url)
        ensure_schema(database)
        execute(bare_url, "UPDATE pg_extension SET extversion = '0.5.1' WHERE extname = 'vector'")
        with pytest.raises(DatabaseError, match=r"expected pgvector 0\.7\.0 or newer, this database has 0\.5\.1"):
            ensure_schema(database)

    @pytest.mark.parametrize("installed", ["0.1", "0.4.4", "0.6.2"])
    def test_versions_without_halfvec_are_refused_with_what_to_run(self, installed: str) -> None:
        with pytest.raises(DatabaseError, match="ALTER EXTENSION vector UPDATE") as caught:
            check_pgvector_version(installed)
        assert installed in str(caught.value)

    @pytest.mark.parametrize(
        "installed",
        [
            "0.7.0",
            "0.7.4",
            "0.8.5",
            "0.10.0",
            "1.0",
            "1.0.0",
            "0.7",
            "0.8.0.google-4",
            "0.8.1-rc1",
            "v0.8.0",
            "main",
            "",
        ],
    )
    def test_versions_with_halfvec_are_taken_whatever_a_host_adds(self, installed: str) -> None:
        check_pgvector_version(installed)

    @pytest.mark.parametrize(
        ("installed", "n_mended"),
        [("0.8.0.google-4", 3), ("0.8.2", 2), ("0.8.3-rc", 1), ("0.8.4", 0), ("0.8.5", 0), ("0.10", 0), ("0.7.4", 3)],
    )
    def test_what_was_mended_since_is_named(self, installed: str, n_mended: int) -> None:
        words = describe_pgvector(installed)
        assert words.count("(0.8.") == n_mended
        assert (installed in words) == (n_mended > 0)

    def test_a_version_that_is_none_is_named_and_refuses_nothing(self) -> None:
        assert "'main'" in describe_pgvector("main")
        with pytest.raises(DatabaseError, match="0\\.6\\.2\\.google-1"):
            check_pgvector_version("0.6.2.google-1")


class TestFacts:
    @pytest.mark.parametrize("value", [1, "zwölf", {"n_rows": 3, "lists": None}, [1, 2], 2**40, None])
    def test_a_fact_is_read_as_it_was_written(self, database: Database, value: object) -> None:
        with database.get_connection() as connection:
            assert read_value(connection, "a") is None
            write_value(connection, "a", "before")
            write_value(connection, "a", value)
            write_value(connection, "b", "other")
        with database.get_connection() as connection:
            assert read_value(connection, "a") == value

    def test_a_fact_is_part_of_the_transaction(self, database: Database) -> None:
        with pytest.raises(KeyError), database.get_connection() as connection:
            write_value(connection, "a", 1)
            raise KeyError
        with database.get_connection() as connection:
            assert read_value(connection, "a") is None


class TestHoldLock:
    def test_another_session_waits_is_told_once_and_goes_on_after_the_end(self, database: Database) -> None:
        told, entered = [], threading.Event()

        def wait() -> None:
            with hold_lock(database, "range", on_wait=lambda: told.append(1), check=nothing):
                entered.set()

        thread = threading.Thread(target=wait, daemon=True)
        with hold_lock(database, "range", on_wait=lambda: pytest.fail("nobody has it"), check=nothing):
            thread.start()
            wait_until(lambda: told)
            assert not entered.wait(0.8)
        assert entered.wait(60)
        thread.join()
        assert told == [1]

    def test_another_name_is_another_lock(self, database: Database) -> None:
        with (
            hold_lock(database, "range a", on_wait=nothing, check=nothing),
            hold_lock(database, "range b", on_wait=lambda: pytest.fail("it is free"), check=nothing),
        ):
            pass
        assert lock_key("range a") != lock_key("range b")

    def test_an_error_in_the_block_releases_it_and_passes_unchanged(self, database: Database) -> None:
        with pytest.raises(KeyError, match="mine"), hold_lock(database, "range", on_wait=nothing, check=nothing):
            raise KeyError("mine")
        with hold_lock(database, "range", on_wait=lambda: pytest.fail("still held"), check=nothing):
            pass

    def test_a_check_that_raises_gives_up_waiting(self, database: Database) -> None:
        stop = StopSignal()
        started = time.monotonic()
        with (
            hold_lock(database, "range", on_wait=nothing, check=nothing),
            pytest.raises(StoppedError),
            hold_lock(database, "range", on_wait=stop.set, check=stop.check),
        ):
            pytest.fail("it was not free")
        assert time.monotonic() - started < 5

    def test_the_error_of_a_block_whose_connection_broke_is_the_blocks_own(self, database: Database) -> None:
        with pytest.raises(KeyError, match="mine"), hold_lock(database, "range", on_wait=nothing, check=nothing):
            execute(database.adbc_uri, END_HOLDERS)
            raise KeyError("mine")

    def test_a_lock_that_was_lost_is_told_to_those_who_ask(self, database: Database) -> None:
        with hold_lock(database, "range", on_wait=nothing, check=nothing) as check_held:
            check_held()
            execute(database.adbc_uri, END_HOLDERS)
            for _ in range(2):
                with pytest.raises(DatabaseError, match="start the same command again"):
                    check_held()

    def test_the_roles_timeouts_do_not_end_it(self, database: Database) -> None:
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            for timeout in ("idle_session_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"):
                execute(database.adbc_uri, f"ALTER ROLE {role} SET {timeout} = '300ms'")
            with hold_lock(seen, "range", on_wait=nothing, check=nothing):
                time.sleep(0.8)
                free = execute(database.adbc_uri, "SELECT pg_try_advisory_lock(%s)", (lock_key("range"),))
                assert free == [(False,)]

    def test_neither_vacuum_nor_an_index_build_waits_for_it(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE TABLE rows (n integer); INSERT INTO rows VALUES (1)")
        held_back = """
            SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
                AND pid <> pg_backend_pid() AND backend_type = 'client backend'
        """
        with hold_lock(database, "range", on_wait=nothing, check=nothing) as check_held:
            check_held()
            assert execute(database.adbc_uri, held_back) == [(0,)]
            with database.get_autocommit(statement_timeout="20s") as connection:
                connection.execute(sa.text("DELETE FROM rows"))
                connection.execute(sa.text("VACUUM rows"))
                connection.execute(sa.text("CREATE INDEX CONCURRENTLY ON rows (n)"))
            assert execute(database.adbc_uri, "SELECT pg_relation_size('rows')") == [(0,)]
            check_held()

    def test_a_lock_ends_with_its_process_even_one_that_was_killed(self, database: Database) -> None:
        waiting = threading.Event()
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, database.url], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            entered = threading.Event()

            def wait() -> None:
                with hold_lock(database, "range", on_wait=waiting.set, check=nothing):
                    entered.set()

            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            assert waiting.wait(60)
            assert not entered.is_set()
            holder.kill()
            assert entered.wait(60), "it sleeps for 120 s"
            thread.join()
        finally:
            holder.kill()
            holder.communicate()
