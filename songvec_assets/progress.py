"""What a long step tells while it runs, and how it is stopped. No Dagster, no terminal.

A core function takes a `ReportProgress` and calls it as often as it likes; whoever shows it thins it out.
"""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from songvec_assets.errors import StoppedError
from songvec_assets.signals import interrupted_by_hangup

_POLL_S = 0.2

Report = TypeVar("Report")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a step has come.

    Attributes:
        step: what is being done, as an imperative: "embed songs".
        done: units done so far in this step.
        total: units in this step; 0 where it is not known.
        unit: "songs", "rows", "%".
        note: what else a person would want to know: dollars so far, the phase of an index build.
        is_trouble: whether the note says that something goes wrong.
        n_free: units of `done` that took no work, such as songs found in the cache; rate and time left leave them out.
    """

    step: str
    done: int
    total: int
    unit: str = "songs"
    note: str = ""
    is_trouble: bool = False
    n_free: int = 0


def describe_seconds(seconds: float) -> str:
    """`42 s`, `12 min`, `3.7 h`, `2.1 days`."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


ReportProgress = Callable[[Progress], None]


def ignore_progress(_progress: Progress) -> None:
    """The listener of callers who do not care."""


class StopSignal:
    """Asks a step that runs in another thread to end early, keeping what it has."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Ask for the end."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the end was asked for."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise StoppedError where the end was asked for."""
        if self._event.is_set():
            raise StoppedError("interrupted; what was done so far is kept, and the same command goes on from there")


@dataclass(frozen=True)
class RunContext:
    """What every long step of a run is given: whom it reports to, and what ends it early.

    Attributes:
        report: called with the step's progress, as often as the step likes.
        stop: once set, the step ends as soon as what it has begun is stored.
    """

    report: ReportProgress = ignore_progress
    stop: StopSignal = field(default_factory=StopSignal)

    def check_stop(self) -> None:
        """Raise StoppedError where the end was asked for."""
        self.stop.check()


SILENT = RunContext()
"""The context of callers who neither listen nor stop a step: the default of core functions."""


@dataclass(frozen=True)
class _End(Generic[Result]):
    result: Result | None = None
    error: BaseException | None = None


def run_in_worker(
    work: Callable[[Callable[[Report], None]], Result],
    *,
    report: Callable[[Report], None],
    stop: Callable[[], None],
    grace_s: float = 30.0,
) -> Result:
    """Run `work(emit)` in a daemon thread; what it emits reaches `report` in the calling thread.

    The calling thread waits in Python, so a signal reaches it at once while the worker may be deep in C:
    psycopg2 alone answers a SIGINT only after its statement. An interrupt, or an error of `report`, calls
    `stop` and gives the worker `grace_s` seconds to end, still reporting; a second interrupt abandons it. A terminal
    that closes (SIGHUP) is an interrupt, and never a second one.

    Args:
        work: the long step; it reports by calling its argument.
        report: told, in the calling thread, all that the step emits.
        stop: asks the step to end early: cancels its statements, sends no further request.
        grace_s: seconds the step may still take after `stop`.

    Raises:
        Whatever `work` raises; the interrupt itself, after the grace, where there was one.
    """
    reports: queue.SimpleQueue[Report | _End[Result]] = queue.SimpleQueue()

    def run() -> None:
        try:
            reports.put(_End(result=work(reports.put)))
        except BaseException as caught:  # noqa: BLE001 - it is raised again in the calling thread
            reports.put(_End(error=caught))

    worker = threading.Thread(target=run, daemon=True, name="songvec-worker")

    def follow(tell: Callable[[Report], None], deadline: float = math.inf) -> _End[Result] | None:
        while time.monotonic() < deadline:
            alive = worker.is_alive()
            try:
                # short waits: a signal that another thread took wakes nobody here
                item = reports.get(timeout=_POLL_S)
            except queue.Empty:
                if not alive:
                    return None
                continue
            if isinstance(item, _End):
                return item
            tell(item)
        return None

    def tell_if_possible(item: Report) -> None:
        # the listener may be what failed; the step still gets its grace, and the first error is the one raised
        with contextlib.suppress(Exception, SystemExit):  # rich exits where a pipe is closed
            report(item)

    with interrupted_by_hangup() as hangup:
        try:
            worker.start()
            end = follow(report)
        except BaseException:
            hangup.is_ending = True
            stop()
            follow(tell_if_possible, time.monotonic() + grace_s)
            raise
    assert end is not None
    if end.error is not None:
        raise end.error
    return cast(Result, end.result)


def run_event_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; where the calling thread runs an event loop already, as in a notebook, in another."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, "songvec-loop") as thread:
        return thread.submit(asyncio.run, work).result()
