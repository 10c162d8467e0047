"""Calls that block: few at once, for a limited time, and none keeps the process from ending."""

import asyncio
import threading

import pytest

from songvec_assets.errors import SearchError, ServeError
from songvec_assets.serve.workers import Workers


def fail() -> None:
    raise SearchError("no")


def test_a_call_returns_or_raises_what_it_does() -> None:
    async def call() -> None:
        workers = Workers()
        assert await workers.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(SearchError, match=r"^no$"):
            await workers.run(fail)

    asyncio.run(call())


def test_a_call_that_finds_no_place_is_refused_and_one_that_does_not_end_keeps_its_place() -> None:
    end = threading.Event()

    async def call() -> None:
        workers = Workers(n_at_once=1, wait_s=0.05, call_s=0.05)
        with pytest.raises(ServeError, match="no answer within") as late:
            await workers.run(end.wait)
        with pytest.raises(ServeError, match="no search ended within") as refused:
            await workers.run(int)
        assert (late.value.code, refused.value.code) == ("serve.busy", "serve.busy")
        end.set()
        workers._wait_s = 10.0
        assert await workers.run(int) == 0

    asyncio.run(call())


def test_a_thread_that_outlives_the_loop_ends_quietly() -> None:
    end = threading.Event()

    async def call() -> None:
        with pytest.raises(ServeError):
            await Workers(call_s=0.01).run(end.wait)

    asyncio.run(call())
    [thread] = [each for each in threading.enumerate() if each.name == "songvec-serve"]
    assert thread.daemon
    end.set()
    thread.join(10)
    assert not thread.is_alive()
