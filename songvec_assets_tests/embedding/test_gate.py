"""When a request may be sent: the window of requests in flight, and the turn before the quota."""

import asyncio
from typing import Any

import pytest

from songvec_assets.embedding.embedder import Patience
from songvec_assets.embedding.gate import FIRST, MAX_ANSWER_BYTES, InFlightWindow, QuotaGate
from songvec_assets.embedding.limits import Grant
from songvec_assets.errors import StoppedError
from songvec_assets.progress import StopSignal

SMALL = 1_000
"""Bytes of an answer."""


def test_it_doubles_per_round_of_quick_answers_up_to_the_highest() -> None:
    window = InFlightWindow(32)
    assert window.n_allowed == FIRST
    for expected in (8, 16, 32, 32):
        for _ in range(window.n_allowed):
            window.count_answer(0.1, 1.0, SMALL)
        assert window.n_allowed == expected


def test_it_grows_by_one_per_round_of_answers_that_take_a_third_of_their_time_and_not_where_they_take_more() -> None:
    window = InFlightWindow(32)
    for _ in range(5):
        window.count_answer(0.3, 1.0, SMALL)
    assert window.n_allowed == FIRST + 1
    for _ in range(50):
        window.count_answer(0.6, 1.0, SMALL)
    assert window.n_allowed == FIRST + 1


def test_it_halves_once_for_all_that_were_in_flight_together_and_the_rest_has_more_time() -> None:
    window = InFlightWindow(8)
    for sent_at in (1.0, 1.1, 1.2):
        window.count_timeout(sent_at, now=10.0)
    assert (window.n_allowed, window.stretch) == (2, 2.0)
    window.count_timeout(10.5, now=20.0)
    window.count_timeout(20.5, now=30.0)
    assert (window.n_allowed, window.stretch) == (1, 8.0)
    for _ in range(3):
        window.count_answer(0.1, 1.0, SMALL)
    assert window.stretch == 1.0
    assert window.n_allowed < FIRST, "after a time-out it grows slowly, however quick the answers are"


@pytest.mark.parametrize(("n_bytes", "n_allowed"), [(42 << 20, 18), (22 << 20, 32), (1 << 30, 1)])
def test_large_answers_must_fit_into_memory_together(n_bytes: int, n_allowed: int) -> None:
    window = InFlightWindow(32)
    for _ in range(100):
        window.count_answer(0.01, 1.0, n_bytes)
    assert window.n_allowed == n_allowed
    assert window.n_allowed * n_bytes <= max(MAX_ANSWER_BYTES, n_bytes)
    window.count_answer(0.01, 1.0, SMALL)
    assert window.n_allowed == n_allowed, "the next large one may come at any time"


def test_no_more_than_allowed_are_in_flight_and_who_waits_goes_on_in_time() -> None:
    async def send() -> list[int]:
        window, in_flight, seen = InFlightWindow(2), 0, list[int]()

        async def one() -> None:
            nonlocal in_flight
            async with window.slot(lambda: None):
                in_flight += 1
                seen.append(in_flight)
                await asyncio.sleep(0)
                in_flight -= 1

        await asyncio.gather(*(one() for _ in range(10)))
        return seen

    seen = asyncio.run(send())
    assert (len(seen), max(seen)) == (10, 2)


def test_who_waits_for_a_place_gives_up_when_the_run_is_stopped() -> None:
    async def wait() -> None:
        window, stop = InFlightWindow(1), StopSignal()
        async with window.slot(stop.check):
            waiting = asyncio.create_task(window.slot(stop.check).__aenter__())
            await asyncio.sleep(0)
            stop.set()
        with pytest.raises(StoppedError):
            await waiting

    asyncio.run(wait())


def test_a_time_out_of_a_request_that_is_alone_in_flight_says_so() -> None:
    async def look() -> tuple[bool, bool]:
        window = InFlightWindow(2)
        async with window.slot(lambda: None):
            async with window.slot(lambda: None):
                beside_another = window.count_timeout(1.0, 2.0)
            return beside_another, window.count_timeout(3.0, 4.0)

    assert asyncio.run(look()) == (False, True)


class FakeLimiter:
    """Grants each request a second later than the one before, and keeps what it is told."""

    def __init__(self) -> None:
        self.granted = 0.0
        self.pauses: list[float] = []

    def reserve(self, n_tokens: int) -> Grant:
        self.granted += 1.0
        return Grant(n_tokens, self.granted, 0.0)

    def slow_down(self, _grant: Grant, seconds: float) -> None:
        self.pauses.append(seconds)


def test_only_the_next_request_is_granted_in_advance() -> None:
    class Slow(Patience):
        async def sleep(self, seconds: float) -> None:
            assert not seconds
            sleeping.append(len(sleeping))
            assert limiter.granted == len(sleeping)
            await asyncio.sleep(0.01)

    sleeping: list[int] = []
    limiter: Any = FakeLimiter()

    async def ask() -> None:
        gate = QuotaGate(limiter, Slow())
        await asyncio.gather(*(gate.next_grant(1) for _ in range(5)))

    asyncio.run(ask())
    assert limiter.granted == 5


def test_a_429_without_a_time_pauses_longer_each_time_and_once_for_what_was_granted_before() -> None:
    limiter: Any = FakeLimiter()

    async def ask() -> list[float]:
        gate = QuotaGate(limiter, Patience())
        first, second = await gate.next_grant(1), await gate.next_grant(1)
        pauses = [await gate.slow_down(first, None), await gate.slow_down(second, None)]
        for _ in range(3):
            pauses.append(await gate.slow_down(await gate.next_grant(1), None))
        pauses.append(await gate.slow_down(await gate.next_grant(1), 0.7))
        gate.count_answer()
        return [*pauses, await gate.slow_down(await gate.next_grant(1), None)]

    assert asyncio.run(ask()) == [1, 1, 2, 4, 5, 0.7, 1]
    assert limiter.pauses == [1, 1, 2, 4, 5, 0.7, 1]
