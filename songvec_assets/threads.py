"""Threads for calls that block, such as uploads and statements, which do not keep a process that was abandoned alive.

Python waits at its end for all threads of its own executors: after a second Ctrl+C, for as long as a bucket or a server
gives no answer. When to add here: another way to run calls in threads. Keep out: what is called.
"""

import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class DaemonThreads(ThreadPoolExecutor):
    """An executor that runs each call in a new daemon thread, a few at a time; shut down, it waits for all calls.

    It may be the default executor of an event loop, which must be of this base class.
    """

    def __init__(self, n_at_once: int | None = None, name: str = "songvec-call") -> None:
        super().__init__(n_at_once, name)
        self._name, self._places = name, threading.Semaphore(self._max_workers)
        self._pending: set[Future[Any]] = set()

    def submit(
        self, call: Callable[_Given, _Result], /, *args: _Given.args, **kwargs: _Given.kwargs
    ) -> "Future[_Result]":
        """See `Executor.submit`."""
        future: Future[_Result] = Future()

        def run() -> None:
            with self._places:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(call(*args, **kwargs))
                except BaseException as error:  # noqa: BLE001 - raised where the result is read
                    future.set_exception(error)

        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        threading.Thread(target=run, daemon=True, name=self._name).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        pending = [*self._pending]
        if cancel_futures:
            for future in pending:
                future.cancel()
        super().shutdown(wait)
        if wait:
            futures.wait(pending)
