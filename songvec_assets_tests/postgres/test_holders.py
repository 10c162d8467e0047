"""Who holds a lock: named by the process that took it, seen by any other, and by no means afterwards."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime

import psycopg2
import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.holders import Holder, find_holders, name_holder
from songvec_assets.postgres.schema import hold_lock, lock_key
from songvec_assets_tests.administration import as_role, execute, wait_until

TASKS = {lock_key("range"): ("filling", "000000000-000000100"), lock_key("index"): ("building the index", "")}


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
