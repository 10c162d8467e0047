"""A strong lock on a table that searches use: waited for briefly, and again, until the patience ends."""

import threading

import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError, StoppedError
from songvec_assets.postgres import short_lock
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.short_lock import is_lock_timeout, run_with_short_lock
from songvec_assets.progress import StopSignal
from songvec_assets_tests.administration import execute, own_engine


@pytest.fixture
def rows(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A table `rows` that holds nothing."""
    monkeypatch.setattr(short_lock, "_PAUSE_S", 0.01)
    execute(database.adbc_uri, "CREATE TABLE rows (n integer)")
    return database


def alter(connection: sa.Connection) -> None:
    connection.execute(sa.text("ALTER TABLE rows ADD COLUMN IF NOT EXISTS m integer"))


def test_a_lock_that_is_held_is_waited_for_and_searches_go_on_meanwhile(rows: Database) -> None:
    n_tries, done = 0, threading.Event()

    def work(connection: sa.Connection) -> None:
        nonlocal n_tries
        n_tries += 1
        alter(connection)

    def run() -> None:
        run_with_short_lock(rows, work)
        done.set()

    with own_engine(rows).connect() as reader:
        reader.execute(sa.text("SELECT * FROM rows"))
        thread = threading.Thread(target=run)
        thread.start()
        while n_tries < 3:
            execute(rows.adbc_uri, "SELECT * FROM rows")
        assert not done.is_set()
    thread.join()
    assert done.is_set()
    assert execute(rows.adbc_uri, "SELECT m FROM rows") == []


def test_after_the_patience_it_is_an_error_and_nothing_is_changed(rows: Database) -> None:
    with own_engine(rows).connect() as reader:
        reader.execute(sa.text("SELECT * FROM rows"))
        with pytest.raises(DatabaseError) as refused:
            run_with_short_lock(rows, alter, patience_s=0)
    assert is_lock_timeout(refused.value)
    assert (
        len(execute(rows.adbc_uri, "SELECT 1 FROM pg_attribute WHERE attrelid = 'rows'::regclass AND attnum > 0")) == 1
    )


def test_a_stop_ends_the_waiting(rows: Database) -> None:
    stop = StopSignal()

    def work(connection: sa.Connection) -> None:
        stop.set()
        alter(connection)

    with own_engine(rows).connect() as reader:
        reader.execute(sa.text("SELECT * FROM rows"))
        with pytest.raises(StoppedError):
            run_with_short_lock(rows, work, check=stop.check)


def test_another_error_is_not_tried_again(rows: Database) -> None:
    tries: list[int] = []

    def work(connection: sa.Connection) -> None:
        tries.append(1)
        connection.execute(sa.text("SELECT 1 / 0"))

    with pytest.raises(DatabaseError) as refused:
        run_with_short_lock(rows, work)
    assert (len(tries), is_lock_timeout(refused.value)) == (1, False)
