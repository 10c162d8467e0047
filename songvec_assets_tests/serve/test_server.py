"""The process: slow and malformed clients, addresses and tokens, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from songvec_assets.errors import ServeError
from songvec_assets.pipeline import Pipeline
from songvec_assets.serve import server
from songvec_assets.serve.guard import Limits
from songvec_assets.settings import Settings
from songvec_assets_tests.administration import free_port
from songvec_assets_tests.serve.conftest import running_server


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    content = b""
    try:
        while part := connection.recv(1 << 16):
            content += part
    except ConnectionResetError:
        pass
    return content


@pytest.fixture
def hasty(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that waits for half a second."""
    monkeypatch.setattr(server, "HEADER_S", 0.5)
    monkeypatch.setattr(server, "WRITE_S", 1.0)
    with running_server(pipeline) as address:
        yield address


class TestSlowClients:
    def test_that_drip_headers_are_cut_off(self, hasty: str) -> None:
        started = time.monotonic()
        with connected(hasty) as connection:
            connection.sendall(b"GET /similar/7 HTTP/1.1\r\nHost: localhost\r\n")
            with pytest.raises(ConnectionError):
                while time.monotonic() < started + 20:
                    connection.sendall(b"X-Slow: 1\r\n")
                    time.sleep(0.1)
        assert time.monotonic() - started < 9, "it is cut off earlier than by default, after 10 s"

    def test_that_say_nothing_are_cut_off(self, hasty: str) -> None:
        with connected(hasty) as connection:
            assert read_all(connection) == b""

    def test_that_stay_for_another_request_are_cut_off_after_it(self, hasty: str) -> None:
        with connected(hasty) as connection:
            connection.sendall(b"GET /similar/7 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 200 OK")

    def test_that_do_not_take_their_answers_are_cut_off(self, hasty: str) -> None:
        with connected(hasty) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            with pytest.raises(ConnectionError):
                while True:
                    connection.sendall(request * 1000)

    def test_that_wait_for_a_search_are_not(
        self, hasty: str, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = type(pipeline).find
        monkeypatch.setattr(type(pipeline), "find", lambda *given, **named: time.sleep(1.2) or find(*given, **named))
        assert httpx2.get(f"{hasty}/similar/7", timeout=30).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /search?q=" + b"x" * 70_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"x" * 70_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /search\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_as_json(address: str, request_bytes: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(request_bytes)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "serve.request"


def test_the_longest_query_fits(address: str) -> None:
    found = httpx2.get(f"{address}/search", params={"q": "𝄞" * 4000, "mode": "text"}, timeout=30)
    assert (found.status_code, found.json()["hits"]) == (200, [])


class TestAddresses:
    def test_a_port_in_use_is_named(self) -> None:
        with (
            server.listen("127.0.0.1", 0) as taken,
            pytest.raises(ServeError, match="Choose another --port") as refused,
        ):
            server.listen("127.0.0.1", taken.getsockname()[1])
        assert refused.value.code == "serve.port"
        with pytest.raises(ServeError, match=r"nowhere\.invalid"):
            server.listen("nowhere.invalid", 0)

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
    def test_loopback_needs_no_token(self, host: str) -> None:
        limits = server.make_limits(Settings(serve_hosts="songs.example, music"), host)
        assert limits == Limits(frozenset({"songs.example", "music", host}))

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
    def test_others_need_one(self, host: str, tmp_path: Path) -> None:
        with pytest.raises(ServeError, match="expected a token") as refused:
            server.make_limits(Settings(), host)
        assert refused.value.code == "serve.token"
        (tmp_path / "token").write_text("0123456789abcdef\n")
        limits = server.make_limits(Settings(serve_token_file=str(tmp_path / "token")), host)
        assert (limits.token, limits.hosts & {"0.0.0.0", "::"}) == ("0123456789abcdef", frozenset())

    @pytest.mark.parametrize("content", [None, b"", b"short", b"two words of token", b"caf\xc3\xa9 0123456789abcdef"])
    def test_a_token_that_cannot_be_used_is_refused(self, content: bytes | None, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "token").write_bytes(content)
        with pytest.raises(ServeError) as refused:
            server.make_limits(Settings(serve_token_file=str(tmp_path / "token")), "127.0.0.1")
        assert refused.value.code == "serve.token"
        assert "short" not in str(refused.value)


CODE = """
import sys, time
from songvec_assets.pipeline import Pipeline
from songvec_assets.serve import server
from songvec_assets.settings import Settings
class Slow(Pipeline):
    def ask(self, *given, **options):
        print("asked", flush=True)
        time.sleep(30)
with server.listen("127.0.0.1", int(sys.argv[1])) as listener:
    print("listening", flush=True)
    server.serve(Slow(Settings()), listener, server.make_limits(Settings(), "127.0.0.1"))
print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("is_searching", [False, True])
def test_it_ends_in_time_whatever_runs(number: signal.Signals, is_searching: bool, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", CODE, str(port)]
    process: Any
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "listening\n"
            assert httpx2.get(f"http://127.0.0.1:{port}/", timeout=60).status_code == 200
            with socket.create_connection(("127.0.0.1", port)) as connection:
                if is_searching:
                    connection.sendall(b"GET /similar/7 HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    assert process.stdout.readline() == "asked\n"
                started = time.monotonic()
                process.send_signal(number)
                _, failed = process.communicate(timeout=30)
                assert time.monotonic() - started < 8, "Docker kills what takes 10 s, and the search takes 30 s"
                assert process.returncode in (0, -number), failed
                assert "Traceback" not in failed
                assert read_all(connection).startswith(b"HTTP/1.1 503 " if is_searching else b"")
        finally:
            process.kill()
