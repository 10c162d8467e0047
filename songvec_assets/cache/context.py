"""What all requests of a run share: the means and the limits, what was learned of the server, how far the run has come.

When to add here: another fact that holds for all ranges of a run. Keep out: what becomes of one range's texts.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from songvec_assets.cache.plan import FillReport
from songvec_assets.embedding.batching import LearnedLimits
from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import Embedder
from songvec_assets.embedding.health import ServerHealth
from songvec_assets.embedding.pricing import Quota, TokenEstimator
from songvec_assets.errors import BudgetExceededError, ProviderUnavailableError, StoreError
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange

_GROWTH = 1.1
"""By which requests grow again with each answer, after one took too long."""


@dataclass
class SendContext:
    """What all requests of a run share: the means, the rules, what was learned and counted so far.

    Attributes:
        embedder_factory: makes what makes the vectors; called once, in the event loop, when a first text must be sent.
            Its argument is notified of every bad answer, and of long waits for the first.
        quota: limits of a request.
        budget: stops before the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        concurrency: requests in flight at most; how many there are follows from the quota and the latency.
        server: that is asked; the reason of a rejection begins with it, so that another server is asked again.
        run: is notified of songs, rate and dollars; once it is stopped, no further request starts.
        health: of the server.
        limits: of a request, as the server was found to have them; for all ranges of the run.
        slow_bytes: of a request; smaller, once one took too long, and larger with each answer since.
        n_refused_in_a_row: texts that were refused since one was accepted, in any range.
        n_songs, n_done, n_free: of all ranges; done so far; and of those the ones that no request was sent for.
        reports: of the ranges begun so far.
        fatal: why no further request may start.
        over_budget: why no further range may begin.
    """

    embedder_factory: Callable[[Callable[[str], None]], Embedder]
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    concurrency: int
    server: str
    run: RunContext
    health: ServerHealth = field(default_factory=ServerHealth)
    limits: LearnedLimits = field(default_factory=LearnedLimits)
    slow_bytes: float = math.inf
    n_refused_in_a_row: int = 0
    n_songs: int = 0
    n_done: int = 0
    n_free: int = 0
    reports: list[FillReport] = field(default_factory=list)
    fatal: Exception | None = None
    over_budget: BudgetExceededError | None = None

    @cached_property
    def embedder(self) -> Embedder:
        """What makes the vectors; it belongs to the event loop that first asks for it."""
        return self.embedder_factory(self.report_trouble)

    @cached_property
    def slots(self) -> asyncio.Semaphore:
        """Requests begun at most, over all ranges."""
        return asyncio.Semaphore(self.concurrency)

    async def close(self) -> None:
        """Give the embedder's connections back, if it was used, and settle what its plain texts were billed."""
        if "embedder" in self.__dict__:
            try:
                await asyncio.to_thread(self.budget.settle, 0, self.embedder.take_probe_tokens())
            finally:
                await self.embedder.close()

    def next_request(self) -> tuple[float, float]:
        """Texts and bytes that the next request may hold, as far as tokens and the server's limits are known."""
        n_texts, n_bytes = self.limits.next_request()
        most_bytes = self.estimator.n_bytes(self.quota.max_request_tokens)
        return min(self.quota.max_request_texts, n_texts), min(most_bytes, n_bytes, self.slow_bytes)

    def count_accepted(self, n_texts: int) -> None:
        """Record that n texts got their vectors in one answer."""
        self.health.count_good(n_texts)
        self.n_refused_in_a_row = 0
        self.slow_bytes *= _GROWTH
        if self.slow_bytes > self.estimator.n_bytes(self.quota.max_request_tokens):
            self.slow_bytes = math.inf

    def note_error(self, error: Exception) -> None:
        """Let no further request start where going on is pointless: one range may fail for what is in it."""
        if isinstance(error, BudgetExceededError):
            # no further range begins, but what has its share of the budget is still sent
            self.over_budget = self.over_budget or error
        elif not isinstance(error, (StoreError, ProviderUnavailableError)):
            self.fatal = self.fatal or error

    def check_halted(self) -> None:
        """Raise where no further request may start."""
        if self.fatal:
            raise self.fatal
        self.run.check_stop()

    def total(self, name: str) -> int:
        """The sum of a count over the ranges begun so far."""
        return sum(getattr(each, name) for each in self.reports)

    def advance(self, n_songs: int, song_range: SongIdRange, are_free: bool = False) -> None:
        """Report n_songs more that need nothing further; `are_free` if no request was sent for them."""
        self.n_done += n_songs
        self.n_free += n_songs if are_free else 0
        self.report(song_range.key)

    def report_trouble(self, words: str) -> None:
        """Report that something goes wrong, or a limit of the server."""
        self.report(words, is_trouble=True)

    def report(self, what: str, is_trouble: bool = False) -> None:
        """Report how far the run has come, with a few words on what it does."""
        note = f"{what}, ${self.budget.usd:,.4f} so far"
        used = self.embedder.quota_used if "embedder" in self.__dict__ else None
        if used is not None:
            n_retries, n_limited = self.total("n_retries"), self.total("n_limited")
            note += f", {used:.0%} of the quota used, {n_retries:,} retries, {n_limited:,} of them after 429"
        if self.run.stop.is_set():
            note += "; stopping: requests in flight are still stored"
        self.run.report(Progress("embed songs", self.n_done, self.n_songs, "songs", note, is_trouble, self.n_free))
