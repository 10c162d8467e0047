"""What a person reads: each fault's own words, and what to do. The words are those of real servers and poolers."""

import threading

import psycopg2
import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, get_connection
from songvec_assets.postgres.messages import read_database_error
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.pooler import running_pgbouncer


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            'connection to server at "db", port 5432 failed: FATAL:  the database system is in recovery mode',
            "is starting or shutting down",
        ),
        ('connection to server on socket "/s" failed: FATAL:  the database system is starting up', "is starting or"),
        ("FATAL:  the database system is not yet accepting connections", "is starting or shutting down"),
        (
            "WARNING:  terminating connection because of crash of another server process\n"
            "server closed the connection unexpectedly",
            "the server lost a process",
        ),
        ("FATAL:  terminating connection due to unexpected postmaster exit", "the server was shut down"),
        ("FATAL:  terminating connection due to idle-session timeout", "raise that"),
        ("FATAL:  terminating connection due to transaction timeout", "raise that"),
        ("FATAL:  no such database: songs", "the pooler does not know it"),
        ("FATAL:  server login has been failing, try again later (server_login_retry)", "does not get into the server"),
        ("FATAL:  pgbouncer cannot connect to server", "does not get into the server"),
        ("FATAL:  client_login_timeout (server down)", "does not get into the server"),
        ('FATAL:  too many connections for role "ann"', "ALTER ROLE or ALTER DATABASE … CONNECTION LIMIT"),
        ('FATAL:  too many connections for database "songs"', "ALTER ROLE or ALTER DATABASE … CONNECTION LIMIT"),
        ("FATAL:  server conn crashed?\nserver closed the connection unexpectedly", "the connection broke"),
    ],
)
def test_words_without_a_code_lead_to_advice(words: str, advice: str) -> None:
    told = str(read_database_error(psycopg2.OperationalError(words)))
    assert told.startswith(f"Postgres: {' '.join(words.split())} (")
    assert advice in told


def test_words_that_nothing_is_known_of_stand_alone() -> None:
    error = read_database_error(psycopg2.OperationalError("out of cheese\n"))
    assert (str(error), error.code) == ("Postgres: out of cheese", "database.failed")


@pytest.mark.parametrize(
    ("state", "message", "advice", "code"),
    [
        ("53100", "could not extend file", "free space, then start the same command again", "database.full"),
        (
            "53100",
            'could not resize shared memory segment "/PostgreSQL.1" to 67128672 bytes',
            "--shm-size=1g",
            "database.full",
        ),
        ("53200", 'could not map shared memory segment "/PostgreSQL.1"', "--shm-size=1g", "database.full"),
        (
            "25006",
            "cannot execute INSERT in a read-only transaction",
            "if it is a standby; else see",
            "database.read-only",
        ),
        ("55P03", "canceling statement due to lock timeout", "another session holds a lock", "database.locked"),
        (
            "57014",
            "canceling statement due to statement timeout",
            "the statement was cancelled",
            "database.unavailable",
        ),
        ("3F000", 'schema "songvec" does not exist', "took the place of this one", "database.unavailable"),
        ("3F000", 'schema "theirs" does not exist', "ALTER ROLE … SET search_path", "database.extension"),
        ("42P01", 'relation "songvec.settings" does not exist', "took the place of this one", "database.unavailable"),
        ("42501", "permission denied for table songs", "this user lacks a right", "database.no-right"),
    ],
)
def test_a_state_leads_to_advice_and_a_code(
    database: Database, state: str, message: str, advice: str, code: str
) -> None:
    raising = f"DO $$ BEGIN RAISE EXCEPTION '{message}' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(DatabaseError) as caught, database.get_connection() as connection:
        connection.execute(sa.text(raising))
    assert message in str(caught.value)
    assert advice in str(caught.value)
    assert caught.value.code == code


def test_a_transaction_that_may_not_write_says_so(database: Database) -> None:
    with (
        pytest.raises(DatabaseError, match=r"read-only transaction \(this server takes no writes"),
        database.get_connection() as connection,
    ):
        connection.execute(sa.text("SET TRANSACTION READ ONLY"))
        connection.execute(sa.text("CREATE TABLE kept (n integer)"))


def end_once_it_sleeps(database: Database, pid: int) -> None:
    """End a process of the server in the middle of a statement."""
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
    wait_until(lambda: execute(database.adbc_uri, sleeping, (pid,)))
    execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,))


class TestPgBouncer:
    def test_no_session_that_became_free_in_time(self, database: Database, caplog: pytest.LogCaptureFixture) -> None:
        with (
            running_pgbouncer(database.url, pool_size=1, query_wait_timeout=1) as url,
            get_connection(url),
            pytest.raises(DatabaseError, match=r"query_wait_timeout .* raise its default_pool_size"),
            get_connection(url),
        ):
            pass
        assert caplog.records == []

    def test_a_mode_without_transactions(self, database: Database) -> None:
        with running_pgbouncer(database.url, pool_mode="statement") as url:
            for _ in range(2):
                with (
                    pytest.raises(DatabaseError, match="got a pooler in statement mode: set its pool_mode") as caught,
                    get_connection(url),
                ):
                    pass
                assert caught.value.code == "database.session"

    def test_a_client_too_many(self, database: Database) -> None:
        with (
            running_pgbouncer(database.url, max_client_conn=1) as url,
            get_connection(url),
            pytest.raises(DatabaseError, match="the pooler takes no more clients"),
            get_connection(url),
        ):
            pass

    def test_a_parameter_that_it_does_not_take(self, database: Database) -> None:
        with running_pgbouncer(database.url) as url:
            given = f"{url}?options=-c%20work_mem%3D1MB"
            with pytest.raises(DatabaseError, match="refuses a parameter at the end"), get_connection(given):
                pass

    @pytest.mark.parametrize(
        ("setting", "advice"),
        [
            ("idle_transaction_timeout", "transactions that hold a lock"),
            ("query_timeout", "statements that take long"),
        ],
    )
    def test_its_own_timeouts(self, database: Database, setting: str, advice: str) -> None:
        with (
            running_pgbouncer(database.url, **{setting: 1}) as url,
            pytest.raises(DatabaseError, match=advice),
            get_connection(url) as connection,
        ):
            pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            if setting == "idle_transaction_timeout":
                alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
                wait_until(lambda: execute(database.adbc_uri, alive, (pid,)) == [(0,)])
            connection.execute(sa.text("SELECT pg_sleep(5)"))

    def test_a_session_that_the_server_ended(self, database: Database) -> None:
        with running_pgbouncer(database.url) as url:
            with pytest.raises(DatabaseError) as caught, get_connection(url) as connection:
                pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
                ending = threading.Thread(target=end_once_it_sleeps, args=(database, pid))
                ending.start()
                connection.execute(sa.text("SELECT pg_sleep(60)"))
            ending.join()
        assert "terminating connection due to administrator command" in str(caught.value)
        assert "the server was shut down" in str(caught.value)
