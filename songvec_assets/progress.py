"""Progress reports of long steps, their text form, and stopping a step.

Core functions call a `ReportProgress` as often as they like; the caller that displays it limits the rate.
When to add here: another value of a progress report. Keep out: Dagster, terminals, and signals (`signals`).
"""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from songvec_assets.errors import StoppedError
from songvec_assets.signals import interrupted_by_hangup
from songvec_assets.threads import DaemonThreads

_POLL_S = 0.2

Report = TypeVar("Report")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a step has come.

    Attributes:
        step: what is being done, as an imperative: "embed songs".
        done: units done so far in this step.
        total: units in this step; 0 if it is not known.
        unit: "songs", "rows", "%".
        note: dollars so far, the phase of an index build, and the like.
        is_trouble: whether the note is a warning.
        n_free: units of `done` that took no work, such as cached songs; the rate does not count them.
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


class Speed(NamedTuple):
    """How fast a step is.

    Attributes:
        rate: units of work per second since its work began; 0 at the start.
        seconds_left: until its end, at the pace of the last minute; 0: not known, or nothing is left.
    """

    rate: float = 0.0
    seconds_left: float = 0.0

    @property
    def time_left(self) -> str:
        """`12 min left`; empty if that is not known, or nothing is left."""
        return f"{describe_seconds(self.seconds_left)} left" if self.seconds_left else ""


@dataclass
class _Work:
    """When a step's work began, the units of work done by then, the latest report, and when how much was done."""

    began_at: float
    n_before: int
    latest: Progress
    marks: deque[tuple[float, int]]


class RateMeter:
    """How fast each step is, since its work began.

    The rate counts neither units that took no work (`Progress.n_free`) nor the time before the first unit of work. The
    time left counts all units: among those to come, as many may take no work. If a step restarts with fewer units done,
    or changes its unit, the measurement restarts.
    """

    PACE_S = 60.0

    def __init__(self) -> None:
        self._steps: dict[str, _Work] = {}

    def measure(self, progress: Progress) -> Speed:
        """The speed so far."""
        now, n_worked = time.monotonic(), progress.done - progress.n_free
        work = self._steps.setdefault(progress.step, _Work(now, n_worked, progress, deque()))
        before, work.latest = work.latest, progress
        only_free = n_worked == work.n_before and progress.n_free > before.n_free
        if progress.done < before.done or progress.unit != before.unit or only_free:
            work.began_at, work.n_before = now, n_worked
            work.marks.clear()
        marks = work.marks
        if not marks or now - marks[-1][0] >= 1:
            marks.append((now, progress.done))
        while len(marks) > 1 and marks[1][0] <= now - self.PACE_S:
            marks.popleft()
        if n_worked == work.n_before or now == work.began_at:
            return Speed()
        since, n_since = marks[0]
        n_done, n_left = progress.done - n_since, progress.total - progress.done
        seconds_left = n_left * (now - since) / n_done if n_done > 0 and n_left > 0 else 0.0
        return Speed((n_worked - work.n_before) / (now - work.began_at), seconds_left)


def describe_progress(progress: Progress, speed: Speed) -> str:
    """One line: done, total, units per second, time left."""
    if progress.unit == "%":
        figures = [f"{progress.done:,}%"]
    else:
        total = f" of {progress.total:,}" if progress.total else ""
        figures = [f"{progress.done:,}{total} {progress.unit}", f"{speed.rate:,.0f}/s" if speed.rate else ""]
    line = ", ".join(filter(None, [*figures, speed.time_left]))
    return f"{progress.step}: {line}" + (f" ({progress.note})" if progress.note else "")


class ProgressLines:
    """Limits progress to one line per five seconds, plus one when a step reaches its total; the same for warnings.

    Args:
        write: called with each line.
        warn: called with the note of each report that has `is_trouble`.
    """

    EVERY_S = 5.0

    def __init__(self, write: Callable[[str], None], warn: Callable[[str], None] = lambda _: None) -> None:
        self._write, self._warn = write, warn
        self._rates = RateMeter()
        self._next = self._next_warning = 0.0
        self._last = ""

    def __call__(self, progress: Progress) -> None:
        """Write a line if one is due."""
        now = time.monotonic()
        line = describe_progress(progress, self._rates.measure(progress))
        if progress.is_trouble and now >= self._next_warning:
            self._next_warning = now + self.EVERY_S
            self._warn(progress.note)
        if now >= self._next or (progress.done == progress.total and line != self._last):
            self._next, self._last = now + self.EVERY_S, line
            self._write(line)


