"""What one request has reserved of a budget, the probes before it included: it grows with each try, is settled once.

When to add here: another way in which a request pays. Keep out: the limits, and where they are kept (`budget`).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import Embedder, RequestHooks
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import BudgetExceededError

_POLL_S = 0.05


@dataclass
class Reservation(RequestHooks):
    """What one request reserves of a budget and was billed, over all its tries and the probes before it:

        async with Reservation(embedder, budget, n_tokens=900, check=run.check_stop) as reservation:
            batch = await reservation.send(texts)

    It is settled at the end of the block, where answers are stored. If it is cancelled, the try in flight may have been
    billed, and counts.

    Attributes:
        embedder: sends the request.
        budget: of the run, or of searches.
        n_tokens: of one try, as estimated; probes are added.
        check: raises if the request must not wait any longer.
        n_reserved, n_billed: tokens.
        month: in which it counts.
    """

    embedder: Embedder
    budget: Budget
    n_tokens: int
    check: Callable[[], None]
    n_reserved: int = field(default=0, init=False)
    n_billed: int = field(default=0, init=False)
    month: str | None = field(default=None, init=False)
    _is_in_flight: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # a process that is killed before its first answer has paid for a probe, too
        self.n_tokens += self.embedder.n_probe_tokens

    async def __aenter__(self) -> Self:
        try:
            await self.before_try()  # before the probe, which no hook precedes
        except asyncio.CancelledError as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.n_billed += self.n_tokens * self._is_in_flight
        self.n_billed += self.embedder.take_probe_tokens()
        try:
            await self.budget.settle_together(self.n_reserved, self.n_billed, self.month)
        finally:
            self.budget.n_held -= self.n_reserved > 0
            self.budget.n_settled += 1

    async def send(self, texts: Sequence[str]) -> EmbeddingBatch:
        """Send the request; see `Embedder.generate_embeddings_batch`."""
        batch = await self.embedder.generate_embeddings_batch(texts, self)
        self._is_in_flight = False
        self.n_billed += batch.n_tokens
        return batch

    async def before_try(self) -> None:
        """Reserve what the next try needs, in addition to earlier tries that may be billed.

        Raises:
            BudgetExceededError: the budget is too small, and no request is in flight that could release a part of it.
        """
        self._is_in_flight = False
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
                    await self._reserve(missing)
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

    async def _reserve(self, n_tokens: int) -> None:
        # in no task: the end of the event loop would cancel it, and the database would still grant the amount
        reserving = asyncio.get_running_loop().run_in_executor(None, self.budget.reserve, n_tokens)
        try:
            await asyncio.shield(reserving)
        finally:
            await asyncio.wait([reserving])
            if reserving.exception() is None:
                self.month = reserving.result()
                self.n_reserved += n_tokens

    async def before_send(self) -> None:
        self._is_in_flight = True

    def count_unusable(self, n_tokens: int) -> None:
        self._is_in_flight = False
        self.n_billed += n_tokens
