"""Who may ask, by which name, and how often; and the headers of every response. Every request passes here first.

When to add here: another reason to refuse a request unread. Keep out: what a request means (`answers`).
"""

import asyncio
import hmac
import ipaddress
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from songvec_assets.errors import ServeError
from songvec_assets.serve.answers import answer_error

log = logging.getLogger(__name__)

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
UNCOUNTED = frozenset({"/metrics"})
"""They need the token, and are answered however many searches there are: that is when somebody looks."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_MAX_CLIENTS = 10_000
_BURST_S = 10.0


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        hosts: names besides loopback's by which requests may address it.
        token: that requests must bring; None: none.
        requests_per_minute: from one address.
        n_at_once: searches at once, those that wait included.
    """

    hosts: frozenset[str] = frozenset()
    token: str | None = None
    requests_per_minute: int = 1200
    n_at_once: int = 64


class Guard:
    """Refuses what is not allowed before it reaches the application.

    Args:
        app: the application.
        limits: what is allowed.
        open_paths: that need no token, and do not count in the rate.
        count_error: called with the code of each refusal.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, open_paths: Collection[str], count_error: Callable[[str], None]
    ) -> None:
        self.app = app
        self._limits = limits
        self._open_paths = open_paths
        self._count_error = count_error
        self._hosts = LOOPBACK_NAMES | {name.lower() for name in limits.hosts}
        self._rates = Rates(limits.requests_per_minute)
        self._n_now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        guarded = path not in self._open_paths
        counted = guarded and path not in UNCOUNTED
        try:
            self._check(scope, guarded, counted)
        except ServeError as error:
            self._count_error(error.code)
            wait_s = {"Retry-After": str(self._rates.wait_s)} if error.code == "serve.rate" else {}
            await answer_error(error, **wait_s)(scope, receive, send_with_headers)
            return
        self._n_now += counted
        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            # the server ends before this search does
            ending = ServeError("the server is ending: try again later", "serve.busy")
            await answer_error(ending)(scope, receive, send_with_headers)
        except Exception:
            # answered already; without the URL: what people search for is nobody's business
            log.exception("a request failed unexpectedly")
        finally:
            self._n_now -= counted

    def _check(self, scope: Scope, guarded: bool, counted: bool) -> None:
        headers = Headers(scope=scope)
        name = _read_host(headers.get("host", ""))
        if name not in self._hosts:
            raise ServeError(
                f"expected one of this server's names as Host, got {name[:100]!r}: if it is one, list it in "
                "SONGVEC_SERVE_HOSTS",
                "serve.host",
            )
        if scope["method"] not in ("GET", "HEAD"):
            raise ServeError(f"expected GET, got {scope['method'][:20]!r}", "serve.method")
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            raise ServeError("expected a request without a body: give parameters in the URL", "serve.body")
        if not guarded:
            return
        # another site cannot read the answer, but could let a browser pay for queries. Browsers say who asks
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ServeError(
                "expected a request of this page or a program, got one of another site", "serve.cross-site"
            )
        if not is_authorized(headers, self._limits.token):
            raise ServeError("expected the server's token: `Authorization: Bearer …`", "serve.unauthorized")
        if not counted:
            return
        if not self._rates.take(_read_client(scope)):
            raise ServeError(
                f"expected up to {self._limits.requests_per_minute} searches per minute from one address: wait, or "
                "raise SONGVEC_SERVE_REQUESTS_PER_MINUTE",
                "serve.rate",
            )
        if self._n_now >= self._limits.n_at_once:
            raise ServeError(f"{self._n_now} searches are running: try again in a second", "serve.busy")


def is_authorized(headers: Headers, token: str | None) -> bool:
    """Whether a request brings the token, or needs none; takes as long for any wrong one."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return token is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()))


def _read_host(host: str) -> str:
    """The name of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _read_client(scope: Scope) -> str:
    """Who is counted: an address; of IPv6 its network, in which one client has as many as it likes."""
    host = str((scope.get("client") or ("",))[0])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


class Rates:
    """A bucket of requests per client, as the time at which it will be full: an entry is dropped once it is."""

    def __init__(self, requests_per_minute: int) -> None:
        self._every_s = 60 / requests_per_minute
        self._depth_s = max(_BURST_S, self._every_s)
        self._full_at: dict[str, float] = {}

    @property
    def wait_s(self) -> int:
        """Seconds after which a refused client has a request again."""
        return math.ceil(self._every_s)

    def take(self, client: str) -> bool:
        """Whether a client may send a request now, which then counts."""
        now = time.monotonic()
        full_at = max(now, self._full_at.pop(client, now)) + self._every_s
        is_free = full_at <= now + self._depth_s
        # the last one to ask is the last one here: of more than can be kept, the first ones are forgotten
        self._full_at[client] = full_at if is_free else full_at - self._every_s
        if len(self._full_at) > _MAX_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
        return is_free
