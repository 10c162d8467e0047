"""The provider's client: requests, tries, and what the server can do.

Owns the decision to try again. What an answer means is in `answers`; what a request holds is decided in `batching`,
when it may go in `limits`.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import httpx2
import openai

from songvec_assets.embedding.answers import Action, action_for, describe_answer, parse_retry_after
from songvec_assets.embedding.limits import Grant, RateLimiter
from songvec_assets.embedding.pricing import TokenEstimator
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
    RequestRefusedError,
    RequestTooLargeError,
)
from songvec_assets.progress import StopSignal

MAX_BACKOFF_S = 120.0
MAX_PAUSE_S = 5.0
"""All requests pause after a 429 that names no time: 1 s, then 2, 4, and at most so long."""
MAX_TEXTS_IN_LOOP = 512
"""So many base64 vectors of 2,000 values are decoded in 4 ms (2 cores, 2026-11): less than the event loop's other users
would wait for the interpreter's lock while a thread did it. Larger answers, and floats, are decoded in a thread."""
_MATRYOSHKA_MODELS = ("qwen3-embedding",)
_REFUSALS = {Action.SHRINK: RequestTooLargeError, Action.ISOLATE: RequestRefusedError}


class Watch:
    """What a caller wants to be asked and told about the tries of one request; this one wants nothing."""

    async def before_try(self) -> None:
        """Asked when nothing but this is between a try and its sending; raises to call it off."""

    def count_spoilt(self, n_tokens: int) -> None:
        """Told that a try was billed about so many tokens, and that its answer cannot be used."""


class Embedder(Protocol):
    """What turns texts into vectors: the provider's client, or the offline embedder."""

    dimensions: int

    @property
    def quota_used(self) -> float | None:
        """Share of the provider's quota that all processes used in the last minute; None where there is no quota."""
        ...

    async def generate_embeddings_batch(self, texts: Sequence[str], watch: Watch = ...) -> EmbeddingBatch:
        """Embed one request's texts."""
        ...

    async def probe(self) -> int:
        """The tokens billed for a short plain text; raises RequestRefusedError where even that is refused."""
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


_NO_WATCH = Watch()


