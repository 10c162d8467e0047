"""What one request has reserved of a budget: it grows with each try, and is settled once.

When to add here: another way in which a request pays. Keep out: the limits, and where they are kept (`budget`).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import Embedder, RequestHooks
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import BudgetExceededError

_POLL_S = 0.05


@dataclass
class Reservation:
    """What one request has reserved of a budget, and was billed, over all its tries. Settle it exactly once.

    Attributes:
        budget: of the run.
        n_tokens: of one try, as estimated.
        check: raises if the request must not wait any longer.
        n_reserved, n_billed: tokens.
        month: in which it counts.
    """

    budget: Budget
    n_tokens: int
    check: Callable[[], None]
    n_reserved: int = 0
    n_billed: int = 0
    month: str | None = None

    async def grow(self) -> None:
        """Reserve what the next try needs, in addition to earlier tries that may be billed.

        Raises:
            BudgetExceededError: the budget is too small, and no request is in flight that could release a part of it.
        """
        if (missing := self.n_billed + self.n_tokens - self.n_reserved) <= 0:
            return
        budget = self.budget
        # a reservation that waits for more releases nothing
        budget.n_held -= self.n_reserved > 0
        try:
            while True:
                self.check()
                n_settled = budget.n_settled
                budget.n_asking += 1
                try:
                    self.month = await asyncio.to_thread(budget.reserve, missing)
                    self.n_reserved += missing
                    return
                except BudgetExceededError:
                    # if the estimates were too high, requests in flight release the difference
                    if budget.n_settled == n_settled and not budget.n_held and budget.n_asking == 1:
                        raise
                finally:
                    budget.n_asking -= 1
                await asyncio.sleep(_POLL_S)
        finally:
            budget.n_held += self.n_reserved > 0

    async def settle(self) -> None:
        """Replace what is reserved by what was billed."""
        try:
            await self.budget.settle_together(self)
        finally:
            self.budget.n_held -= self.n_reserved > 0
            self.budget.n_settled += 1


@dataclass
class ReservationHooks(RequestHooks):
    """Reserves the budget before each try of a request, and counts tries that may be billed without an answer."""

    reservation: Reservation
    _is_in_flight: bool = field(default=False, init=False)

    async def before_try(self) -> None:
        self._is_in_flight = False
        await self.reservation.grow()

    async def before_send(self) -> None:
        self._is_in_flight = True

    def count_unusable(self, n_tokens: int) -> None:
        self._is_in_flight = False
        self.reservation.n_billed += n_tokens


async def send_alone(embedder: Embedder, texts: Sequence[str], reservation: Reservation) -> EmbeddingBatch:
    """Send one request and settle its reservation, which then has what was billed, probes included.

    If it is cancelled, the try in flight may have been billed, and counts.
    """
    hooks = ReservationHooks(reservation)
    reservation.n_tokens += embedder.n_probe_tokens
    try:
        await hooks.before_try()  # before the probe, which no hook precedes
        batch = await embedder.generate_embeddings_batch(texts, hooks)
        reservation.n_billed += batch.n_tokens
        return batch
    except asyncio.CancelledError:
        reservation.n_billed += reservation.n_tokens * hooks._is_in_flight
        raise
    finally:
        reservation.n_billed += embedder.take_probe_tokens()
        await reservation.settle()
