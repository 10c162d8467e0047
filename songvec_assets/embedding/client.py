"""The provider's client: requests, tries, and what the server can do.

Owns the decision to try again. What an answer means is in `answers`; what a request holds is decided in `batching`,
when it may go in `limits`.
"""

import asyncio
import contextlib
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Literal, NoReturn, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2
import openai

from songvec_assets.embedding.answers import (
    ACTIONS,
    MAY_BE_BILLED,
    Action,
    action_for,
    compatible_base_of,
    describe_answer,
    is_native_answer,
    names_parameter,
    parse_retry_after,
    status_of,
)
from songvec_assets.embedding.contact import refuse_redirect
from songvec_assets.embedding.limits import Grant, RateLimiter
from songvec_assets.embedding.pricing import TokenEstimator
from songvec_assets.embedding.window import InFlightWindow
from songvec_assets.embedding.wire import (
    EmbeddingBatch,
    MalformedResponseError,
    decode_response,
    encode_request,
    truncate_vectors,
)
from songvec_assets.errors import (
    ProviderError,
    ProviderUnavailableError,
    RequestFailsError,
    RequestRefusedError,
    RequestTooLargeError,
    RequestTooSlowError,
    VectorSizeError,
)
from songvec_assets.progress import StopSignal

MAX_BACKOFF_S = 120.0
MAX_PAUSE_S = 5.0
"""All requests pause after a 429 that names no time: 1 s, then 2, 4, and at most so long."""
MAX_TEXTS_IN_LOOP = 512
"""So many base64 vectors of 2,000 values are decoded in 4 ms (2 cores, 2026-11): less than the event loop's other users
would wait for the interpreter's lock while a thread did it. Larger answers, and floats, are decoded in a thread."""
MAX_ALIKE = 5
"""So many failures of one request that are alike, while others succeed, are the request's own: it is divided."""
MAX_ALIKE_OF_PART = 2
"""The same for a part of a request that was divided for it; a text that stands alone gets all its tries."""
QUOTA_WINDOW_S = 60.0
"""A request that is answered 429 for longer, while no other texts are served, is larger than all of the quota."""
BASE_TIMEOUT_S, TOKENS_PER_SECOND = 60.0, 200.0
"""A request is answered in time if a slow server could have computed it; after a time-out it gets twice as long."""
MAX_TIMEOUT_S = 600.0
FIRST_TIMEOUT_S = 600.0
"""The first request of a process waits for as long: a server may load its model for it, and Ollama aborts the load when
the client hangs up (its issue 8006)."""
FIRST_NOTE_S, NOTE_EVERY_S = 3.0, 60.0
"""When it is said that the first answer is waited for, and how often again."""
CONNECT_TIMEOUT_S, FIRST_CONNECT_TIMEOUT_S = 30.0, 4.0
"""Seconds that a connection may take; shorter before the first good answer, when the URL may be wrong."""
FIRST_PATIENCE_S, FIRST_PATIENCE_CLOSED_S = 3.0, 12.0
"""Before the first good answer, what a wrong URL or a server that is not there gives is tried again for as long; a port
that is closed for a little longer, since the server may be starting."""
MATRYOSHKA_MODELS = (
    "qwen3-embedding", "gemini-embedding", "embeddinggemma", "text-embedding-3", "nomic-embed-text-v1.5",
    "nomic-embed-text:v1.5", "nomic-embed-text-v2", "mxbai-embed-large", "snowflake-arctic-embed-l-v2",
    "snowflake-arctic-embed-m-v2", "jina-embeddings-v3",
)  # fmt: skip
"""Parts of names of models whose cards say that they are trained for truncation (read 2026-11)."""
_MAX_DIMENSIONS, _MAX_VECTOR_DIMENSIONS = 4000, 2000
_ADVICE_UNREACHED = {
    "dns": "the host's name does not resolve: correct FIREWORKS_BASE_URL",
    "tls": "its certificate is not valid for this machine: correct the host in FIREWORKS_BASE_URL, or let the system "
    "trust its authority (SSL_CERT_FILE)",
    "no tls": "the server there does not speak TLS: FIREWORKS_BASE_URL begins with http://, or its port is another",
    "closed": "nothing listens there: start the server, or correct host and port of FIREWORKS_BASE_URL",
    "slow": "the host does not answer: correct FIREWORKS_BASE_URL, or see to the network",
    "broken": "something listens there and hangs up: start the server, or correct FIREWORKS_BASE_URL",
    "no http": "what listens there does not speak HTTP: correct the port of FIREWORKS_BASE_URL",
}
_REFUSALS = {Action.SHRINK: RequestTooLargeError, Action.ISOLATE: RequestRefusedError}
_PROBE = ["probe"]
_N_CHECKS = 3
_N_PROOFS = 2
_TIMEOUT = "time-out"


