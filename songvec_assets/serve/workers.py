"""Calls that block, such as statements of the database, outside of the event loop: few at once, and for a limited time.

When to add here: nothing but what holds for every such call. Keep out: what is called.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from songvec_assets.errors import ServeError

Result = TypeVar("Result")


class Workers:
    """Runs each call in a new daemon thread.

    Args:
        n_at_once: calls at once; fewer than the connections of the `web` pool.
        wait_s: how long a call may wait for its turn.
        call_s: how long its caller waits for its end. It keeps its place until it has ended.
    """

    def __init__(self, n_at_once: int = 12, wait_s: float = 5.0, call_s: float = 15.0) -> None:
        self._free = asyncio.Semaphore(n_at_once)
        self._wait_s, self._call_s = wait_s, call_s

    async def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `call(*arguments)`.

        Raises:
            ServeError: its turn did not come, or it did not end in time.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise ServeError(f"no search ended within {self._wait_s:g} s: try again later", "serve.busy") from None
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Result] = loop.create_future()

        def end(result: Result | None, error: BaseException | None) -> None:
            self._free.release()
            if outcome.done():  # nobody waits any longer
                return
            if error is None:
                outcome.set_result(result)  # type: ignore[arg-type]
            else:
                outcome.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = call(*arguments)
            except BaseException as caught:  # noqa: BLE001 - raised where the result is awaited
                error = caught
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(end, result, error)

        threading.Thread(target=work, daemon=True, name="songvec-serve").start()
        try:
            async with asyncio.timeout(self._call_s):
                return await outcome
        except TimeoutError:
            raise ServeError(
                f"the database gave no answer within {self._call_s:g} s: see whether it is reachable", "serve.busy"
            ) from None
