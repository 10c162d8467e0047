"""The process that listens: its address, slow clients, and how it ends.

When to add here: another property of the socket or of a connection. Keep out: what requests mean (`app`).
"""

import asyncio
import contextlib
import ipaddress
import json
import socket
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from songvec_assets.errors import ServeError
from songvec_assets.searches import Searches
from songvec_assets.serve.app import create_app
from songvec_assets.serve.guard import LOOPBACK_NAMES, Limits
from songvec_assets.settings import Settings, split_names

MAX_HEADER_BYTES = 64 << 10
"""Of a request's line and headers: 4,000 characters take up to 48 kB as they stand in a URL."""
MAX_CONNECTIONS = 500
HEADER_S, WRITE_S, GRACE_S = 10, 60, 3
"""How long a client may take to send a request, and to take an answer; how long searches may go on once the server is
asked to end."""
MIN_TOKEN_CHARS = 16


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit to how long a client may take: uvicorn's has none while a request arrives."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(HEADER_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Expect the next request, once the client has taken the answer."""
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        is_untaken = self.transport.get_write_buffer_size() > 0
        is_answering = self.cycle is not None and not self.cycle.response_complete
        limit_s = WRITE_S if is_untaken else HEADER_S
        # an answer that waits for the client to take an earlier one does not count as work
        left_s = HEADER_S if is_answering and not is_untaken else self._waits_since + limit_s - self.loop.time()
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._look)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, as JSON like all other errors."""
        words = f"expected an HTTP/1.1 request with up to {MAX_HEADER_BYTES >> 10} kB of line and headers: {msg}"
        body = json.dumps({"error": {"code": ServeError.code, "message": words}}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        # where an answer is under way, the connection just ends
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def make_limits(settings: Settings, host: str) -> Limits:
    """What the settings allow at an address.

    Raises:
        ServeError: it can be reached from elsewhere without a token, or the token cannot be used.
    """
    token = _read_token(settings.serve_token_file) if settings.serve_token_file else None
    if token is None and not _is_loopback(host):
        raise ServeError(
            f"expected a token for {host}, which others can reach, got none: write one of {MIN_TOKEN_CHARS} characters "
            "or more into a file (`openssl rand -hex 32`), and name the file with --token-file or "
            "SONGVEC_SERVE_TOKEN_FILE",
            "serve.token",
        )
    # what stands for all addresses is the name of none
    names = {*split_names(settings.serve_hosts), host} - {"0.0.0.0", "::"}
    return Limits(frozenset(names), token, settings.serve_requests_per_minute)


def _read_token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"the token cannot be read: {error}", "serve.token") from error
    if len(token) < MIN_TOKEN_CHARS or not token.isprintable() or " " in token:
        raise ServeError(
            f"expected one token of at least {MIN_TOKEN_CHARS} characters in {path}, got {len(token)} characters: "
            "`openssl rand -hex 32` makes one",
            "serve.token",
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK_NAMES


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ServeError: the port is in use, or the address is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --port or --host, or end "
            "what listens there",
            "serve.port",
        ) from error


def make_server(songs: Searches, limits: Limits) -> uvicorn.Server:
    """The server, to be run with a listener; it closes `songs` at its end."""
    config = uvicorn.Config(
        create_app(songs, limits),
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        # uvicorn's own lines would hold the query
        log_config=None,
        log_level="error",
        access_log=False,
        # else a client could choose the address that it is counted by
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=HEADER_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def serve(songs: Searches, listener: socket.socket, limits: Limits) -> None:
    """Answer requests until SIGINT or SIGTERM; searches under way get GRACE_S to end."""
    # uvicorn raises the signal again at its end, as if nothing had handled it
    with contextlib.suppress(KeyboardInterrupt):
        make_server(songs, limits).run(sockets=[listener])