class RequestHooks:
    """What a caller wants to be asked and notified about the tries of one request; this one wants nothing.

    Attributes:
        is_part: whether the request is a part of one that was divided because it failed.
    """

    is_part: bool = False

    async def before_try(self) -> None:
        """Asked before a try waits for its place in flight and in the quota; raises to call it off."""

    async def before_send(self) -> None:
        """Asked when nothing but this is between a try and its sending; raises to call it off."""

    def check_size(self) -> None:
        """Asked when a try has its place in flight, before its place in the quota; raises to call it off."""

    def count_spoilt(self, n_tokens: int) -> None:
        """Notified that a try may have been billed about so many tokens, and that there is no answer to use."""


class Embedder(Protocol):
    """What turns texts into vectors: the provider's client, or the offline embedder."""

    dimensions: int

    @property
    def quota_used(self) -> float | None:
        """Share of the provider's quota that all processes used in the last minute; None where there is no quota."""
        ...

    async def generate_embeddings_batch(self, texts: Sequence[str], hooks: RequestHooks = ...) -> EmbeddingBatch:
        """Embed one request's texts."""
        ...

    async def answers_well(self, since: float) -> bool:
        """Whether the server gave a good vector after `since`, by `time.monotonic()`; it may be asked for one."""
        ...

    def take_probe_tokens(self) -> int:
        """The tokens that plain texts were billed since this was last asked."""
        ...

    async def close(self) -> None:
        """Give its connections back."""
        ...


@dataclass(frozen=True)
class _Dialect:
    """What the server was found to understand.

    Attributes:
        encoding_format: base64, or float where base64 is refused.
        sends_dimensions: whether `dimensions` may be asked for.
        n_values: values of a vector as it arrives, before it is cut to the wanted size.
    """

    encoding_format: Literal["base64", "float"]
    sends_dimensions: bool
    n_values: int = 0


@dataclass(frozen=True)
class _Request:
    """One request as it is sent, try after try.

    Attributes:
        body: its JSON.
        n_texts: that it holds.
        n_bytes: of its texts, in UTF-8.
        n_tokens: estimated.
    """

    body: bytes
    n_texts: int
    n_bytes: int
    n_tokens: int


@dataclass(frozen=True)
class _Failure:
    """A try without a usable answer.

    Attributes:
        kind: equal for failures that are alike.
        words: what came instead.
        status: of the answer; None where there was none.
        retry_after_s: as the server asked for.
        sent: whether the request left: else no server saw it.
        may_be_billed: whether the server may have computed it.
        alone: of a time-out: whether nothing else was in flight.
        first_patience_s: for how long it is tried again before there was any good answer; None: with patience.
        advice: what to do about it then.
    """

    kind: str
    words: str
    status: int | None = None
    retry_after_s: float | None = None
    sent: bool = True
    may_be_billed: bool = False
    alone: bool = False
    first_patience_s: float | None = None
    advice: str = ""


_NO_HOOKS = RequestHooks()


@dataclass
class _ProbeHooks(RequestHooks):
    """Counts what plain texts may be billed for nothing."""

    client: "EmbeddingClient"

    def count_spoilt(self, n_tokens: int) -> None:
        self.client.count_probe_tokens(n_tokens)


