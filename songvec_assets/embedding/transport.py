"""One try over HTTP: sends a request's bytes, and returns a batch of vectors or a description of the failure.

When to add here: another way in which a connection fails. Keep out: retries (`client`, `contact`), and what an answer's
status and body mean (`answers`).
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from functools import cached_property
from typing import Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

from songvec_assets.embedding import answers
from songvec_assets.embedding.embedder import Endpoint
from songvec_assets.embedding.wire import EmbeddingBatch, MalformedResponseError, decode_response

MAX_TEXTS_IN_LOOP = 512
"""Base64 vectors of 2,000 values for this number of texts are decoded in 4 ms (2 cores, 2026-11): a thread would block
the event loop for longer, by the interpreter's lock. Larger answers, and floats, are decoded in a thread."""
CONNECT_TIMEOUT_S, FIRST_CONNECT_TIMEOUT_S = 30.0, 4.0
"""Time limit of connecting; shorter before the first good answer, when the URL may be wrong."""
FIRST_PATIENCE_S, FIRST_PATIENCE_CLOSED_S = 3.0, 12.0
"""How long failures that a wrong URL could cause are retried before the first good answer; longer if the port is
closed, since the server may be starting."""
TIMEOUT = "time-out"
_CHECK_REDIRECT_S = 5.0
_KEEPALIVE_S = 5.0
"""Seconds for which an idle connection is used again; servers and routers close theirs after 5 s and more."""


@dataclass(frozen=True)
class Dialect:
    """What the server was found to understand.

    Attributes:
        encoding_format: base64, or float if base64 is refused.
        sends_dimensions: whether `dimensions` may be sent.
        n_values: values per vector as received, before truncation; 0: not known yet.
    """

    encoding_format: Literal["base64", "float"]
    sends_dimensions: bool
    n_values: int = 0


@dataclass(frozen=True)
class Request:
    """An encoded request, the same for each try.

    Attributes:
        body: JSON.
        n_texts: number of texts.
        n_bytes: of the texts, in UTF-8.
        n_tokens: estimated.
    """

    body: bytes
    n_texts: int
    n_bytes: int
    n_tokens: int


