"""Daemon threads for calls that block, such as uploads and statements: the end of the process does not wait for them.

For the threads of Python's own executors it waits: after a second Ctrl+C, for as long as a bucket or a server gives no
answer. When to add here: another way to run calls in threads. Keep out: what is called.
"""

import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class DaemonThreads(ThreadPoolExecutor):
    """An executor whose threads are daemons; shut down, it waits for all calls. Its threads end only with a shutdown.

    It may be the default executor of an event loop, which must be of this base class.
    """

    def __init__(self, n_at_once: int | None = None, name: str = "songvec-call") -> None:
        super().__init__(n_at_once, name)
        self._name, self._n_threads = name, 0
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._pending: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._is_shut = False

    def submit(
        self, call: Callable[_Given, _Result], /, *args: _Given.args, **kwargs: _Given.kwargs
    ) -> "Future[_Result]":
        """See `Executor.submit`."""
        future: Future[_Result] = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"expected calls of {self._name} before its shutdown, got one after it")
            self._pending.add(future)
            future.add_done_callback(self._pending.discard)
            self._calls.put((future, partial(call, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and self._n_threads < self._max_workers:
                self._n_threads += 1
                threading.Thread(target=self._serve, daemon=True, name=self._name).start()
        return future

    def _serve(self) -> None:
        while (submitted := self._calls.get()) is not None:
            _run(*submitted)
            del submitted  # with what was given and returned
            self._idle.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        with self._lock:
            self._is_shut, pending = True, [*self._pending]
            for _ in range(self._n_threads):
                self._calls.put(None)
            self._n_threads = 0
        if cancel_futures:
            for future in pending:
                future.cancel()
        if wait:
            futures.wait(pending)


def _run(future: "Future[Any]", call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised where the result is read
        future.set_exception(error)
        # the error knows this frame: with them it would keep what was given, such as vectors, in a cycle
        del future, call