class EmbeddingClient:
    """Embeds texts with an OpenAI-compatible server. One client a run, used within one event loop.

    Args:
        base_url: the API's root, with its version: `https://api.fireworks.ai/inference/v1`.
        api_key: bearer key; None for servers that need none.
        model: the model's name at the provider.
        dimensions: values a vector.
        limiter: the shared quota.
        patience_s: seconds since the last good answer to any request before ProviderUnavailableError.
        concurrency: requests in flight at most; after time-outs fewer, until answers come.
        stop: once set, nothing more is sent or waited for; a request in flight is left to end.
        estimator: tells the limiter a request's tokens, and learns from what is billed.
        on_trouble: notified, at every bad answer, of what it was and what is done about it; and that the first answer
            takes long.
        truncate: whether the model may be cut to fewer values; None: where it is known to be trained for it.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        model: str,
        dimensions: int,
        limiter: RateLimiter,
        patience_s: float = 600.0,
        concurrency: int = 32,
        stop: StopSignal | None = None,
        estimator: TokenEstimator | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
        truncate: bool | None = None,
    ) -> None:
        self.model = model
        self.dimensions = dimensions
        self.base_url = base_url
        self._limiter = limiter
        self._patience_s = patience_s
        self._stop = stop or StopSignal()
        self._estimator = estimator or TokenEstimator()
        self._on_trouble = on_trouble
        self._truncate = truncate
        self._api = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            max_retries=0,  # the limiter must see every try
            # its parser is C: half the time per vector. A redirect would take the key to an address that nobody set
            http_client=openai.DefaultAioHttpClient(follow_redirects=False),
        )
        # one answer at a time: several are no faster, and hold all their vectors
        self._decoder = ThreadPoolExecutor(1, "songvec-decode")
        self._api_key = api_key
        self._probing: asyncio.Future[_Dialect] | None = None
        # one request waits for the quota at a time: places are granted no further ahead than the next one
        self._gate = asyncio.Lock()
        self._window = InFlightWindow(concurrency)
        self._checking = asyncio.Lock()
        self._last_good_at = self._last_served_at = self._found_sick_at = float("-inf")
        self._failing_since: float | None = None
        self._unreached_since: float | None = None
        self._newest_grant_at = self._limited_until = 0.0
        self._n_limited_in_a_row = 0
        self._probe_tokens = 0

    @property
    def quota_used(self) -> float:
        """See `RateLimiter.used`."""
        return self._limiter.used

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()
        self._decoder.shutdown(wait=False)

    async def generate_embeddings_batch(self, texts: Sequence[str], hooks: RequestHooks = _NO_HOOKS) -> EmbeddingBatch:
        """Embed the texts of one request, trying again as long as that can help.

        Args:
            texts: none empty; the caller keeps to the limits of a request.
            hooks: asked before each try, told of each that was billed for nothing.

        Returns:
            Float32 vectors, (n texts, dimensions), the tokens billed for them, and the tries it took; texts in whose
            place the server put no vector are named in `bad`. The tokens of probes are in the next answer's.

        Raises:
            RequestRefusedError: the server refuses this request; its neighbours may fare better.
            RequestTooLargeError: it is one of those, for its size.
            RequestFailsError: it is one of those: it fails alike again and again while others succeed.
            ProviderUnavailableError: no good answer to any request within the patience.
            ProviderError: no request can succeed: key, model, billing, sizes.
            StoppedError: the stop signal was set before the request could go.
        """
        dialect = await self._learn_dialect()
        batch = await self._request_patiently(texts, dialect, hooks)
        batch = replace(batch, n_tokens=batch.n_tokens + self.take_probe_tokens())
        if len(batch.bad) == len(texts):
            return batch
        if batch.embeddings.shape[1] != dialect.n_values:
            raise ProviderError(f"expected vectors of {dialect.n_values} values, got {batch.embeddings.shape[1]}")
        embeddings = batch.embeddings
        if dialect.n_values > self.dimensions:
            embeddings = truncate_vectors(embeddings, self.dimensions)
        return replace(batch, embeddings=embeddings)

    async def answers_well(self, since: float) -> bool:
        """Whether the server gave a good vector after `since` (`time.monotonic()`); a plain text finds out if need be.

        Raises:
            ProviderUnavailableError: no answer at all within the patience; and what ends a run.
        """
        async with self._checking:
            dialect = await self._learn_dialect()
            for _ in range(_N_CHECKS):
                if self._last_good_at > since or self._found_sick_at > since:
                    break
                try:
                    batch = await self._request_patiently(_PROBE, dialect, _ProbeHooks(self))
                except RequestRefusedError:
                    break
                self.count_probe_tokens(batch.n_tokens)
            if self._last_good_at <= since:
                self._found_sick_at = time.monotonic()
            return self._last_good_at > since

    def count_probe_tokens(self, n_tokens: int) -> None:
        """A plain text was, or may have been, billed so many tokens."""
        self._probe_tokens += n_tokens

    def take_probe_tokens(self) -> int:
        """The tokens that plain texts were billed since this was last asked."""
        n_tokens, self._probe_tokens = self._probe_tokens, 0
        return n_tokens

    async def _learn_dialect(self) -> _Dialect:
        """Find out once, with a request of one short text, what the server understands; all who wait share it."""
        probing = self._probing = self._probing or asyncio.ensure_future(self._probe())
        try:
            return await asyncio.shield(probing)
        except Exception:
            if self._probing is probing:
                self._probing = None
            raise

    async def _probe(self) -> _Dialect:
        refusals = []
        for dialect in (
            _Dialect("base64", True), _Dialect("float", True), _Dialect("base64", False), _Dialect("float", False)
        ):  # fmt: skip
            try:
                found = await self._probe_size(dialect)
            except RequestRefusedError as error:
                refusals.append(str(error))
                continue
            if found.n_values != self.dimensions and found.encoding_format == "base64":
                found = await self._check_base64(found)
            self._check_size(found.n_values)
            return found
        raise ProviderError(
            f"{self.base_url} refuses even one short text for model {self.model!r}, with and without base64 and "
            f"`dimensions`. Its words: {refusals[-1]}"
        )

    async def _probe_size(self, dialect: _Dialect) -> _Dialect:
        """The dialect with the size of the vectors that come.

        Raises:
            RequestRefusedError: the server does not understand it.
        """
        batch = await self._request_patiently(_PROBE, dialect, _ProbeHooks(self), refuse_bad=True)
        self.count_probe_tokens(batch.n_tokens)
        return replace(dialect, n_values=batch.embeddings.shape[1])

    async def _check_base64(self, found: _Dialect) -> _Dialect:
        """The dialect, or that of numbers where these show another size: then it is not float32 that base64 holds."""
        try:
            as_numbers = await self._probe_size(replace(found, encoding_format="float"))
        except RequestRefusedError:
            return found
        return found if as_numbers.n_values == found.n_values else as_numbers

    def _check_size(self, n_values: int) -> None:
        if n_values == self.dimensions:
            return
        is_known = any(name in self.model.lower() for name in MATRYOSHKA_MODELS)
        if n_values > self.dimensions and (is_known if self._truncate is None else self._truncate):
            return
        cures = [f"set SONGVEC_EMBEDDING_DIMENSIONS={n_values}"] if n_values <= _MAX_DIMENSIONS else []
        if n_values > _MAX_VECTOR_DIMENSIONS and cures:
            cures[0] += " and SONGVEC_VECTOR_TYPE=halfvec"
        if n_values > self.dimensions:
            cures.append("set SONGVEC_TRUNCATE=yes if its makers say that it may be cut (Matryoshka)")
        why = ""
        if n_values > self.dimensions:
            why = (
                " and is not known to be trained for truncation" if self._truncate is None else " and is not to be cut"
            )
        raise VectorSizeError(
            f"expected vectors of {self.dimensions} values, model {self.model!r} gives {n_values}{why}: "
            f"{', or '.join(cures)}"
        )

    async def _request_patiently(
        self, texts: Sequence[str], dialect: _Dialect, hooks: RequestHooks, refuse_bad: bool = False
    ) -> EmbeddingBatch:
        """Try until there is an answer; `refuse_bad`: one whose vectors are all bad is none."""
        request = self._encode(texts, dialect)
        n_retries = n_limited = n_alike = n_timeouts = n_proofs = 0
        kind, first_at = "", time.monotonic()
        while True:
            await hooks.before_try()
            started = time.monotonic()
            outcome = await self._try_once(request, dialect, hooks, refuse_bad)
            self._note_contact(outcome, started)
            if isinstance(outcome, EmbeddingBatch):
                if texts is not _PROBE:
                    self._last_served_at = time.monotonic()
                return replace(outcome, n_retries=n_retries, n_limited=n_limited)
            if outcome.may_be_billed:
                hooks.count_spoilt(request.n_tokens)
            if outcome.kind != kind:
                kind, n_alike, n_proofs, first_at = outcome.kind, 0, 0, started
            n_retries, n_alike = n_retries + 1, n_alike + 1
            n_limited += outcome.status == 429
            n_timeouts += outcome.kind == _TIMEOUT
            if outcome.alone and n_timeouts > 1 and len(texts) > 1:
                raise RequestTooSlowError(f"{self.base_url}: {outcome.words}")
            most = MAX_ALIKE_OF_PART if hooks.is_part and len(texts) > 1 else MAX_ALIKE
            # whose fault it is shows in how other requests fare
            may_be_the_texts = outcome.sent and texts is not _PROBE
            if outcome.status == 429:
                since = time.monotonic() - QUOTA_WINDOW_S
                may_be_the_texts &= len(texts) > 1 and max(first_at, self._last_served_at) < since
            if may_be_the_texts and n_alike >= most and await self.answers_well(started):
                n_proofs += 1
                if n_proofs >= _N_PROOFS and outcome.status == 429:
                    raise RequestTooLargeError(f"{self.base_url} {outcome.words}")
                if n_proofs >= _N_PROOFS:
                    raise RequestFailsError(f"{self.base_url} {outcome.words}")
                continue  # a server that was away is back: now the request has its try among good ones
            await self._wait_to_try_again(outcome, n_retries)

    def _encode(self, texts: Sequence[str], dialect: _Dialect) -> _Request:
        dimensions = self.dimensions if dialect.sends_dimensions else None
        n_bytes = sum(len(text.encode()) for text in texts)
        [n_tokens] = self._estimator.estimate([n_bytes])
        body = encode_request(self.model, texts, dialect.encoding_format, dimensions)
        return _Request(body, len(texts), n_bytes, n_tokens)

    async def _try_once(
        self, request: _Request, dialect: _Dialect, hooks: RequestHooks, refuse_bad: bool
    ) -> EmbeddingBatch | _Failure:
        """Send a request once, when there is a place for it; settle the quota with what became of it.

        Raises:
            ProviderError: an answer that no further try makes better.
        """
        usual_s = min(MAX_TIMEOUT_S, self._window.stretch * (BASE_TIMEOUT_S + request.n_tokens / TOKENS_PER_SECOND))
        timeout_s = usual_s if self._has_answered else FIRST_TIMEOUT_S
        async with self._window.place(self._stop.check):
            hooks.check_size()
            grant = await self._next_grant(request.n_tokens)
            billed_tokens: int | None = 0
            try:
                await hooks.before_send()
                billed_tokens = None
                sent_at = time.monotonic()
                async with self._saying_that_it_waits():
                    outcome = await self._send_and_decode(request, dialect, timeout_s)
                now = time.monotonic()
                if isinstance(outcome, _Failure):
                    if outcome.kind == _TIMEOUT:
                        outcome = self._narrow(outcome, sent_at, now)
                    billed_tokens = None if outcome.sent else 0
                else:
                    self._window.count_answer(now - sent_at, usual_s)
                    billed_tokens = outcome.n_tokens or None
            finally:
                if billed_tokens is not None:  # what never left gives its place back
                    self._limiter.settle(grant, billed_tokens)
        if isinstance(outcome, _Failure):
            if outcome.status == 429:
                pause_s = await self._slow_down(grant, outcome.retry_after_s)
                return replace(outcome, retry_after_s=pause_s)
            return outcome
        self._n_limited_in_a_row = 0
        self._estimator.observe(request.n_bytes, outcome.n_tokens)
        # a server that does not say what it bills is held to the estimate, or no budget would ever bind
        batch = replace(outcome, n_tokens=outcome.n_tokens or request.n_tokens)
        if len(batch.bad) == request.n_texts:
            if refuse_bad:
                words = f"a vector that is zero, null or not finite for {_PROBE[0]!r}"
                return _Failure("bad vector", words, may_be_billed=True)
            return batch
        self._last_good_at, self._failing_since = time.monotonic(), None
        return batch

    async def _send_and_decode(
        self, request: _Request, dialect: _Dialect, timeout_s: float
    ) -> EmbeddingBatch | _Failure:
        answer = b""
        try:
            answer = await self._send(request.body, timeout_s)
            return await self._decode(answer, request.n_texts, dialect)
        except openai.APIStatusError as error:
            # no cause is chained to what is raised below: the library's error holds the provider's words unredacted
            headers = error.response.headers
            sent_at = headers.get("date") or formatdate(usegmt=True)
            retry_after_s = parse_retry_after(headers.get("retry-after", ""), sent_at)
            location = headers.get("location", "")
            return self._take_in_status(error.status_code, error.response.content, retry_after_s, location)
        except TimeoutError:
            words = f"no whole answer within {timeout_s:.0f} s"
            return _Failure(_TIMEOUT, words, may_be_billed=True)
        except MalformedResponseError as error:
            if status_of(200, answer) != 200:
                return self._take_in_status(200, answer, None)
            # what is answered was billed, whatever of it came
            words = self._redact(str(error))
            is_native = is_native_answer(answer)
            first_patience_s, advice = 0.0 if is_native else FIRST_PATIENCE_S, "correct FIREWORKS_BASE_URL"
            if is_native:
                words = f"the server's own API answers there, not the one that is OpenAI's ({answer[:80]!r})"
                if meant_base := compatible_base_of(self.base_url):
                    advice = f"set FIREWORKS_BASE_URL={meant_base}"
            return _Failure("malformed", words, may_be_billed=True, first_patience_s=first_patience_s, advice=advice)
        except (openai.APIConnectionError, aiohttp.ClientError) as error:
            # the transport names most broken connections a time-out of connecting: aiohttp's own error is the cause of
            # its error, or comes through as it is where the transport knows no name for it
            cause: BaseException = error
            while cause.__cause__ and not isinstance(cause, aiohttp.ClientError):
                cause = cause.__cause__
            words = self._redact(str(cause) or type(cause).__name__)
            kind, first_patience_s = _find_unreached(cause)
            sent = kind in ("broken", "no http")
            # what broke after the request was sent, the server may have computed
            return _Failure(
                "connection", words, sent=sent, may_be_billed=sent, first_patience_s=first_patience_s,
                advice=_ADVICE_UNREACHED[kind] + _describe_proxy(self.base_url),
            )  # fmt: skip

    def _take_in_status(self, status: int, body: bytes, retry_after_s: float | None, location: str = "") -> _Failure:
        """What an answer that is an error means.

        Raises:
            ProviderError: it ends the run, or refuses this very request.
        """
        meant = status_of(status, body)
        words = describe_answer(meant, self._redact(body.decode(errors="replace")), status, self.base_url)
        action = action_for(meant)
        if meant == 500 and not self._has_answered and names_parameter(body):
            action = Action.ISOLATE  # LiteLLM refuses so what the server behind it does not know (its #42426)
        if action in _REFUSALS:
            raise _REFUSALS[action](f"{self.base_url} {words}") from None
        if action is Action.STOP:
            raise ProviderError(f"{self.base_url} {words}") from None
        if action is Action.MOVED:
            refuse_redirect(self.base_url, meant, self._redact(location))
        # LM Studio answers 200 with an error of no status for a path that it does not have
        is_strange = meant != status < 400 and meant == 500
        first_patience_s = FIRST_PATIENCE_S if is_strange else FIRST_PATIENCE_CLOSED_S if meant < 500 else None
        return _Failure(
            f"status {meant}", words, meant, retry_after_s, may_be_billed=meant in MAY_BE_BILLED,
            first_patience_s=None if meant in ACTIONS and not is_strange else first_patience_s,
            advice="see what answers at FIREWORKS_BASE_URL",
        )  # fmt: skip

    def _narrow(self, failure: _Failure, sent_at: float, now: float) -> _Failure:
        """Let fewer requests be in flight after a time-out, and say so."""
        alone = self._window.count_timeout(sent_at, now)
        n_allowed = self._window.n_allowed
        words = (
            f"{failure.words}; up to {n_allowed} {'request' if n_allowed == 1 else 'requests'} in flight from now on. "
            "If this goes on, lower SONGVEC_CONCURRENCY and SONGVEC_MAX_REQUEST_TOKENS"
        )
        return replace(failure, words=words, alone=alone)

    async def _wait_to_try_again(self, failure: _Failure, n_retries: int) -> None:
        """Sleep before the next try.

        Raises:
            ProviderUnavailableError: the patience would end before it.
        """
        # full jitter (Brooker 2015)
        wait_s = random.uniform(0, min(MAX_BACKOFF_S, 0.5 * 2 ** min(n_retries - 1, 20)))
        if failure.status == 429:
            wait_s = max(failure.retry_after_s or 0.0, min(MAX_PAUSE_S, wait_s))
        else:
            wait_s = max(failure.retry_after_s or 0.0, wait_s)
        now = time.monotonic()
        # patience begins with the first bad answer after the last good one, of whichever request
        self._failing_since = now if self._failing_since is None else self._failing_since
        left_s = self._patience_s - (now - self._failing_since)
        if self._unreached_since is not None and not self._has_answered:
            first_left_s = (failure.first_patience_s or 0.0) - (now - self._unreached_since)
            if wait_s > first_left_s:
                self._give_up_first_contact(failure)
            left_s = min(left_s, first_left_s)
        if wait_s > left_s:
            raise ProviderUnavailableError(
                f"{self.base_url} gave no good answer for {self._patience_s:g} s (SONGVEC_PATIENCE_S), last: "
                f"{failure.words}. All that was paid for is kept: start the same command again later"
            )
        self._on_trouble(f"{failure.words}; next try in {wait_s:.0f} s, for {left_s:.0f} s at most")
        await self._sleep(wait_s)

    def _give_up_first_contact(self, failure: _Failure) -> NoReturn:
        """Raise for a server that has given no good answer yet, and gives what a wrong URL gives."""
        url = f"{self.base_url.rstrip('/')}/embeddings"
        if failure.kind == "connection":
            raise ProviderUnavailableError(
                f"{url} cannot be reached: {failure.words} ({failure.advice}). All that was paid for is kept"
            )
        raise ProviderError(f"{url} gives no embeddings: {failure.words} ({failure.advice})")

    @property
    def _has_answered(self) -> bool:
        """Whether there was a good answer to any request: the URL is right."""
        return self._last_good_at > float("-inf")

    def _note_contact(self, outcome: EmbeddingBatch | _Failure, started: float) -> None:
        """Keep since when nothing but what a wrong URL gives has come."""
        if isinstance(outcome, EmbeddingBatch) or outcome.first_patience_s is None:
            self._unreached_since = None
        elif self._unreached_since is None:
            self._unreached_since = started

    @contextlib.asynccontextmanager
    async def _saying_that_it_waits(self) -> AsyncIterator[None]:
        """Say within the block that the first answer is waited for, where it takes long."""

        async def say() -> None:
            await asyncio.sleep(FIRST_NOTE_S)
            waited_s = FIRST_NOTE_S
            while True:
                self._on_trouble(
                    f"waiting for {self.base_url}: no answer after {waited_s:.0f} s; to load a model may take minutes"
                )
                await asyncio.sleep(NOTE_EVERY_S)
                waited_s += NOTE_EVERY_S

        if self._has_answered:
            yield
            return
        saying = asyncio.create_task(say())
        try:
            yield
        finally:
            saying.cancel()

    async def _decode(self, answer: bytes, n_texts: int, dialect: _Dialect) -> EmbeddingBatch:
        # base64 takes 5.3 bytes a value, numbers take 10 and more, whichever of them was asked for
        as_base64 = len(answer) < n_texts * (6 * dialect.n_values + 200)
        if as_base64 and n_texts <= MAX_TEXTS_IN_LOOP:
            return decode_response(answer, n_texts)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoder, decode_response, answer, n_texts)

    async def _next_grant(self, n_tokens: int) -> Grant:
        """Wait for a place in the quota."""
        async with self._gate:
            self._stop.check()
            grant = await asyncio.to_thread(self._limiter.reserve, n_tokens)
            self._newest_grant_at = grant.at
            await self._sleep(grant.wait_s)
            return grant

    async def _slow_down(self, grant: Grant, retry_after_s: float | None) -> float:
        """Hold back every request of the deployment after a 429; for how many seconds."""
        if grant.at > self._limited_until:
            self._n_limited_in_a_row += 1
            # what was granted until now is limited for the same reason: it does not make the pause longer
            self._limited_until = self._newest_grant_at
        pause_s = (
            min(MAX_PAUSE_S, 2.0 ** min(self._n_limited_in_a_row - 1, 20)) if retry_after_s is None else retry_after_s
        )
        await asyncio.to_thread(self._limiter.slow_down, grant, pause_s)
        return pause_s

    def _redact(self, words: str) -> str:
        """A server's words without the key, which some repeat."""
        return words.replace(self._api_key, "[key]") if self._api_key else words

    async def _send(self, body: bytes, timeout_s: float) -> bytes:
        connect_s = CONNECT_TIMEOUT_S if self._has_answered else FIRST_CONNECT_TIMEOUT_S
        # `pool` is the transport's limit of a name's look-up, too
        times = httpx2.Timeout(timeout_s, connect=connect_s, pool=connect_s)
        # the library's own timeout is one of each read, which a server that drips never exceeds
        async with asyncio.timeout(timeout_s):
            response = await self._api.post(
                "/embeddings",
                cast_to=httpx2.Response,
                content=body,
                options={"headers": {"content-type": "application/json"}, "timeout": times},
            )
            return response.content

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not past the stop signal."""
        end = time.monotonic() + seconds
        self._stop.check()
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.2))
            self._stop.check()


def _describe_proxy(url: str) -> str:
    """What to know where the environment sends requests to a URL through a proxy; empty where it does not."""
    parts, proxies = urlsplit(url), getproxies()
    if not (proxies.get(parts.scheme) or proxies.get("all")) or proxy_bypass(parts.hostname or ""):
        return ""
    # its URL may hold a password
    return (
        f"; or the proxy that the environment sets for it: correct {parts.scheme.upper()}_PROXY or ALL_PROXY, or add "
        f"{parts.hostname} to NO_PROXY"
    )


def _find_unreached(cause: BaseException) -> tuple[str, float]:
    """Which of `_ADVICE_UNREACHED` a broken connection is, and for how long it is tried again at first."""
    reason = cause.os_error if isinstance(cause, aiohttp.ClientConnectorError) else cause.__cause__
    kinds: list[tuple[str, float, tuple[type[BaseException], ...]]] = [
        ("dns", FIRST_PATIENCE_S, (aiohttp.ClientConnectorDNSError, socket.gaierror)),
        ("tls", 0.0, (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError)),
        ("no tls", 0.0, (aiohttp.ClientConnectorSSLError, ssl.SSLError)),
        ("closed", FIRST_PATIENCE_CLOSED_S, (aiohttp.ClientConnectorError,)),
        ("slow", FIRST_PATIENCE_S, (aiohttp.ConnectionTimeoutError,)),
        ("no http", FIRST_PATIENCE_S, (aiohttp.ClientResponseError, aiohttp.InvalidURL)),
    ]
    for kind, first_patience_s, types in kinds:
        if isinstance(cause, types) or isinstance(reason, types):
            return kind, first_patience_s
    return "broken", FIRST_PATIENCE_CLOSED_S
