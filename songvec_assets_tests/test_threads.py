"""Calls in daemon threads: results, limits, and a process that ends although one of them never does."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from songvec_assets.threads import DaemonThreads
from songvec_assets_tests.administration import wait_until

LONG_S = 60.0

ABANDONED = """
import asyncio, threading, time
from songvec_assets.progress import run_event_loop, run_in_worker
from songvec_assets.threads import DaemonThreads

async def upload():
    await {call}

begun = threading.Event()

def never():
    begun.set()
    time.sleep(60)

def report(_):
    begun.wait()
    raise KeyboardInterrupt

run_in_worker(lambda emit: (emit(1), run_event_loop(upload())), report=report, stop=lambda: None, grace_s=0.2)
"""


def test_results_and_errors_are_those_of_the_calls():
    with DaemonThreads(2) as threads:
        assert list(threads.map(lambda n: n * n, range(20))) == [n * n for n in range(20)]
        with pytest.raises(ZeroDivisionError):
            threads.submit(lambda: 1 / 0).result()


def test_so_many_run_at_once_in_daemon_threads_and_the_end_waits_for_all():
    running, most, lock = [], [], threading.Lock()

    def call() -> None:
        with lock:
            running.append(threading.current_thread().daemon)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.pop()

    with DaemonThreads(3) as threads:
        futures = [threads.submit(call) for _ in range(10)]
    assert all(each.done() for each in futures)
    assert max(most) == 3


def test_a_call_that_has_not_begun_can_be_cancelled():
    begun, release = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        release.wait(LONG_S)

    with DaemonThreads(1) as threads:
        threads.submit(call)
        assert begun.wait(LONG_S)
        waiting = [threads.submit(call) for _ in range(2)]
        assert waiting[0].cancel()
        threads.shutdown(wait=False, cancel_futures=True)
        assert waiting[1].cancelled()
        release.set()


def test_a_thread_is_kept_for_the_next_call():
    with DaemonThreads(4) as threads:
        idents = set()
        for _ in range(10):
            idents.add(threads.submit(threading.get_ident).result())
            time.sleep(0.02)  # until it has said that it is free
    assert len(idents) == 1


def test_a_call_after_the_shutdown_is_refused():
    threads = DaemonThreads(1)
    threads.submit(time.time).result()
    threads.shutdown()
    with pytest.raises(RuntimeError, match="before its shutdown"):
        threads.submit(time.time)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_call_was_given_is_not_kept(fails):
    class Vectors:
        """Something large."""

    def use(_: Vectors) -> None:
        if fails:
            raise ZeroDivisionError

    given = Vectors()
    alive = weakref.ref(given)
    gc.disable()
    try:
        with DaemonThreads(1) as threads:
            assert isinstance(threads.submit(use, given).exception(), ZeroDivisionError if fails else type(None))
            del given
            wait_until(lambda: alive() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "call",
    [
        "asyncio.to_thread(never)",
        "asyncio.get_running_loop().run_in_executor(DaemonThreads(1), never)",
    ],
)
def test_a_process_does_not_wait_for_calls_of_a_step_that_was_abandoned(call):
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", ABANDONED.format(call=call)], capture_output=True, check=False, text=True
    )
    assert "KeyboardInterrupt" in ended.stderr
    assert time.monotonic() - started < LONG_S / 2
