"""Engines and their pools, URLs, and what a person reads when the database refuses."""

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres import engine as engine_module
from songvec_assets.postgres.engine import Database, Profile, atomic, get_connection, get_engine, raw_cursor
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.postgres.sessions import Backend, cancel_statements
from songvec_assets_tests.administration import (
    as_role,
    dispose,
    execute,
    free_port,
    login_role,
    set_for_role,
    wait_until,
    with_parts,
)
from songvec_assets_tests.postgres.conftest import PASSWORD, TcpServer


def read_sessions(database: Database) -> list[int]:
    """The server's processes that serve the package in this database."""
    statement = """
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'songvec' ORDER BY pid
    """
    return [pid for (pid,) in execute(database.adbc_uri, statement)]


def sleeping(database: Database) -> bool:
    """Whether a pg_sleep of the package is running."""
    statement = """
        SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'
    """
    return bool(execute(database.adbc_uri, statement)[0][0])


def show(database: Database, profile: Profile, name: str) -> str:
    """A setting of the server as a transaction sees it."""
    with database.get_connection(profile) as connection:
        return str(connection.scalar(sa.text(f"SHOW {name}")))


def error_of(url: str) -> DatabaseError:
    """What `SELECT 1` ends with."""
    with pytest.raises(DatabaseError) as caught, get_connection(url) as connection:
        connection.execute(sa.text("SELECT 1"))
    return caught.value


def cancelling() -> bool:
    """Whether a cancellation is on its way."""
    return "songvec-cancel" in {thread.name for thread in threading.enumerate()}


