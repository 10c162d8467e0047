"""When a request may be sent: the window of requests in flight, and the quota. Used within one event loop; no HTTP.

The window grows while answers are quick and shrinks after time-outs: additive increase, multiplicative decrease, like
TCP's congestion window (Jacobson 1988). Otherwise an overloaded server would compute, and bill, requests that have
already timed out.
When to add here: another rule that delays requests. Keep out: the quota's arithmetic (`limits`), retries (`client`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from songvec_assets.embedding.contact import MAX_PAUSE_S
from songvec_assets.embedding.embedder import Patience
from songvec_assets.embedding.limits import Grant, RateLimiter

FIRST = 4
"""Requests in flight at first: a small server can answer before it gets more; a fast one gets 32 after three rounds."""
MAX_ANSWER_BYTES = 768 << 20
"""Bytes of answers in flight: they may all arrive before the first one is decoded. Floats of 2,048 texts take 42 MB."""
_QUICK_SHARE, _SLOW_SHARE = 0.25, 0.5
"""Answers within the first share of their time limit grow the window fast, within the second slowly."""


class InFlightWindow:
    """A limit of requests in flight that adapts to the server.

    Args:
        highest: maximum requests in flight.

    Attributes:
        stretch: factor of a request's time limit. A server keeps computing requests that timed out, so after a time-out
            it gets more time, until answers arrive.
    """

    def __init__(self, highest: int) -> None:
        self._highest = highest
        self._size = float(min(FIRST, highest))
        self._largest = 1
        self._n_in_flight = 0
        self._shrunk_at = float("-inf")
        self._changed = asyncio.Condition()
        self.stretch = 1.0

    @property
    def n_allowed(self) -> int:
        """Maximum requests in flight at the moment."""
        return max(1, min(int(self._size), MAX_ANSWER_BYTES // self._largest))

    @contextlib.asynccontextmanager
    async def slot(self, check: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for a slot and hold it for the block.

        Args:
            check: called whenever something changes; raises to give up.
        """
        async with self._changed:
            check()
            while self._n_in_flight >= self.n_allowed:
                await self._changed.wait()
                check()
            self._n_in_flight += 1
        try:
            yield
        finally:
            async with self._changed:
                self._n_in_flight -= 1
                self._changed.notify_all()

    def count_answer(self, seconds: float, timeout_s: float, n_bytes: int) -> None:
        """Grow the window after an answer: it doubles per round at first; after time-outs or slow answers, by one."""
        self._largest = max(self._largest, n_bytes)
        self.stretch = max(1.0, self.stretch / 2)
        if seconds < _SLOW_SHARE * timeout_s:
            has_shrunk = self._shrunk_at > float("-inf")
            is_first_growth = seconds < _QUICK_SHARE * timeout_s and not has_shrunk
            self._size = min(self._highest, self._size + (1 if is_first_growth else 1 / self._size))

    def count_timeout(self, sent_at: float, now: float) -> bool:
        """Halve the window after a time-out, once for all requests that were in flight together.

        Args:
            sent_at: when the request was sent.
            now: on the same clock.

        Returns:
            Whether the request is alone in flight: then fewer requests cannot help, but a smaller one may.
        """
        if sent_at >= self._shrunk_at:
            self.stretch *= 2
            self._size, self._shrunk_at = max(1.0, self._size / 2), now
        return self._n_in_flight == 1


class QuotaGate:
    """Takes requests from the shared quota one after another, so that only the next one is granted in advance."""

    def __init__(self, limiter: RateLimiter, patience: Patience) -> None:
        self.limiter = limiter
        self._patience = patience
        self._turn = asyncio.Lock()
        self._newest_grant_at = self._limited_until = 0.0
        self._n_limited_in_a_row = 0

    async def next_grant(self, n_tokens: int) -> Grant:
        """Wait until the quota allows a request of `n_tokens`."""
        async with self._turn:
            self._patience.stop.check()
            grant = await asyncio.to_thread(self.limiter.reserve, n_tokens)
            self._newest_grant_at = grant.at
            await self._patience.sleep(grant.wait_s)
            return grant

    def count_answer(self) -> None:
        """Record an answer other than 429."""
        self._n_limited_in_a_row = 0

    async def slow_down(self, grant: Grant, retry_after_s: float | None) -> float:
        """Pause all requests of the deployment after a 429; returns the seconds."""
        if grant.at > self._limited_until:
            self._n_limited_in_a_row += 1
            # 429s of requests that are already granted have the same cause: they do not make the pause longer
            self._limited_until = self._newest_grant_at
        if retry_after_s is None:
            retry_after_s = min(MAX_PAUSE_S, 2.0 ** min(self._n_limited_in_a_row - 1, 20))
        await asyncio.to_thread(self.limiter.slow_down, grant, retry_after_s)
        return retry_after_s
