"""Locks that end with their process; and who holds one: named by the process that took it, seen by any other."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime

import psycopg2
import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError, StoppedError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import Holder, find_holders, hold_lock, lock_key, name_holder
from songvec_assets.progress import StopSignal
from songvec_assets_tests.administration import as_role, execute, wait_until

TASKS = {lock_key("range"): ("filling", "000000000-000000100"), lock_key("index"): ("building the index", "")}


END_HOLDERS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND datname = current_database()
"""

HOLDER = """
import sys, time
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import hold_lock
with hold_lock(Database(sys.argv[1]), "range", on_wait=lambda: None, check=lambda: None):
    print("held", flush=True)
    time.sleep(120)
"""


def nothing() -> None:
    """Neither waits nor stops."""


@pytest.fixture
def find(database: Database) -> Callable[[], list[Holder]]:
    """Asks in another connection."""

    def ask() -> list[Holder]:
        with database.get_connection() as connection:
            return find_holders(connection, TASKS)

    return ask


def test_a_holder_is_named_while_it_holds_the_lock(database: Database, find: Callable[[], list[Holder]]) -> None:
    run = Database(database.url, run_id="1a2b3c4d-5e6f-4711-8899-aabbccddeeff")
    with hold_lock(run, "range", on_wait=nothing, check=nothing), hold_lock(database, "other", nothing, nothing):
        [holder] = find()
    host = socket.gethostname()[:30]
    assert (holder.task, holder.key, holder.run_id) == ("filling", "000000000-000000100", "1a2b3c4d")
    assert (holder.process, holder.host) == (os.getpid(), host)
    assert holder.seconds is not None
    assert holder.seconds < 60
    words = f"Filling {holder.key} for 3 min: process {os.getpid()} on {host}, run 1a2b3c4d"
    assert replace(holder, seconds=180.0).describe() == words
    assert holder.as_dict()["since"].startswith("20")
    assert not find()
    with database.get_connection() as connection:
        names = connection.exec_driver_sql("SELECT application_name FROM pg_stat_activity").scalars()
        assert name_holder(run.run_id) not in {*names}, "the pooled session forgets the name"


def test_one_who_waits_holds_nothing_and_counts_from_when_it_gets_the_lock(
    database: Database, find: Callable[[], list[Holder]]
) -> None:
    with ExitStack() as held:
        held.enter_context(hold_lock(database, "range", on_wait=nothing, check=nothing))
        [first] = find()
        freed: list[datetime] = []

        def let_go() -> None:
            assert [each.since for each in find()] == [first.since]
            held.close()
            freed.extend(execute(database.adbc_uri, "SELECT clock_timestamp()")[0])

        with hold_lock(database, "range", on_wait=let_go, check=nothing):
            [second] = find()
        assert second.since is not None
        assert second.since >= freed[0]
        assert not second.run_id


def test_several_are_listed_the_longest_first_and_a_stranger_has_no_process(
    database: Database, find: Callable[[], list[Holder]]
) -> None:
    stranger = psycopg2.connect(database.adbc_uri, application_name="songvec")
    try:
        with stranger.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (lock_key("index"),))
        with hold_lock(database, "range", on_wait=nothing, check=nothing):
            older, newer = find()
    finally:
        stranger.close()
    assert (older.task, older.process) == ("building the index", None)
    assert replace(older, seconds=9.4).describe() == "Building the index for 9 s: another program"
    assert newer.task == "filling"
    wait_until(lambda: not find())


def test_who_may_not_see_other_users_sessions_sees_the_name_and_not_the_time(database: Database) -> None:
    with (
        as_role(database) as seen,
        hold_lock(database, "range", on_wait=nothing, check=nothing),
        seen.get_connection() as connection,
    ):
        [holder] = find_holders(connection, TASKS)
    assert (holder.process, holder.since, holder.seconds) == (os.getpid(), None, None)
    assert holder.describe().startswith("Filling 000000000-000000100: process ")


def test_a_name_fits_into_what_postgres_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a-very-long-name-" * 5)
    assert len(name_holder("1a2b3c4d-5e6f-4711-8899-aabbccddeeff")) <= 63
    assert name_holder("").startswith("songvec - ")


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
