"""The provider's client: embeds the texts of a request, and retries as long as that can help.

When to add here: another reason to retry a request or to give it up. Keep out: a single try (`transport`, `answers`),
waiting times (`contact`), when a request may be sent (`gate`, `limits`), and what it holds (`batching`).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from songvec_assets.embedding.contact import ServerContact
from songvec_assets.embedding.embedder import NO_HOOKS, Embedder, Endpoint, Patience, RequestHooks
from songvec_assets.embedding.gate import InFlightWindow, QuotaGate
from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.embedding.pricing import TokenEstimator
from songvec_assets.embedding.transport import TIMEOUT, Dialect, Failure, Request, Transport
from songvec_assets.embedding.wire import EmbeddingBatch, Float32Matrix, encode_request
from songvec_assets.errors import (
    ProviderError,
    RequestFailsError,
    RequestRefusedError,
    RequestTooLargeError,
    RequestTooSlowError,
)

MAX_ALIKE = 5
"""Equal failures of one request, while others succeed, before it is divided: the request is at fault."""
MAX_ALIKE_OF_PART = 2
"""The same for a part of a divided request; a single text gets MAX_ALIKE tries."""
QUOTA_WINDOW_S = 60.0
"""If a request gets 429 for longer, while no other texts are served, it is larger than the whole quota."""
BASE_TIMEOUT_S, TOKENS_PER_SECOND, MAX_TIMEOUT_S = 60.0, 200.0, 600.0
"""The time limit of a request is what a slow server needs for it; after a time-out it doubles, up to the maximum."""
FIRST_TIMEOUT_S = 600.0
"""For a process's first request: a server may load its model, and Ollama aborts that on a hang-up (its issue 8006)."""
_PROBE, _PROBE_TOKENS = ["probe"], 8
_N_CHECKS, _N_PROOFS = 3, 2
"""Bad probes until a server counts as failing; good ones until texts count as at fault. One of either may be chance."""


