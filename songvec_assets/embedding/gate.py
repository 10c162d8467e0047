"""When a request may go: its place in flight, and its place in the quota. Used within one event loop; no HTTP.

Places in flight are more while answers come quickly, fewer after time-outs: additive increase, multiplicative decrease,
as TCP's congestion window (Jacobson 1988). A server that answers slower the more it is asked would otherwise compute,
and bill, requests that nobody waits for any more.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from songvec_assets.embedding.contact import MAX_PAUSE_S
from songvec_assets.embedding.embedder import Patience
from songvec_assets.embedding.limits import Grant, RateLimiter

FIRST = 4
"""In flight at first: a small server has answered before more is asked of it; a fast one has 32 after three answers."""
_QUICK_SHARE, _SLOW_SHARE = 0.25, 0.5
"""Answers that take a smaller share of their time limit than the first let many more go; than the second, a few."""


class InFlightWindow:
    """A limit of requests in flight that follows the server.

    Args:
        highest: requests in flight at most.

    Attributes:
        stretch: times the usual time limit that a request gets: a server computes on for clients that hung up, so after
            a time-out it is waited for longer, until answers come.
    """

    def __init__(self, highest: int) -> None:
        self._highest = highest
        self._size = float(min(FIRST, highest))
        self._n_in_flight = 0
        self._shrunk_at = float("-inf")
        self._changed = asyncio.Condition()
        self.stretch = 1.0

    @property
    def n_allowed(self) -> int:
        """Requests that may be in flight now."""
        return int(self._size)

    @contextlib.asynccontextmanager
    async def place(self, check: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for a place and hold it for the block.

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

    def count_answer(self, seconds: float, timeout_s: float) -> None:
        """Let more go after an answer: twice as many a round at first, one more a round if it was not so quick."""
        self.stretch = max(1.0, self.stretch / 2)
        if seconds < _SLOW_SHARE * timeout_s:
            has_shrunk = self._shrunk_at > float("-inf")
            is_first_growth = seconds < _QUICK_SHARE * timeout_s and not has_shrunk
            self._size = min(self._highest, self._size + (1 if is_first_growth else 1 / self._size))

    def count_timeout(self, sent_at: float, now: float) -> bool:
        """Halve the window after a time-out, once for all requests that were in flight together.

        Args:
            sent_at: when it was sent.
            now: on the same clock.

        Returns:
            Whether it is alone in flight: fewer requests cannot help it, a smaller one may.
        """
        if sent_at >= self._shrunk_at:
            self.stretch *= 2
            self._size, self._shrunk_at = max(1.0, self._size / 2), now
        return self._n_in_flight == 1


class QuotaGate:
    """Grants places in the shared quota one after another: none is granted further ahead than the next request."""

    def __init__(self, limiter: RateLimiter, patience: Patience) -> None:
        self.limiter = limiter
        self._patience = patience
        self._turn = asyncio.Lock()
        self._newest_grant_at = self._limited_until = 0.0
        self._n_limited_in_a_row = 0

    async def next_grant(self, n_tokens: int) -> Grant:
        """Wait for a place in the quota."""
        async with self._turn:
            self._patience.stop.check()
            grant = await asyncio.to_thread(self.limiter.reserve, n_tokens)
            self._newest_grant_at = grant.at
            await self._patience.sleep(grant.wait_s)
            return grant

    def count_answer(self) -> None:
        """The server answered something else than 429."""
        self._n_limited_in_a_row = 0

    async def slow_down(self, grant: Grant, retry_after_s: float | None) -> float:
        """Hold back every request of the deployment after a 429; for how many seconds."""
        if grant.at > self._limited_until:
            self._n_limited_in_a_row += 1
            # what was granted until now is limited for the same reason: it does not make the pause longer
            self._limited_until = self._newest_grant_at
        if retry_after_s is None:
            retry_after_s = min(MAX_PAUSE_S, 2.0 ** min(self._n_limited_in_a_row - 1, 20))
        await asyncio.to_thread(self.limiter.slow_down, grant, retry_after_s)
        return retry_after_s