class Stream:
    """A file for COPY, of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def read(self, _size: int) -> bytes:
        """The next one."""
        return next(self._pieces, b"")


class TestClose:
    def test_a_database_that_is_closed_keeps_no_session_and_can_be_used_again(self, database: Database) -> None:
        with Database(database.url, direct_url=f"{database.url}&application_name=songvec" if "?" in database.url else
                      f"{database.url}?application_name=songvec") as opened:  # fmt: skip
            for profile in ("web", "parallel"):
                with opened.get_connection(profile) as connection:
                    connection.execute(sa.text("SELECT 1"))
            with opened.get_autocommit():
                assert len(read_sessions(database)) == 3
            # the server's process ends a moment after its client
            wait_until(lambda: len(read_sessions(database)) == 2)
        wait_until(lambda: read_sessions(database) == [])
        with opened.get_connection("web") as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
        opened.close()
        wait_until(lambda: read_sessions(database) == [])


class TestPools:
    @pytest.mark.parametrize(("profile", "n_at_once", "n_kept"), [("web", 15, 5), ("parallel", 15, 15)])
    def test_a_pool_lends_so_many_connections_and_keeps_so_many(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, profile: Profile, n_at_once: int, n_kept: int
    ) -> None:
        monkeypatch.setattr(database.get_engine(profile).pool, "_timeout", 0.05)
        with contextlib.ExitStack() as stack:
            for _ in range(n_at_once):
                stack.enter_context(database.get_connection(profile)).execute(sa.text("SELECT 1"))
            assert len(read_sessions(database)) == n_at_once
            with pytest.raises(DatabaseError, match="no database connection became free"):
                stack.enter_context(database.get_connection(profile))
        wait_until(lambda: len(read_sessions(database)) == n_kept)

    def test_the_batch_profile_keeps_one_connection_and_has_no_limit_of_its_own(self, database: Database) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(database.get_connection()).execute(sa.text("SELECT 1"))
            assert len(read_sessions(database)) == 20
        wait_until(lambda: len(read_sessions(database)) == 1)
        kept = read_sessions(database)
        for _ in range(3):
            with database.get_connection() as connection:
                assert connection.scalar(sa.text("SELECT pg_backend_pid()")) in kept

    @pytest.mark.parametrize("profile", ["batch", "web", "parallel"])
    def test_a_kept_connection_that_broke_is_replaced_unseen(self, database: Database, profile: Profile) -> None:
        with database.get_connection(profile) as connection:
            kept = connection.scalar(sa.text("SELECT pg_backend_pid()"))
        execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (kept,))
        with database.get_connection(profile) as connection:
            assert connection.scalar(sa.text("SELECT pg_backend_pid()")) != kept

    @pytest.mark.parametrize("profile", ["batch", "web", "autocommit"])
    def test_a_forked_process_makes_connections_of_its_own(self, database: Database, profile: Profile) -> None:
        def read_pid() -> int:
            with engine.connect() as connection:
                return int(connection.scalar(sa.text("SELECT pg_backend_pid()")))

        engine = database.get_engine(profile).execution_options(isolation_level="AUTOCOMMIT")
        kept = read_pid()
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            with contextlib.suppress(Exception):
                os.write(writer, str(read_pid()).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as answers:
            assert int(answers.read()) != kept
        assert read_pid() == kept

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: of a process with threads
    def test_a_forked_process_neither_cancels_nor_waits_for_what_its_parent_does(self, database: Database) -> None:
        began, may_end = threading.Event(), threading.Event()

        def hold_lock() -> None:
            with engine_module._active_lock:
                began.set()
                may_end.wait(60)

        with database.get_connection() as connection:
            holder = threading.Thread(target=hold_lock)
            holder.start()
            began.wait(60)
            if (child := os.fork()) == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                time.sleep(0.5)  # until its parent's statement has begun
                database.cancel()
                with contextlib.suppress(Exception), database.get_connection():
                    time.sleep(1)  # until that would be cancelled
                    os._exit(0)
                os._exit(1)
            may_end.set()
            connection.execute(sa.text("SELECT pg_sleep(2)"))
            assert os.waitpid(child, 0)[1] == 0
        holder.join()

    def test_a_process_has_one_engine_a_url_and_profile(self, database: Database) -> None:
        assert database.get_engine("web") is get_engine(database.url, "web")
        assert len({database.get_engine(profile) for profile in ("batch", "web", "parallel")}) == 3

    def test_threads_that_ask_first_at_once_get_the_same_engine(self) -> None:
        barrier, engines = threading.Barrier(8), []

        def ask(url: str) -> None:
            barrier.wait()
            engines.append(get_engine(url, "web"))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for attempt in range(5):
                engines.clear()
                url = f"postgresql://nobody@127.0.0.1:1/race_{attempt}"
                threads = [threading.Thread(target=ask, args=(url,)) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert len(set(engines)) == 1
        finally:
            sys.setswitchinterval(interval)

    def test_a_block_is_committed_at_its_end_and_rolled_back_on_an_error(self, database: Database) -> None:
        with database.get_connection() as connection:
            connection.execute(sa.text("CREATE TABLE kept (n integer)"))
            connection.execute(sa.text("INSERT INTO kept VALUES (1)"))
        with pytest.raises(ZeroDivisionError), database.get_connection() as connection:
            connection.execute(sa.text("INSERT INTO kept VALUES (2)"))
            raise ZeroDivisionError
        assert execute(database.adbc_uri, "SELECT n FROM kept") == [(1,)]

    def test_the_autocommit_profile_commits_each_statement_and_its_connections_stay_so(
        self, database: Database
    ) -> None:
        execute(database.adbc_uri, "CREATE TABLE kept (n integer)")
        with database.get_engine("autocommit").connect() as connection:
            kept = connection.connection.driver_connection
            connection.execute(sa.text("INSERT INTO kept VALUES (1)"))
        assert execute(database.adbc_uri, "SELECT n FROM kept") == [(1,)]
        assert kept is not None
        assert kept.autocommit, "changing back and forth costs two round trips each time"

    def test_an_autocommit_connection_commits_each_statement(self, database: Database) -> None:
        with pytest.raises(ZeroDivisionError), database.get_autocommit() as connection:
            connection.execute(sa.text("CREATE TABLE kept (n integer)"))
            connection.execute(sa.text("INSERT INTO kept VALUES (1)"))
            connection.execute(sa.text("VACUUM kept"))
            raise ZeroDivisionError
        assert execute(database.adbc_uri, "SELECT n FROM kept") == [(1,)]


class TestTransactions:
    @pytest.mark.parametrize("profile", ["batch", "web", "parallel"])
    @pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
    def test_each_is_read_committed_whatever_the_roles_default(
        self, database: Database, profile: Profile, isolation: str
    ) -> None:
        with as_role(database) as seen:
            set_for_role(database, seen, default_transaction_isolation=isolation)
            for _ in range(2):
                assert show(seen, profile, "transaction_isolation") == "read committed"

    @pytest.mark.parametrize(
        ("profile", "lasting"),
        [("batch", ["0", "0", "0", "1min"]), ("parallel", ["0", "0", "0", "1min"]), ("web", ["7s", "8s", "9s", "6s"])],
    )
    def test_those_for_long_jobs_have_timeouts_of_their_own_and_those_for_queries_the_roles(
        self, database: Database, profile: Profile, lasting: list[str]
    ) -> None:
        with as_role(database) as seen:
            set_for_role(
                database,
                seen,
                statement_timeout="7s",
                idle_in_transaction_session_timeout="8s",
                transaction_timeout="9s",
                lock_timeout="6s",
            )
            names = "statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout", "lock_timeout"
            for _ in range(2):
                assert [show(seen, profile, name) for name in names] == lasting

    def test_a_long_one_outlasts_the_roles_timeouts(self, database: Database) -> None:
        with as_role(database) as seen:
            timeouts = "statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"
            set_for_role(database, seen, **dict.fromkeys(timeouts, "200ms"))
            with seen.get_connection() as connection:
                connection.execute(sa.text("SELECT pg_sleep(0.4)"))
                time.sleep(0.4)
                connection.execute(sa.text("SELECT 1"))

    def test_what_it_sets_ends_with_it(self, database: Database) -> None:
        with database.get_engine("parallel").connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            connection.rollback()
            raw = connection.connection.driver_connection
            assert raw is not None
            raw.autocommit = True
            with raw.cursor() as cursor:
                cursor.execute("SHOW lock_timeout")
                assert cursor.fetchone() == ("0",)
            raw.autocommit = False

    def test_a_statement_by_itself_is_read_committed_too(self, database: Database) -> None:
        with as_role(database) as seen:
            set_for_role(database, seen, default_transaction_isolation="serializable")
            engine = seen.get_engine("web").execution_options(isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                assert connection.scalar(atomic("SHOW transaction_isolation")) == "read committed"
                assert connection.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
                raw = connection.connection.driver_connection
                assert raw is not None
                assert raw.notices == []


class TestRefusals:
    def test_a_port_where_no_server_listens_is_named_with_what_to_check(self) -> None:
        error = str(error_of(f"postgresql://ann:hunter2@127.0.0.1:{free_port()}/songs"))
        assert "Connection refused" in error
        assert "is it running, is the address in POSTGRES_URL right" in error

    def test_a_socket_folder_without_a_server_is_named_with_what_to_check(self) -> None:
        error = str(error_of("postgresql://ann@/songs?host=/nowhere/at/all"))
        assert "/nowhere/at/all" in error
        assert "is it running, is the address in POSTGRES_URL right" in error

    def test_a_host_whose_name_does_not_resolve_is_named(self) -> None:
        error = str(error_of("postgresql://ann@no-such-host.invalid/songs"))
        assert "no-such-host.invalid" in error
        assert "the host's name does not resolve: correct POSTGRES_URL" in error

    def test_a_database_that_does_not_exist_is_named(self, server_url: str) -> None:
        error = str(error_of(with_parts(server_url, database="nowhere")))
        assert '"nowhere"' in error
        assert "there is no such database: create it, or correct POSTGRES_URL" in error

    def test_a_user_that_does_not_exist_is_named(self, server_url: str) -> None:
        error = str(error_of(with_parts(server_url, username="nobody_here")))
        assert '"nobody_here"' in error
        assert "the server refuses this user from here" in error

    def test_the_right_password_connects(self, tcp_server: TcpServer) -> None:
        with get_connection(tcp_server.url("guarded", PASSWORD)) as connection:
            assert connection.scalar(sa.text("SELECT current_user")) == "guarded"

    @pytest.mark.parametrize("password", ["hunter2", None])
    def test_a_wrong_or_missing_password_says_so(self, tcp_server: TcpServer, password: str | None) -> None:
        assert "the password is wrong: correct POSTGRES_URL" in str(error_of(tcp_server.url("guarded", password)))

    def test_a_role_that_may_not_create_is_told_about_the_right(self, bare_url: str) -> None:
        with as_role(Database(bare_url)) as seen, pytest.raises(DatabaseError, match="CREATE EXTENSION vector"):
            ensure_schema(seen)
        execute(bare_url, "CREATE EXTENSION vector")
        with as_role(Database(bare_url)) as seen, pytest.raises(DatabaseError) as caught:
            ensure_schema(seen)
        assert "permission denied for database" in str(caught.value)
        assert "this user lacks a right: let the owner grant it" in str(caught.value)

    def test_a_statement_that_the_roles_timeout_ends_says_so(self, database: Database) -> None:
        with as_role(database) as seen:
            set_for_role(database, seen, statement_timeout="400ms")
            started = time.monotonic()
            with pytest.raises(DatabaseError) as caught, seen.get_connection("web") as connection:
                connection.execute(sa.text("SELECT pg_sleep(20)"))
            seen.get_engine("web").dispose()
        assert time.monotonic() - started < 10
        assert "canceling statement due to statement timeout" in str(caught.value)
        assert "statement_timeout; start the same command again" in str(caught.value)

    def test_a_role_with_no_connection_left_is_told_so(self, server_url: str) -> None:
        with login_role(server_url, "CONNECTION LIMIT 1") as role:
            url = with_parts(server_url, username=role)
            with get_connection(url):
                error = str(error_of(url))
        assert "too many connections for role" in error
        assert "ALTER ROLE or ALTER DATABASE … CONNECTION LIMIT" in error

    def test_a_connection_that_the_server_ends_says_how_to_go_on(self, database: Database) -> None:
        with pytest.raises(DatabaseError) as caught, database.get_connection() as connection:
            pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,))
            connection.execute(sa.text("SELECT 1"))
        assert "terminating connection due to administrator command" in str(caught.value)
        assert "the server was shut down; start the same command again" in str(caught.value)

    def test_a_copy_whose_connection_the_server_ends_says_why(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE TABLE rows (n integer)")

        def rows() -> Iterator[bytes]:
            execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,))
            yield b"1\n"

        with (
            pytest.raises(DatabaseError, match="terminating connection due to administrator command"),
            database.get_connection() as connection,
            raw_cursor(connection) as cursor,
        ):
            pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            cursor.copy_expert("COPY rows FROM STDIN", Stream(rows()))

    def test_an_error_past_sqlalchemy_is_turned_too_and_is_one_line(self, database: Database) -> None:
        with (
            pytest.raises(DatabaseError) as caught,
            database.get_connection() as connection,
            raw_cursor(connection) as cursor,
        ):
            cursor.execute("SELECT no_such_column")
        assert 'column "no_such_column" does not exist' in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_what_is_no_error_of_the_database_passes_unchanged(self, database: Database) -> None:
        with pytest.raises(KeyError, match="mine"), database.get_connection():
            raise KeyError("mine")


class TestSecrets:
    @pytest.mark.parametrize("where", ["wrong password", "no database", "no server"])
    def test_the_password_is_in_no_error_repr_or_description(self, tcp_server: TcpServer, where: str) -> None:
        url = {
            "wrong password": tcp_server.url("guarded", f"{PASSWORD}-wrong"),
            "no database": tcp_server.url("guarded", PASSWORD, "nowhere"),
            "no server": f"postgresql://guarded:{quote(PASSWORD)}@127.0.0.1:{free_port()}/songs",
        }[where]
        error = error_of(url)
        shown = "".join(traceback.format_exception(error)) + repr(error)
        shown += repr(Database(url)) + str(Database(url)) + Database(url).describe() + repr(get_engine(url))
        assert PASSWORD not in shown
        assert quote(PASSWORD) not in shown
        assert "guarded" not in Database(url).describe()


class TestKeepalive:
    @pytest.mark.parametrize("profile", ["batch", "web", "parallel"])
    def test_the_socket_of_every_profile_is_kept_alive(self, tcp_server: TcpServer, profile: Profile) -> None:
        database = Database(tcp_server.url())
        with database.get_connection(profile) as connection:
            raw = connection.connection.driver_connection
            parameters = raw.info.dsn_parameters
            with socket.socket(fileno=socket.dup(raw.fileno())) as peer:
                assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if hasattr(socket, "TCP_KEEPIDLE"):
                    assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                    assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
                    assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 6
        assert parameters["connect_timeout"] == "10"
        dispose(database.url)


class TestCancel:
    @pytest.mark.parametrize("handed_out", ["get_connection", "get_autocommit"])
    def test_a_running_statement_of_another_thread_ends_at_once(self, database: Database, handed_out: str) -> None:
        ends: list[tuple[float, BaseException]] = []

        def sleep() -> None:
            try:
                with getattr(database, handed_out)() as connection:
                    connection.execute(sa.text("SELECT pg_sleep(60)"))
            except DatabaseError as error:
                ends.append((time.monotonic(), error))

        thread = threading.Thread(target=sleep, daemon=True)
        thread.start()
        wait_until(lambda: sleeping(database))
        started = time.monotonic()
        database.cancel()
        thread.join(timeout=50)
        assert ends[0][0] - started < 20, "the statement takes 60 s"
        assert "the statement was cancelled" in str(ends[0][1])

    def test_all_connections_handed_out_are_reached(self, database: Database) -> None:
        ended: list[Profile] = []

        def sleep(profile: Profile) -> None:
            with contextlib.suppress(DatabaseError), database.get_connection(profile) as connection:
                connection.execute(sa.text("SELECT pg_sleep(60)"))
            ended.append(profile)

        threads = [threading.Thread(target=sleep, args=(each,), daemon=True) for each in ("batch", "web", "parallel")]
        for thread in threads:
            thread.start()
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        wait_until(lambda: execute(database.adbc_uri, count) == [(3,)])
        database.cancel()
        for thread in threads:
            thread.join(timeout=50)
        assert sorted(ended) == ["batch", "parallel", "web"]

    @pytest.mark.parametrize(
        ("handed_out", "statement", "waits"),
        [
            ("get_connection", "SELECT * FROM rows WHERE n = 1 FOR UPDATE", "Lock"),
            ("get_connection", "SELECT pg_advisory_xact_lock(1)", "Lock"),
            ("get_autocommit", "CREATE INDEX CONCURRENTLY ON rows (n)", "Lock"),
            ("get_connection", "COPY (SELECT pg_sleep(60)) TO STDOUT", "Timeout"),
        ],
    )
    def test_whatever_a_statement_waits_for_it_ends(
        self, database: Database, handed_out: str, statement: str, waits: str
    ) -> None:
        execute(database.adbc_uri, "CREATE TABLE rows (n integer); INSERT INTO rows VALUES (1)")
        errors: list[DatabaseError] = []

        def run() -> None:
            with (
                pytest.raises(DatabaseError) as caught,
                getattr(database, handed_out)() as connection,
                raw_cursor(connection) as cursor,
            ):
                cursor.copy_expert(statement, io.BytesIO()) if "COPY" in statement else cursor.execute(statement)
            errors.append(caught.value)

        with database.get_connection("web") as holder:
            holder.execute(sa.text("UPDATE rows SET n = 1"))
            holder.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            waiting = """
                SELECT count(*) FROM pg_stat_activity
                WHERE datname = current_database() AND state = 'active' AND wait_event_type = %s
            """
            wait_until(lambda: execute(database.adbc_uri, waiting, (waits,)) == [(1,)])
            database.cancel()
            thread.join(timeout=50)
        [error] = errors
        assert "canceling statement due to user request" in str(error)

    def test_a_load_that_goes_on_sending_ends(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE TABLE rows (n integer)")

        def rows() -> Iterator[bytes]:
            yield b"1\n"
            database.cancel()
            while cancelling():
                yield b"1\n" * 1000

        with (
            pytest.raises(DatabaseError, match="the statement was cancelled"),
            database.get_connection() as connection,
            raw_cursor(connection) as cursor,
        ):
            cursor.copy_expert("COPY rows FROM STDIN", Stream(rows()))

    def test_nobody_waits_for_a_host_that_does_not_answer(self, database: Database) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            direct_url = f"postgresql://ann@127.0.0.1:{silent.getsockname()[1]}/songs"
            seen = Database(database.url, direct_url=direct_url)
            with seen.get_connection():
                seen.cancel()
                asked, _ = silent.accept()
                with asked:
                    assert asked.recv(100)
                    asked.settimeout(0.2)
                    with pytest.raises(TimeoutError):
                        asked.recv(1)

    def test_a_host_that_is_gone_harms_nothing(self, database: Database) -> None:
        seen = Database(database.url, direct_url=f"postgresql://ann@127.0.0.1:{free_port()}/songs")
        with seen.get_connection() as connection:
            seen.cancel()
            wait_until(lambda: not cancelling())
            assert connection.scalar(sa.text("SELECT 1")) == 1

    def test_what_began_later_in_the_same_process_of_the_server_is_spared(self, database: Database) -> None:
        """A pooler may have given it to another client meanwhile."""
        ended = threading.Event()
        begun: list[Backend] = []

        def sleep() -> None:
            with contextlib.suppress(DatabaseError), database.get_connection() as connection:
                begun.append(connection.info["backend"])
                connection.execute(sa.text("SELECT pg_sleep(60)"))
            ended.set()

        threading.Thread(target=sleep, daemon=True).start()
        wait_until(lambda: sleeping(database))
        [(pid, start)] = begun
        cancel_statements(database.url, [(pid, start - timedelta(microseconds=1))])
        assert not ended.wait(0.3)
        cancel_statements(database.url, [(pid, start)])
        assert ended.wait(50)

    def test_where_nothing_runs_nothing_is_harmed(self, database: Database) -> None:
        def cancel() -> None:
            database.cancel()
            wait_until(lambda: not cancelling())

        cancel()
        with database.get_connection("web") as connection:
            cancel()
            assert connection.scalar(sa.text("SELECT 1")) == 1
        cancel()
        with database.get_connection("web") as connection:
            assert connection.scalar(sa.text("SELECT 2")) == 2