class _ProbeHooks(RequestHooks):
    """Counts the tokens that probes were, or may have been, billed."""

    n_tokens = 0

    def count_unusable(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens


class EmbeddingClient(Embedder):
    """Embeds texts with an OpenAI-compatible server. One client per run, used within one event loop.

    Args:
        endpoint: the server, the model and the size of the vectors.
        limiter: the shared quota.
        patience: how long and how hard to try.
        estimator: estimates a request's tokens, and learns from what is billed.
        check_probe: called in a thread with the probe's vector, (dimensions,), before other texts; may end the run.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        limiter: RateLimiter,
        patience: Patience | None = None,
        estimator: TokenEstimator | None = None,
        check_probe: Callable[[Float32Matrix], None] = lambda _: None,
    ) -> None:
        self.endpoint = endpoint
        self.dimensions = endpoint.dimensions
        self.n_probe_tokens = _PROBE_TOKENS
        self._patience = patience or Patience()
        self._estimator = estimator or TokenEstimator()
        self._check_probe = check_probe
        self._transport = Transport(endpoint)
        self._contact = ServerContact(endpoint.url, self._patience)
        self._gate = QuotaGate(limiter, self._patience)
        self._window = InFlightWindow(self._patience.concurrency)
        self._probing: asyncio.Future[Dialect] | None = None
        self._probe_hooks = _ProbeHooks()
        self._checking = asyncio.Lock()
        self._last_served_at = self._found_sick_at = float("-inf")

    @property
    def quota_used(self) -> float:
        """See `RateLimiter.used`."""
        return self._gate.limiter.used

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def generate_embeddings_batch(self, texts: Sequence[str], hooks: RequestHooks = NO_HOOKS) -> EmbeddingBatch:
        """Embed the texts of one request, retrying as long as that can help.

        Args:
            texts: none empty; the caller keeps to the limits of a request.
            hooks: called before each try, and after a try that was billed without a usable answer.

        Returns:
            Float32 vectors, (n texts, dimensions), the billed tokens, without those of probes, and the number of
            retries; `bad` lists texts without a vector.

        Raises:
            RequestRefusedError: the server refuses this request; others may succeed.
            RequestTooLargeError, RequestFailsError: the same, for its size; as it always fails while others succeed.
            ProviderUnavailableError: no good answer to any request within the patience.
            ProviderError: no request can succeed: key, model, billing, sizes.
            StoppedError: the stop signal was set before the request was sent.
        """
        dialect = await self._learn_dialect()
        batch = await self._request_patiently(texts, dialect, hooks)
        if len(batch.bad) < len(texts) and batch.n_values != dialect.n_values:
            raise ProviderError(
                f"expected vectors of {dialect.n_values} values as before, got {batch.n_values}: another server "
                "answers behind this URL: point FIREWORKS_BASE_URL at one model",
                "provider.vector-size",
            )
        return batch

    async def answers_well(self, since: float) -> bool:
        """Whether the server gave a good vector after `since` (`time.monotonic()`); sends probes if needed.

        Raises:
            ProviderError: no answer within the patience, or one that ends the run.
        """
        async with self._checking:
            dialect = await self._learn_dialect()
            for _ in range(_N_CHECKS):
                if self._contact.last_good_at > since or self._found_sick_at > since:
                    break
                try:
                    await self._send_probe(dialect)
                except RequestRefusedError:
                    break
            if self._contact.last_good_at <= since:
                self._found_sick_at = time.monotonic()
            return self._contact.last_good_at > since

    def take_probe_tokens(self) -> int:
        """The billed tokens of probes since the last call."""
        n_tokens, self._probe_hooks.n_tokens = self._probe_hooks.n_tokens, 0
        return n_tokens

    async def _learn_dialect(self) -> Dialect:
        """Find out once, with probes, what the server understands; concurrent callers share the result."""
        probing = self._probing = self._probing or asyncio.ensure_future(self._probe())
        try:
            return await asyncio.shield(probing)
        except Exception:
            if self._probing is probing:
                self._probing = None
            raise

    async def _probe(self) -> Dialect:
        refusals = []
        for dialect in (
            Dialect("base64", True), Dialect("float", True), Dialect("base64", False), Dialect("float", False)
        ):  # fmt: skip
            try:
                found, batch = await self._probe_in(dialect)
            except RequestRefusedError as error:
                refusals.append(str(error))
                continue
            self.endpoint.check_size(batch.n_values)
            await asyncio.to_thread(self._check_probe, batch.embeddings[0])
            self.n_probe_tokens = 0
            return replace(found, n_values=batch.n_values)
        raise ProviderError(
            f"{self.endpoint.url} refuses even one short text for model {self.endpoint.model!r}, with and without "
            f"base64 and `dimensions`. The last answer: {refusals[-1]}",
            "provider.refuses-all",
        )

    async def _probe_in(self, dialect: Dialect) -> tuple[Dialect, EmbeddingBatch]:
        """The probe's vector; in the float format, if the base64 does not hold float32.

        Raises:
            RequestRefusedError: the server does not understand the dialect.
        """
        if dialect.encoding_format == "float":
            return dialect, await self._send_probe(dialect, until_good=True)
        batch = await self._send_probe(dialect)
        if not batch.bad and batch.n_values == self.dimensions:
            return dialect, batch
        # float64 or int8, read as float32, have another size, and may be NaN
        as_numbers = replace(dialect, encoding_format="float")
        try:
            numbers = await self._send_probe(as_numbers, until_good=True)
        except RequestRefusedError:
            return dialect, await self._send_probe(dialect, until_good=True) if batch.bad else batch
        return (as_numbers, numbers) if batch.bad or numbers.n_values != batch.n_values else (dialect, batch)

    async def _send_probe(self, dialect: Dialect, until_good: bool = False) -> EmbeddingBatch:
        """The answer to a probe; `until_good`: retry an answer without a good vector."""
        batch = await self._request_patiently(_PROBE, dialect, self._probe_hooks, until_good)
        self._probe_hooks.n_tokens += batch.n_tokens
        return batch

    async def _request_patiently(
        self, texts: Sequence[str], dialect: Dialect, hooks: RequestHooks, until_good: bool = False
    ) -> EmbeddingBatch:
        """Retry until there is an answer; `until_good`: answers without any good vector do not count."""
        request = self._encode(texts, dialect)
        n_retries = n_limited = n_alike = n_timeouts = n_proofs = 0
        kind, first_at = "", time.monotonic()
        while True:
            await hooks.before_try()
            started = time.monotonic()
            outcome = await self._try_once(request, dialect, hooks, until_good)
            self._contact.count_try(outcome if isinstance(outcome, Failure) else None, started)
            if isinstance(outcome, EmbeddingBatch):
                if texts is not _PROBE:
                    self._last_served_at = time.monotonic()
                return replace(outcome, n_retries=n_retries, n_limited=n_limited)
            hooks.count_unusable(request.n_tokens if outcome.may_be_billed else 0)
            if outcome.kind != kind:
                kind, n_alike, n_proofs, first_at = outcome.kind, 0, 0, started
            is_limited = outcome.status == 429
            n_retries, n_alike, n_limited = n_retries + 1, n_alike + 1, n_limited + is_limited
            n_timeouts += outcome.kind == TIMEOUT
            if outcome.alone and n_timeouts > 1 and len(texts) > 1:
                raise RequestTooSlowError(f"{self.endpoint.url}: {outcome.message}")
            most = MAX_ALIKE_OF_PART if hooks.is_part and len(texts) > 1 else MAX_ALIKE
            # whether the texts are at fault shows in whether other requests succeed
            may_be_the_texts = outcome.sent and texts is not _PROBE
            if is_limited:
                since = time.monotonic() - QUOTA_WINDOW_S
                may_be_the_texts &= len(texts) > 1 and max(first_at, self._last_served_at) < since
            if may_be_the_texts and n_alike >= most and await self.answers_well(started):
                n_proofs += 1
                if n_proofs >= _N_PROOFS:
                    fails = RequestTooLargeError if is_limited else RequestFailsError
                    raise fails(f"{self.endpoint.url} {outcome.message}")
                continue  # if the server had been down, it is back now: try the request once more
            await self._contact.wait_to_try_again(outcome, n_retries)

    def _encode(self, texts: Sequence[str], dialect: Dialect) -> Request:
        dimensions = self.dimensions if dialect.sends_dimensions else None
        n_bytes = sum(len(text.encode()) for text in texts)
        [n_tokens] = self._estimator.estimate([n_bytes])
        body = encode_request(self.endpoint.model, texts, dialect.encoding_format, dimensions)
        return Request(body, len(texts), n_bytes, n_tokens)

    async def _try_once(
        self, request: Request, dialect: Dialect, hooks: RequestHooks, until_good: bool
    ) -> EmbeddingBatch | Failure:
        """Send a request once, as soon as window and quota allow it, and settle its share of the quota.

        Raises:
            ProviderError: an answer after which a retry cannot help.
        """
        usual_s = min(MAX_TIMEOUT_S, self._window.stretch * (BASE_TIMEOUT_S + request.n_tokens / TOKENS_PER_SECOND))
        is_first = not self._contact.has_answered
        timeout_s = FIRST_TIMEOUT_S if is_first else usual_s
        async with self._window.slot(self._patience.stop.check):
            hooks.check_size()
            grant = await self._gate.next_grant(request.n_tokens)
            billed_tokens: int | None = 0
            try:
                await hooks.before_send()
                billed_tokens = None
                sent_at = time.monotonic()
                with self._contact.reporting_the_wait():
                    outcome = await self._transport.send(request, dialect, timeout_s, is_first)
                now = time.monotonic()
                if isinstance(outcome, Failure):
                    if outcome.kind == TIMEOUT:
                        outcome = self._narrow(outcome, sent_at, now)
                    billed_tokens = None if outcome.sent else 0
                else:
                    self._window.count_answer(now - sent_at, usual_s, outcome.n_bytes)
                    billed_tokens = outcome.n_tokens or None
            finally:
                if billed_tokens is not None:  # unknown after a try that was sent: then the estimate stays charged
                    self._gate.limiter.settle(grant, billed_tokens)
        if isinstance(outcome, Failure):
            if outcome.status == 429:
                outcome = replace(outcome, retry_after_s=await self._gate.slow_down(grant, outcome.retry_after_s))
            return outcome
        self._gate.count_answer()
        self._estimator.observe(request.n_bytes, outcome.n_tokens)
        if len(outcome.bad) < request.n_texts:
            self._contact.count_good()
        elif until_good:
            return Failure("bad vector", "a vector that is zero, null or not finite for 'probe'", may_be_billed=True)
        # if the server does not say what it bills, the estimate counts: otherwise budgets would have no effect
        return replace(outcome, n_tokens=outcome.n_tokens or request.n_tokens)

    def _narrow(self, failure: Failure, sent_at: float, now: float) -> Failure:
        """Allow fewer requests in flight after a time-out, and report it in the failure."""
        alone = self._window.count_timeout(sent_at, now)
        message = (
            f"{failure.message}; requests in flight from now on: up to {self._window.n_allowed}. If this goes on, "
            "lower SONGVEC_CONCURRENCY and SONGVEC_MAX_REQUEST_TOKENS"
        )
        return replace(failure, message=message, alone=alone)
