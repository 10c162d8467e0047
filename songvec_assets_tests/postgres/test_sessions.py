"""Sessions and their sockets: who has one, what is set in it, and how much it sends ahead."""

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.sessions import widen_send_buffer
from songvec_assets_tests.administration import as_role, dispose, execute, free_port, set_for_role
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.postgres.conftest import TcpServer


class TestSessions:
    def test_a_server_reached_directly_has_them(self, database: Database) -> None:
        assert database.has_sessions

    def test_a_server_that_is_gone_is_an_error_of_ours(self) -> None:
        with pytest.raises(DatabaseError, match="is it running"):
            _ = Database(f"postgresql://ann@127.0.0.1:{free_port()}/songs").has_sessions

    def test_one_has_none_of_the_roles_timeouts_and_what_was_asked_for(self, database: Database) -> None:
        with as_role(database) as seen:
            timeouts = {
                "statement_timeout": "7s",
                "lock_timeout": "7s",
                "idle_in_transaction_session_timeout": "7s",
                "idle_session_timeout": "7s",
                "transaction_timeout": "7s",
            }
            set_for_role(database, seen, default_transaction_isolation="serializable", **timeouts)
            with seen.get_autocommit(maintenance_work_mem="77MB") as connection:
                for name in timeouts:
                    assert connection.scalar(sa.text(f"SHOW {name}")) == "0"
                assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"
                assert connection.scalar(sa.text("SHOW maintenance_work_mem")) == "77MB"
            with seen.get_autocommit(statement_timeout="8s", idle_session_timeout="9s") as connection:
                assert connection.scalar(sa.text("SHOW statement_timeout")) == "8s"
                assert connection.scalar(sa.text("SHOW idle_session_timeout")) == "9s"

    @pytest.mark.skipif(sys.platform == "win32", reason="the server does not notice killed clients there")
    def test_the_server_looks_whether_the_client_is_still_there(self, database: Database) -> None:
        with database.get_autocommit() as connection:
            assert connection.scalar(sa.text("SHOW client_connection_check_interval")) == "10s"

    def test_a_setting_that_the_server_does_not_know_or_take_is_refused(self, database: Database) -> None:
        for settings in ({"no_such_setting": "1"}, {"maintenance_work_mem": "much"}):
            with pytest.raises(DatabaseError, match=next(iter(settings))), database.get_autocommit(**settings):
                pass

    def test_an_error_in_the_block_passes_even_where_the_connection_broke(self, database: Database) -> None:
        with pytest.raises(KeyError, match="mine"), database.get_autocommit() as connection:
            pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,))
            raise KeyError("mine")


class TestSendBuffer:
    @staticmethod
    def widen(database: Database) -> list[int]:
        """What the socket holds before and after."""
        with database.get_connection() as connection:
            raw = connection.connection.driver_connection
            with socket.socket(fileno=socket.dup(raw.fileno())) as end:
                sizes = [end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)]
                widen_send_buffer(raw)
                return [*sizes, end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)]

    def test_a_unix_socket_holds_more_than_before(self, database: Database) -> None:
        before, after = self.widen(database)
        assert after > before

    def test_a_tcp_socket_stays_as_the_kernel_tunes_it(self, tcp_server: TcpServer) -> None:
        database = Database(tcp_server.url())
        before, after = self.widen(database)
        assert after == before
        dispose(database.url)


class TestHasSessions:
    def test_a_pooler_in_transaction_mode_has_none(self, pooled: Database) -> None:
        assert not pooled.has_sessions

    @pytest.mark.parametrize("pool_size", [1, 2, 3, 4])
    @pytest.mark.parametrize("in_turn", [0, 1], ids=["the last used first", "in turn"])
    def test_whatever_its_size_and_order(self, database: Database, pool_size: int, in_turn: int) -> None:
        with running_pgbouncer(database.url, pool_size, server_round_robin=in_turn) as url:
            with ThreadPoolExecutor() as pool:  # so that all its sessions are there
                list(pool.map(lambda _: execute(url, "SELECT pg_sleep(0.05)"), range(pool_size)))
            assert not Database(url).has_sessions

    def test_a_pooler_that_others_use_has_none_either(self, database: Database) -> None:
        with running_pgbouncer(database.url, pool_size=3) as url:
            ended = threading.Event()

            def work() -> None:
                while not ended.is_set():
                    execute(url, "SELECT 1")

            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                assert not Database(url).has_sessions
            finally:
                ended.set()
                for thread in threads:
                    thread.join()

    def test_a_pooler_in_session_mode_has_them(self, database: Database) -> None:
        with running_pgbouncer(database.url, pool_mode="session") as url:
            assert Database(url).has_sessions

    def test_past_a_pooler_there_are_some(self, database: Database, pooled: Database) -> None:
        assert Database(pooled.url, direct_url=database.url).has_sessions
        assert not Database(pooled.url, direct_url=pooled.url).has_sessions
