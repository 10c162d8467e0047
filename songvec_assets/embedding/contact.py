"""The record of a server's answers, and what follows from it: how long to retry, and how long to wait between tries.

When to add here: another reason to wait longer, or to give up. Keep out: what an answer means (`answers`), and limits
of requests in flight and of the quota (`gate`). Times are seconds; points in time are those of `time.monotonic()`.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator

from songvec_assets.embedding.embedder import Patience
from songvec_assets.embedding.transport import Failure
from songvec_assets.errors import ProviderError, ProviderUnavailableError

MAX_BACKOFF_S = 120.0
MAX_PAUSE_S = 5.0
"""All requests pause after a 429 without Retry-After: 1 s, then 2, 4, up to this."""
FIRST_NOTE_S, NOTE_EVERY_S = 3.0, 60.0
"""When waiting for the first answer is reported, and how often again."""


class ServerContact:
    """Since when a server has been failing, over all requests of a client, and whether it ever worked.

    Attributes:
        last_good_at: when it last gave a good vector; minus infinity: never.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self._url = url
        self._patience = patience
        self.last_good_at = float("-inf")
        self._failing_since: float | None = None
        self._unreached_since: float | None = None

    @property
    def has_answered(self) -> bool:
        """Whether there was a good answer to any request: the URL is right."""
        return self.last_good_at > float("-inf")

    def count_good(self) -> None:
        """Record that a text got its vector."""
        self.last_good_at, self._failing_since = time.monotonic(), None

    def count_try(self, failure: Failure | None, started: float) -> None:
        """Record since when all tries have failed as if the URL were wrong."""
        if failure is None or failure.first_patience_s is None:
            self._unreached_since = None
        elif self._unreached_since is None:
            self._unreached_since = started

    async def wait_to_try_again(self, failure: Failure, n_retries: int) -> None:
        """Sleep before the next try.

        Raises:
            ProviderUnavailableError: the patience ends before the next try.
            ProviderError: there was no good answer yet, and the URL seems to be wrong.
        """
        # full jitter (Brooker 2015)
        wait_s = random.uniform(0, min(MAX_BACKOFF_S, 0.5 * 2 ** min(n_retries - 1, 20)))
        if failure.status == 429:
            wait_s = min(MAX_PAUSE_S, wait_s)
        wait_s = max(failure.retry_after_s or 0.0, wait_s)
        now = time.monotonic()
        # patience begins with the first bad answer after the last good one, of any request
        self._failing_since = now if self._failing_since is None else self._failing_since
        left_s = self._patience.seconds - (now - self._failing_since)
        if self._unreached_since is not None and not self.has_answered:
            first_left_s = (failure.first_patience_s or 0.0) - (now - self._unreached_since)
            if wait_s > first_left_s:
                raise self._describe_first_contact(failure)
            left_s = min(left_s, first_left_s)
        if wait_s > left_s:
            raise ProviderUnavailableError(
                f"{self._url} gave no good answer for {self._patience.seconds:g} s (SONGVEC_PATIENCE_S), last: "
                f"{failure.message}. All that was paid for is kept: start the same command again later"
            )
        self._patience.on_trouble(f"{failure.message}; next try in {wait_s:.0f} s, for {left_s:.0f} s at most")
        await self._patience.sleep(wait_s)

    def _describe_first_contact(self, failure: Failure) -> ProviderError:
        """The error of a server without any good answer yet that fails as if the URL were wrong."""
        url, message = f"{self._url.rstrip('/')}/embeddings", f"{failure.message} ({failure.advice})"
        if failure.kind == "connection":
            return ProviderUnavailableError(
                f"{url} cannot be reached: {message}. All that was paid for is kept", "provider.unreachable"
            )
        return ProviderError(f"{url} gives no embeddings: {message}", "provider.wrong-url")

    @contextlib.contextmanager
    def reporting_the_wait(self) -> Iterator[None]:
        """Within the block, report a long wait for the first answer."""
        loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()

        def report(waited_s: float) -> None:
            self._patience.on_trouble(
                f"waiting for {self._url}: no answer after {waited_s:.0f} s; to load a model may take minutes"
            )
            timers[:] = [loop.call_later(NOTE_EVERY_S, report, waited_s + NOTE_EVERY_S)]

        if not self.has_answered:
            timers.append(loop.call_later(FIRST_NOTE_S, report, FIRST_NOTE_S))
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