ReportProgress = Callable[[Progress], None]


def ignore_progress(_progress: Progress) -> None:
    """Show no progress."""


INTERRUPTED = "interrupted; what was done so far is kept, and the same command goes on from there"


class StopSignal:
    """Asks a step, possibly in another thread, to end early and keep what it has done."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Ask the step to end."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the step was asked to end."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise StoppedError if the step was asked to end."""
        if self._event.is_set():
            raise StoppedError(INTERRUPTED)


@dataclass(frozen=True)
class RunContext:
    """Passed to every long step of a run: receives its progress, and can stop it.

    Attributes:
        report: called with the step's progress, as often as the step likes.
        stop: once set, the step stores what it has begun, and ends.
    """

    report: ReportProgress = ignore_progress
    stop: StopSignal = field(default_factory=StopSignal)

    def check_stop(self) -> None:
        """Raise StoppedError if the step was asked to end."""
        self.stop.check()


SILENT = RunContext()
"""The default of core functions: shows no progress, and is never stopped."""


def run_in_worker(
    work: Callable[[Callable[[Report], None]], Result],
    *,
    report: Callable[[Report], None],
    stop: Callable[[], None],
    grace_s: float = 30.0,
) -> Result:
    """Run `work(emit)` in a daemon thread; what it emits is passed to `report` in the calling thread.

    The calling thread waits in Python, so signals reach it at once even if the worker is in a C call (psycopg2 reacts
    to SIGINT only after its statement). An interrupt, or an error of `report`, calls `stop` and gives the worker
    `grace_s` seconds to end, while it still reports; a second interrupt abandons it. A closing terminal (SIGHUP) counts
    as a first interrupt, never as a second one.

    Args:
        work: the long step; it reports by calling its argument.
        report: called in the calling thread with everything that the step emits.
        stop: asks the step to end early: cancels its statements, sends no further request.
        grace_s: seconds the step may still take after `stop`.

    Raises:
        Any error of `work`; the interrupt, if there was one, after the grace period.
    """
    reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work(reports.put))
        except BaseException as caught:  # noqa: BLE001 - raised in the calling thread
            outcome.set_exception(caught)
        reports.put(outcome)

    worker = threading.Thread(target=run, daemon=True, name="songvec-worker")
    with interrupted_by_hangup() as hangup:
        try:
            worker.start()
            for item in _take_until(outcome, reports, worker):
                report(item)
        except BaseException:
            hangup.is_ending = True
            stop()
            for item in _take_until(outcome, reports, worker, time.monotonic() + grace_s):
                # `report` may have caused the error: the step still gets its grace, and the first error is raised.
                # rich exits if a pipe is closed
                with contextlib.suppress(Exception, SystemExit):
                    report(item)
            raise
    return outcome.result()


def _take_until(
    last: object, items: "queue.SimpleQueue[Any]", writer: threading.Thread, deadline: float = math.inf
) -> Iterator[Any]:
    """The items before `last`, as they come; ends at the deadline too, or if the thread that writes them has ended."""
    while time.monotonic() < deadline:
        alive = writer.is_alive()
        try:
            # short waits: a signal that another thread receives does not wake this one
            item = items.get(timeout=_POLL_S)
        except queue.Empty:
            # an interrupt may have taken `last` from the queue
            if not alive:
                return
            continue
        if item is last:
            return
        yield item


def run_event_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; in another thread if the calling thread runs an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_run_with_daemons(work))
    with DaemonThreads(1, "songvec-loop") as thread:
        return thread.submit(asyncio.run, _run_with_daemons(work)).result()


async def _run_with_daemons(work: Coroutine[Any, Any, Result]) -> Result:
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    return await work