@dataclass(frozen=True)
class Failure:
    """A try without a usable answer.

    Attributes:
        kind: of the failure; equal for equal causes.
        message: for logs and errors.
        status: of the answer; None if there was none.
        retry_after_s: from its Retry-After header.
        sent: whether the request was sent: if not, no server received it.
        may_be_billed: whether the server may have computed it.
        alone: for a time-out: whether nothing else was in flight.
        first_patience_s: how long to retry before the first good answer; None: the usual patience.
        advice: what to do if that time is over.
    """

    kind: str
    message: str
    status: int | None = None
    retry_after_s: float | None = None
    sent: bool = True
    may_be_billed: bool = False
    alone: bool = False
    first_patience_s: float | None = None
    advice: str = ""


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """The connections to one server, and the thread that decodes its large answers.

    By aiohttp itself: OpenAI's client has the same below it, takes 0.7 s to import, and doubles the time per answer.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # one answer at a time: several are no faster, and take more memory
        self._decoder = ThreadPoolExecutor(1, "songvec-decode")

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        """Made by the first request, in its event loop."""
        url = self._endpoint.url
        # the certificates of httpx2: those of the system, or of SSL_CERT_FILE
        context = httpx2.create_ssl_context() if url.startswith("https:") else True
        return aiohttp.ClientSession(
            # the number of connections is that of the requests in flight, which the caller limits
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=context),
            headers={
                "Authorization": f"Bearer {self._endpoint.key or 'none'}",
                "Content-Type": "application/json",
                "User-Agent": "songvec",
            },
            proxy=_find_proxy(url),
        )

    async def close(self) -> None:
        """Close the connections."""
        if "_session" in self.__dict__:
            await self._session.close()
        self._decoder.shutdown(wait=False)

    async def send(
        self, request: Request, dialect: Dialect, timeout_s: float, is_first: bool
    ) -> EmbeddingBatch | Failure:
        """Send a request once and decode the answer.

        Args:
            request: encoded.
            dialect: that it is encoded in.
            timeout_s: for the whole answer.
            is_first: whether there was no good answer yet: the URL may be wrong.

        Raises:
            ProviderError: an answer after which a retry cannot help, or that refuses this one request.
        """
        answer, url, redact = _Answer(0, {}, b""), self._endpoint.url, self._endpoint.redact
        try:
            answer = await self._post(
                request.body, timeout_s, FIRST_CONNECT_TIMEOUT_S if is_first else CONNECT_TIMEOUT_S
            )
            if answer.status >= 300:
                return self._read_status(answer.status, answer.body, answer.headers, is_first)
            return await self._decode(answer.body, request.n_texts, dialect)
        except MalformedResponseError as error:
            if answers.status_of(200, answer.body) != 200:
                return self._read_status(200, answer.body, {}, is_first)
            # an answered request was billed, even if the answer is malformed
            message, first_patience_s, advice = redact(str(error)), FIRST_PATIENCE_S, "correct FIREWORKS_BASE_URL"
            if answers.is_native_answer(answer.body):
                message = f"the server's own API answers there, not the one that is OpenAI's ({answer.body[:80]!r})"
                first_patience_s = 0.0
                if meant_base := answers.compatible_base_of(url):
                    advice = f"set FIREWORKS_BASE_URL={meant_base}"
            return Failure("malformed", message, may_be_billed=True, first_patience_s=first_patience_s, advice=advice)
        except aiohttp.ClientError as error:  # before TimeoutError, which a time-out of connecting is, too
            return _describe_unreached(error, redact(str(error) or type(error).__name__), url)
        except TimeoutError:
            return Failure(TIMEOUT, f"no whole answer within {timeout_s:.0f} s", may_be_billed=True)

    async def _post(self, body: bytes, timeout_s: float, connect_s: float) -> _Answer:
        # `connect` also limits the name look-up
        times = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)
        async with (
            asyncio.timeout(timeout_s),
            self._session.post(
                # a redirect would send the key to another address
                f"{self._endpoint.url.rstrip('/')}/embeddings",
                data=body,
                timeout=times,
                allow_redirects=False,
            ) as response,
        ):
            return _Answer(response.status, response.headers, await response.read())

    async def _decode(self, answer: bytes, n_texts: int, dialect: Dialect) -> EmbeddingBatch:
        dimensions = self._endpoint.dimensions
        # base64 takes 5.3 bytes per value, decimal numbers 10 and more
        as_base64 = len(answer) < n_texts * (6 * dialect.n_values + 200)
        if as_base64 and n_texts <= MAX_TEXTS_IN_LOOP:
            return decode_response(answer, n_texts, dimensions)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoder, decode_response, answer, n_texts, dimensions)

    def _read_status(self, status: int, body: bytes, headers: Mapping[str, str], is_first: bool) -> Failure:
        """The failure that an error status means.

        Raises:
            ProviderError: it ends the run, or refuses this one request.
        """
        url, redact = self._endpoint.url, self._endpoint.redact
        meant = answers.status_of(status, body)
        if meant in answers.REDIRECTS:
            raise answers.refuse_redirect(url, meant, redact(headers.get("location", ""))) from None
        message = answers.describe_answer(meant, redact(body.decode(errors="replace")), status, url)
        if refusal := answers.find_refusal(meant, body, f"{url} {message}", is_first):
            raise refusal from None
        retry_after_s = answers.parse_retry_after(
            headers.get("retry-after", ""), headers.get("date") or formatdate(usegmt=True)
        )
        # LM Studio answers an unknown path with 200 and an error without a status
        is_strange = meant != status < 400 and meant == 500
        first_patience_s = FIRST_PATIENCE_S if is_strange else FIRST_PATIENCE_CLOSED_S if meant < 500 else None
        return Failure(
            f"status {meant}", message, meant, retry_after_s, may_be_billed=meant in answers.MAY_BE_BILLED,
            first_patience_s=None if meant in answers.RETRIED and not is_strange else first_patience_s,
            advice="see what answers at FIREWORKS_BASE_URL",
        )  # fmt: skip


def check_redirect(url: str) -> None:
    """Refuse a URL that redirects, for example from http to https.

    Sends neither key nor text. Ignores servers that do not answer: the first request reports that.

    Raises:
        ProviderError: it redirects; the message has the URL to set.
    """
    try:
        answer = httpx2.get(f"{url.rstrip('/')}/embeddings", timeout=_CHECK_REDIRECT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError):
        return
    if answer.has_redirect_location:
        raise answers.refuse_redirect(url, answer.status_code, answer.headers["location"])


def _describe_unreached(cause: BaseException, message: str, url: str) -> Failure:
    """The failure of a connection that could not be made, or that broke."""
    reason = cause.os_error if isinstance(cause, aiohttp.ClientConnectorError) else cause.__cause__

    def is_a(*types: type[BaseException]) -> bool:
        return isinstance(cause, types) or isinstance(reason, types)

    first_patience_s, sent = FIRST_PATIENCE_S, False
    if is_a(aiohttp.ClientConnectorDNSError, socket.gaierror):
        advice = "the host's name does not resolve: correct FIREWORKS_BASE_URL"
    elif is_a(aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError):
        first_patience_s = 0.0
        advice = (
            "its certificate is not valid for this machine: correct the host in FIREWORKS_BASE_URL, or let the system "
            "trust its authority (SSL_CERT_FILE)"
        )
    elif is_a(aiohttp.ClientConnectorSSLError, ssl.SSLError):
        first_patience_s = 0.0
        advice = "the server there does not speak TLS: FIREWORKS_BASE_URL begins with http://, or its port is another"
    elif is_a(aiohttp.ClientConnectorError):
        first_patience_s = FIRST_PATIENCE_CLOSED_S
        advice = "nothing listens there: start the server, or correct host and port of FIREWORKS_BASE_URL"
    elif is_a(aiohttp.ConnectionTimeoutError):
        advice = "the host does not answer: correct FIREWORKS_BASE_URL, or see to the network"
    elif is_a(aiohttp.ClientResponseError, aiohttp.InvalidURL):
        sent, advice = True, "what listens there does not speak HTTP: correct the port of FIREWORKS_BASE_URL"
    else:
        sent, first_patience_s = True, FIRST_PATIENCE_CLOSED_S
        advice = "something listens there and hangs up: start the server, or correct FIREWORKS_BASE_URL"
    return Failure(
        "connection",
        message,
        sent=sent,
        may_be_billed=sent,  # if the connection broke after sending, the server may have computed the request
        first_patience_s=first_patience_s,
        advice=advice + _describe_proxy(url),
    )


def _describe_proxy(url: str) -> str:
    """Advice on the proxy, if the environment sends requests to this URL through one; else empty."""
    if not _find_proxy(url):
        return ""
    parts = urlsplit(url)
    # the proxy's URL may hold a password
    return (
        f"; or the proxy that the environment sets for it: correct {parts.scheme.upper()}_PROXY or ALL_PROXY, or add "
        f"{parts.hostname} to NO_PROXY"
    )


def _find_proxy(url: str) -> str | None:
    """The URL of the proxy that the environment sets for a URL; None: there is none."""
    parts, proxies = urlsplit(url), getproxies()
    if proxy_bypass(parts.hostname or ""):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