class EmbeddingClient:
    """Embeds texts with an OpenAI-compatible server. One client a run, used within one event loop.

    Args:
        base_url: the API's root, with its version: `https://api.fireworks.ai/inference/v1`.
        api_key: bearer key; None for servers that need none.
        model: the model's name at the provider.
        dimensions: values a vector.
        limiter: the shared quota.
        patience_s: seconds that one request is tried again before ProviderUnavailableError.
        stop: once set, nothing more is sent or waited for; a request in flight is left to end.
        estimator: tells the limiter a request's tokens, and learns from what is billed.
        on_trouble: told, at every bad answer, what it was and what is done about it.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        model: str,
        dimensions: int,
        limiter: RateLimiter,
        patience_s: float = 600.0,
        stop: StopSignal | None = None,
        estimator: TokenEstimator | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.dimensions = dimensions
        self.base_url = base_url
        self._limiter = limiter
        self._patience_s = patience_s
        self._stop = stop or StopSignal()
        self._estimator = estimator or TokenEstimator()
        self._on_trouble = on_trouble
        self._api = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            max_retries=0,  # the limiter must see every try
            http_client=openai.DefaultAioHttpClient(),  # its parser is C: half the time per vector
        )
        # one answer at a time: several are no faster, and hold all their vectors
        self._decoder = ThreadPoolExecutor(1, "songvec-decode")
        self._api_key = api_key
        self._probing: asyncio.Future[_Dialect] | None = None
        # one request waits for the quota at a time: places are granted no further ahead than the next one
        self._gate = asyncio.Lock()
        self._newest_grant_at = self._limited_until = 0.0
        self._n_limited_in_a_row = 0
        self._untold_tokens = 0

    @property
    def quota_used(self) -> float:
        """See `RateLimiter.used`."""
        return self._limiter.used

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()
        self._decoder.shutdown(wait=False)

    async def generate_embeddings_batch(self, texts: Sequence[str], watch: Watch = _NO_WATCH) -> EmbeddingBatch:
        """Embed the texts of one request, trying again as long as that can help.

        Args:
            texts: none empty; the caller keeps to the limits of a request.
            watch: asked before each try, told of each that was billed for nothing.

        Returns:
            Float32 vectors, (n texts, dimensions), the tokens billed for them, and the tries it took. The tokens of the
            probe are in the first one's.

        Raises:
            RequestRefusedError: the server refuses this request; its neighbours may fare better.
            RequestTooLargeError: it is one of those, for its size.
            ProviderUnavailableError: no good answer within the patience.
            ProviderError: no request can succeed: key, model, billing, sizes.
            StoppedError: the stop signal was set before the request could go.
        """
        dialect = await self._learn_dialect()
        batch = await self._request_patiently(texts, dialect, watch)
        untold_tokens, self._untold_tokens = self._untold_tokens, 0
        if batch.embeddings.shape[1] != dialect.n_values:
            raise ProviderError(f"expected vectors of {dialect.n_values} values, got {batch.embeddings.shape[1]}")
        embeddings = batch.embeddings
        if dialect.n_values > self.dimensions:
            embeddings = truncate_vectors(embeddings, self.dimensions)
        return replace(batch, embeddings=embeddings, n_tokens=batch.n_tokens + untold_tokens)

    async def probe(self) -> int:
        """Send the probe's text once more; the tokens billed for it.

        Raises:
            RequestRefusedError: the server now refuses even that; and what `generate_embeddings_batch` raises.
        """
        return (await self._request_patiently(["probe"], await self._learn_dialect(), _NO_WATCH)).n_tokens

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
                batch = await self._request_patiently(["probe"], dialect, _NO_WATCH)
            except RequestRefusedError as error:
                refusals.append(str(error))
                continue
            self._untold_tokens += batch.n_tokens
            n_values = batch.embeddings.shape[1]
            self._check_size(n_values)
            return _Dialect(dialect.encoding_format, dialect.sends_dimensions, n_values)
        raise ProviderError(
            f"{self.base_url} refuses even one short text for model {self.model!r}, with and without base64 and "
            f"`dimensions`. Its words: {refusals[-1]}"
        )

    def _check_size(self, n_values: int) -> None:
        if n_values == self.dimensions:
            return
        may_truncate = any(name in self.model.lower() for name in _MATRYOSHKA_MODELS)
        if n_values < self.dimensions or not may_truncate:
            raise ProviderError(
                f"expected vectors of {self.dimensions} values, model {self.model!r} gives {n_values}"
                + ("" if n_values < self.dimensions else " and is not known to be trained for truncation")
                + f": set SONGVEC_EMBEDDING_DIMENSIONS={n_values}"
            )

    async def _request_patiently(self, texts: Sequence[str], dialect: _Dialect, watch: Watch) -> EmbeddingBatch:
        body = encode_request(
            self.model, texts, dialect.encoding_format, self.dimensions if dialect.sends_dimensions else None
        )
        n_bytes = sum(len(text.encode()) for text in texts)
        [n_tokens] = self._estimator.estimate([n_bytes])
        timeout_s = 60 + n_tokens / 200
        failing_since, n_retries, n_limited = 0.0, 0, 0
        while True:
            asked_at = time.monotonic()
            grant = await self._next_grant(n_tokens)
            failing_since += time.monotonic() - asked_at  # waiting for the quota does not wear the patience out
            await watch.before_try()
            wait_s = random.uniform(0, min(MAX_BACKOFF_S, 0.5 * 2 ** min(n_retries, 20)))  # full jitter (Brooker 2015)
            try:
                answer = await self._send(body, timeout_s)
                batch = await self._decode(answer, len(texts), dialect)
            except openai.APIStatusError as error:
                # no cause is chained to what is raised below: the library's error holds the provider's words unredacted
                words = describe_answer(error.status_code, self._redact(error.response.text))
                action = action_for(error.status_code)
                if action is Action.STOP:
                    raise ProviderError(f"{self.base_url} {words}") from None
                if action in _REFUSALS:
                    raise _REFUSALS[action](words) from None
                retry_after_s = parse_retry_after(error.response.headers.get("retry-after", ""))
                if error.status_code == 429:
                    n_limited += 1
                    wait_s = max(await self._slow_down(grant, retry_after_s), min(MAX_PAUSE_S, wait_s))
                else:
                    wait_s = max(retry_after_s or 0.0, wait_s)
            except TimeoutError:
                words = f"no whole answer within {timeout_s:.0f} s"
            except (openai.APIConnectionError, MalformedResponseError) as error:
                if isinstance(error, MalformedResponseError) or isinstance(error.__cause__, httpx2.ReadError):
                    watch.count_spoilt(n_tokens)  # what is answered was billed, whatever of it came
                words = self._redact(str(error.__cause__ or error) or type(error).__name__)
            else:
                self._n_limited_in_a_row = 0
                if not batch.n_tokens:
                    # a server that does not say what it bills is held to the estimate, or no budget would ever bind
                    return replace(batch, n_tokens=n_tokens, n_retries=n_retries, n_limited=n_limited)
                self._estimator.observe(n_bytes, batch.n_tokens)
                self._limiter.settle(grant, batch.n_tokens)
                return replace(batch, n_retries=n_retries, n_limited=n_limited)
            # patience begins with the first bad answer
            failing_since = failing_since if n_retries else time.monotonic()
            n_retries += 1
            failing_s = time.monotonic() - failing_since
            if failing_s + wait_s > self._patience_s:
                raise ProviderUnavailableError(
                    f"{self.base_url} gave no good answer for {self._patience_s:g} s (SONGVEC_PATIENCE_S), last: "
                    f"{words}. All that was paid for is kept: start the same command again later"
                )
            self._on_trouble(f"{words}; next try in {wait_s:.0f} s, for {self._patience_s - failing_s:.0f} s at most")
            await self._sleep(wait_s)

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
        # the library's own timeout is one of each read, which a server that drips never exceeds
        async with asyncio.timeout(timeout_s):
            response = await self._api.post(
                "/embeddings",
                cast_to=httpx2.Response,
                content=body,
                options={"headers": {"content-type": "application/json"}, "timeout": timeout_s},
            )
            return response.content

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not past the stop signal."""
        end = time.monotonic() + seconds
        self._stop.check()
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.2))
            self._stop.check()
