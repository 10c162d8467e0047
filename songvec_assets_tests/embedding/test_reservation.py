"""What one request reserves, over its tries, and how it is settled."""

import asyncio
import time

import pytest
import sqlalchemy as sa

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import NO_HOOKS, Embedder, RequestHooks
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.embedding.pricing import Price
from songvec_assets.embedding.reservation import Reservation
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import BudgetExceededError

DOLLAR_A_TOKEN = Price(1e6)


class Hanging(Embedder):
    """Sends one try, to which no answer comes; its probe was billed 1 token."""

    dimensions = 4

    async def generate_embeddings_batch(self, texts: object, hooks: RequestHooks = NO_HOOKS) -> EmbeddingBatch:  # noqa: ARG002
        await hooks.before_send()
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    def take_probe_tokens(self) -> int:
        return 1


def test_a_request_that_is_given_up_counts_as_billed(engine: sa.Engine, run: str) -> None:
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 100)

    async def give_up() -> None:
        async with asyncio.timeout(0.2):
            async with Reservation(Hanging(), budget, 7, lambda: None) as reservation:
                await reservation.send(["waves"])

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert (budget.n_tokens, budget.n_held) == (8, 0)
    with pytest.raises(BudgetExceededError, match=r"\$8\.0000 billed, \$0\.0000 reserved"):
        budget.reserve(93)


@pytest.mark.parametrize("n_earlier", [0, 1])
def test_what_is_granted_to_a_request_that_was_given_up_meanwhile_is_given_back(
    engine: sa.Engine, run: str, monkeypatch: pytest.MonkeyPatch, n_earlier: int
) -> None:
    """The thread that asks the database cannot be cancelled."""
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 100)
    reserve, n_asked = budget.reserve, 0

    def reserve_slowly(n_tokens: int) -> str | None:
        nonlocal n_asked
        n_asked += 1
        if n_asked > n_earlier:
            time.sleep(0.6)
        return reserve(n_tokens)

    monkeypatch.setattr(budget, "reserve", reserve_slowly)

    async def give_up() -> None:
        async with asyncio.timeout(0.2):
            async with Reservation(OfflineEmbedder(4), budget, 7, lambda: None) as reservation:
                reservation.count_unusable(7)
                await reservation.before_try()

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert (n_asked, budget.n_tokens, budget.n_held) == (n_earlier + 1, 7 * n_earlier, 0)
    with pytest.raises(BudgetExceededError, match=r"\$0\.0000 reserved"):
        reserve(101)


def test_a_request_that_is_given_up_before_its_next_try_counts_what_was_billed(engine: sa.Engine, run: str) -> None:
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 100)

    async def give_up(n_billed: int) -> None:
        async with asyncio.timeout(0.2):
            async with Reservation(OfflineEmbedder(4), budget, 7, lambda: None) as reservation:
                await reservation.before_send()
                reservation.count_unusable(n_billed)
                await asyncio.sleep(60)

    for n_billed, n_tokens in ((0, 0), (7, 7)):
        with pytest.raises(TimeoutError):
            asyncio.run(give_up(n_billed))
        assert budget.n_tokens == n_tokens


def test_what_a_request_reserves_covers_the_probe_before_it(engine: sa.Engine, run: str) -> None:
    """A process that is killed settles nothing: what it had reserved is all that the budget knows."""
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 100)

    class Probing(Hanging):
        n_probe_tokens = 8

    async def begin() -> int:
        async with Reservation(Probing(), budget, 7, lambda: None) as reservation:
            return reservation.n_reserved

    assert asyncio.run(begin()) == 15


def test_answers_that_come_at_once_are_settled_together(engine: sa.Engine, run: str) -> None:
    """They lock the same row: one after the other each would wait for the commits of all before it."""
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 100)
    statements: list[str] = []

    def note(*event: object) -> None:
        statements.append(str(event[2]))

    async def spend() -> None:
        reservations = [Reservation(OfflineEmbedder(4), budget, 4, lambda: None) for _ in range(8)]
        await asyncio.gather(*(each.__aenter__() for each in reservations))
        for billed, each in enumerate(reservations):
            each.n_billed = billed
        sa.event.listen(engine, "before_cursor_execute", note)
        await asyncio.gather(*(each.__aexit__(None, None, None) for each in reservations))
        sa.event.remove(engine, "before_cursor_execute", note)

    asyncio.run(spend())
    assert 1 <= len(statements) <= 2
    assert (budget.n_tokens, budget.n_held, budget.n_settled) == (28, 0, 8)
    with pytest.raises(BudgetExceededError, match=r"\$28\.0000 billed, \$0\.0000 reserved"):
        budget.reserve(73)
    budget.reserve(72)
