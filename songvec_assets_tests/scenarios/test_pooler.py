"""Everything through a real PgBouncer in transaction mode; what needs a session of its own says so instead."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.embedding.pricing import Price
from songvec_assets.errors import BudgetExceededError, DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import hold_lock, lock_key
from songvec_assets.postgres.schema import ensure_schema, read_value, write_value
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import find_source
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.administration import as_role, dispose, execute, wait_until
from songvec_assets_tests.embedding.test_limits import SPENDER
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.postgres.test_locks import HOLDER, nothing

SESSION_SETTINGS = """
    SELECT name, setting FROM pg_settings
    WHERE source = 'session' AND name NOT IN ('application_name', 'transaction_isolation') ORDER BY name
"""
"""But those that the pooler, and the server with each transaction, sets anew."""


SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"


class TestAutocommit:
    @pytest.mark.parametrize("past", [False, True])
    def test_it_is_refused_where_it_would_reach_the_pooler(self, pooled: Database, past: bool) -> None:
        database = Database(pooled.url, direct_url=pooled.url if past else None)
        with (
            pytest.raises(DatabaseError, match="got a pooler in transaction mode: set SONGVEC_DIRECT_URL"),
            database.get_autocommit(),
        ):
            pytest.fail("it was handed out")

    def test_it_works_past_the_pooler(self, database: Database, pooled: Database) -> None:
        seen = Database(pooled.url, direct_url=database.url)
        with seen.get_autocommit(maintenance_work_mem="77MB") as connection:
            connection.execute(sa.text("CREATE TABLE rows (n integer)"))
            connection.execute(sa.text("VACUUM rows"))
            connection.execute(sa.text("CREATE INDEX CONCURRENTLY ON rows (n)"))
            assert connection.scalar(sa.text("SHOW maintenance_work_mem")) == "77MB"

    def test_what_it_sets_is_taken_back_where_sessions_outlive_their_clients(self, database: Database) -> None:
        settings = {"pool_mode": "session", "server_reset_query": ""}
        with running_pgbouncer(database.url, **settings) as url:
            before = execute(url, SESSION_SETTINGS)
            with Database(url).get_autocommit(maintenance_work_mem="77MB") as connection:
                pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            assert execute(url, "SELECT pg_backend_pid()") == [(pid,)]
            assert execute(url, SESSION_SETTINGS) == before


class TestTransactions:
    def test_each_is_read_committed_and_long_ones_have_no_timeout_of_the_roles(self, database: Database) -> None:
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            execute(database.adbc_uri, f"ALTER ROLE {role} SET default_transaction_isolation = 'serializable'")
            execute(database.adbc_uri, f"ALTER ROLE {role} SET statement_timeout = '7s'")
            with running_pgbouncer(seen.url) as url:
                for profile, timeout in (("batch", "0"), ("web", "7s"), ("parallel", "0")):
                    with Database(url).get_connection(profile) as connection:
                        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"
                        assert connection.scalar(sa.text("SHOW statement_timeout")) == timeout
                dispose(url)

    def test_the_schema_is_made_and_facts_are_kept(self, bare_url: str) -> None:
        with running_pgbouncer(bare_url) as url:
            for _ in range(2):
                ensure_schema(Database(url))
            with Database(url).get_connection() as connection:
                write_value(connection, "mine", 1)
            with Database(url).get_connection() as connection:
                assert read_value(connection, "mine") == 1

    def test_nothing_that_is_set_reaches_another_client(self, database: Database) -> None:
        with running_pgbouncer(database.url, pool_size=1) as url:
            before, seen = execute(url, SESSION_SETTINGS), Database(url)
            assert not seen.has_sessions
            ensure_schema(seen)
            for profile in ("batch", "web", "parallel"):
                with seen.get_connection(profile) as connection:
                    connection.execute(sa.text("SELECT 1"))
            with hold_lock(seen, "range", on_wait=nothing, check=nothing):
                pass
            limiter = RateLimiter(seen.get_engine("web"), "provider", 100, 100)
            limiter.slow_down(limiter.reserve(1), 0)
            Budget(Price(1e6), seen.get_engine("web"), "run", 100).reserve(1)
            assert execute(url, SESSION_SETTINGS) == before
            dispose(url)

    def test_songs_are_read_through_adbc(self, pooled: Database, database: Database, tmp_path: Path) -> None:
        execute(
            database.adbc_uri,
            "CREATE TABLE songs AS SELECT n AS id, 'n' || n AS name, 'a' AS artist, 'words' AS lyrics "
            "FROM generate_series(1, 1500) AS n; ALTER TABLE songs ADD PRIMARY KEY (id)",
        )
        for n_written in (6, 0):
            report = cache_songs_to_parquet(
                find_source(pooled, PostgresSettings()),
                Snapshots(LocalStorage(tmp_path)),
                Tiling(width=300, stop=1_500),
            )
            assert report.n_songs == 1_500
            assert sum(each.written for each in report.ranges) == n_written


class TestLocks:
    def test_another_process_waits_and_goes_on_when_the_first_was_killed(self, pooled: Database) -> None:
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, pooled.url], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            waiting, entered = threading.Event(), threading.Event()

            def wait() -> None:
                with hold_lock(pooled, "range", on_wait=waiting.set, check=nothing) as check_held:
                    check_held()
                    entered.set()

            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            assert waiting.wait(60)
            assert not entered.is_set()
            holder.kill()
            assert entered.wait(60)
            thread.join()
        finally:
            holder.kill()
            holder.communicate()

    def test_it_is_held_against_those_who_come_past_the_pooler_and_ends_with_the_block(
        self, database: Database, pooled: Database
    ) -> None:
        free = "SELECT pg_try_advisory_xact_lock(%s)", (lock_key("range"),)
        with hold_lock(pooled, "range", on_wait=nothing, check=nothing) as check_held:
            for _ in range(5):  # other transactions through the same pooler do not end it
                execute(pooled.url, "SELECT 1")
                check_held()
            assert execute(database.adbc_uri, *free) == [(False,)]
        assert execute(database.adbc_uri, *free) == [(True,)]


class TestQuotaAndBudget:
    def test_processes_get_every_place_once(self, pooled: Database) -> None:
        spenders = [
            subprocess.Popen([sys.executable, "-c", SPENDER, pooled.url], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        told = [float(wait) for spender in spenders for wait in spender.communicate(timeout=60)[0].split()]
        assert sorted(told) == pytest.approx([120 * place for place in range(20)], abs=40)

    def test_threads_stay_within_one_budget(self, pooled: Database) -> None:
        budget = Budget(Price(1e6), pooled.get_engine("web"), "run", 100)

        def spend(_: int) -> int:
            try:
                budget.reserve(3)
            except BudgetExceededError:
                return 0
            budget.settle(3, 2)
            return 2

        with ThreadPoolExecutor(8) as pool:
            assert 75 <= sum(pool.map(spend, range(60))) == budget.n_tokens <= 100


class TestCancel:
    @pytest.mark.parametrize("past", [False, True], ids=["through the pooler", "past a pooler that is full"])
    def test_a_running_statement_ends(self, database: Database, past: bool) -> None:
        with running_pgbouncer(database.url, pool_size=1 if past else 2) as url:
            seen = Database(url, direct_url=database.url if past else None)
            errors: list[DatabaseError] = []

            def sleep() -> None:
                with pytest.raises(DatabaseError) as caught, seen.get_connection() as connection:
                    connection.execute(sa.text("SELECT pg_sleep(60)"))
                errors.append(caught.value)

            thread = threading.Thread(target=sleep, daemon=True)
            thread.start()
            wait_until(lambda: execute(database.adbc_uri, SLEEPING) == [(1,)])
            seen.cancel()
            thread.join(50)
        [error] = errors
        assert "the statement was cancelled" in str(error)
