"""What all requests of a run share: embedder, limits, what was learned about the server, and the run's progress.

When to add here: other state that all ranges of a run share. Keep out: what happens to one range's texts (`requests`).
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
from songvec_assets.errors import BudgetExceededError, ProviderUnavailableError, StoreError, UnwritableError
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.ranges import SongIdRange

_GROWTH = 1.1
"""Factor by which requests grow again per answer, after one timed out."""


@dataclass
class SendContext:
    """See the module.

    Attributes:
        embedder_factory: makes the embedder; called once, in the event loop, before the first text is sent. Its
            argument is called with a note on every bad answer, and on long waits for the first.
        quota: limits of a request.
        budget: refuses the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        concurrency: maximum requests in flight; the actual number follows from quota and latency.
        server: its name; the reason of a rejection begins with it, so that another server gets the text again.
        run: receives progress; once it is stopped, no further request starts.
        limits: of a request, as learned from the server's refusals.
        slow_bytes: limit of a request's bytes, lowered after a request timed out, and raised by each answer since.
        n_songs, n_done, n_free: songs of all ranges; those done so far; those of them done without a request.
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
    n_songs: int = 0
    n_done: int = 0
    n_free: int = 0
    reports: list[FillReport] = field(default_factory=list)
    fatal: Exception | None = None
    over_budget: BudgetExceededError | None = None

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder; it belongs to the event loop of the first access."""
        return self.embedder_factory(self.report_trouble)

    @cached_property
    def slots(self) -> asyncio.Semaphore:
        """Limits the requests that are begun, over all ranges, until their answers are stored: a kill costs no more."""
        return asyncio.Semaphore(self.concurrency)

    async def close(self) -> None:
        """Close the embedder, if it was used, and settle the tokens of its probes."""
        if "embedder" in self.__dict__:
            try:
                await self.settle_probes()
            finally:
                await self.embedder.close()

    async def settle_probes(self) -> int:
        """Count the tokens of probes that no request has settled yet, as billed; returns them."""
        n_tokens = self.embedder.take_probe_tokens()
        await asyncio.to_thread(self.budget.settle, 0, n_tokens)
        return n_tokens

    def next_request(self) -> tuple[float, float]:
        """Maximum texts and bytes of the next request, by the quota and by what is known of the server."""
        n_texts, n_bytes = self.limits.next_request()
        most_bytes = self.estimator.n_bytes(self.quota.max_request_tokens)
        return min(self.quota.max_request_texts, n_texts), min(most_bytes, n_bytes, self.slow_bytes)

    def count_accepted(self, n_texts: int) -> None:
        """Record that n texts got their vectors in one answer."""
        self.health.count_good(n_texts)
        self.slow_bytes *= _GROWTH
        if self.slow_bytes > self.estimator.n_bytes(self.quota.max_request_tokens):
            self.slow_bytes = math.inf

    def note_error(self, error: Exception) -> None:
        """Stop the run after an error that all ranges would meet; after an error of a single range it goes on."""
        if isinstance(error, BudgetExceededError):
            # no further range begins, but requests with a reservation are still sent
            self.over_budget = self.over_budget or error
        elif isinstance(error, UnwritableError) or not isinstance(error, (StoreError, ProviderUnavailableError)):
            self.fatal = self.fatal or error

    def check_halted(self) -> None:
        """Raise if no further request may start."""
        if self.fatal:
            raise self.fatal
        self.run.check_stop()

    def total(self, name: str) -> int:
        """The sum of a count over the ranges begun so far."""
        return sum(getattr(each, name) for each in self.reports)

    def advance(self, n_songs: int, song_range: SongIdRange, are_free: bool = False) -> None:
        """Report n_songs more as done; `are_free`: without a request."""
        self.n_done += n_songs
        self.n_free += n_songs if are_free else 0
        self.report(song_range.key)

    def report_trouble(self, note: str) -> None:
        """Report a problem, or a limit of the server, as a warning."""
        self.report(note, is_trouble=True)

    def report(self, what: str, is_trouble: bool = False) -> None:
        """Report the run's progress, with a few words on its current work."""
        note = f"{what}, ${self.budget.usd:,.4f} so far"
        used = self.embedder.quota_used if "embedder" in self.__dict__ else None
        if used is not None:
            n_retries, n_limited = self.total("n_retries"), self.total("n_limited")
            note += f", {used:.0%} of the quota used, {n_retries:,} retries, {n_limited:,} of them after 429"
        if self.run.stop.is_set():
            note += "; stopping: requests in flight are still stored"
        self.run.report(Progress("embed songs", self.n_done, self.n_songs, "songs", note, is_trouble, self.n_free))
