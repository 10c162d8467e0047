"""A long step in a worker thread: its result, its error, how it is interrupted, and its progress as lines."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO

import pytest
from rich.console import Console

from songvec_assets.cli.terminal import bars
from songvec_assets.errors import StoppedError
from songvec_assets.progress import (
    Progress,
    ProgressLines,
    RateMeter,
    Speed,
    StopSignal,
    describe_progress,
    run_in_worker,
)

LONG_S = 60.0


@pytest.fixture(autouse=True)
def _interruptible():
    """SIGINT raises KeyboardInterrupt here and SIGHUP is nobody's, whatever the test runner made of them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    before_hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, before_hangup)


@pytest.fixture
def release():
    """Lets a worker that was abandoned end with its test."""
    event = threading.Event()
    yield event
    event.set()


def interrupt(number=signal.SIGINT):
    """As Ctrl+C does it: the main thread gets the signal, wherever it is."""
    signal.pthread_kill(threading.main_thread().ident, number)


def ignore(_item):
    pass


class Listener:
    """Keeps what it is told."""

    def __init__(self):
        self.items = []
        self._heard = threading.Event()

    def __call__(self, item):
        self.items.append(item)
        self._heard.set()

    def wait(self):
        """Let the worker go on when the caller waits for what it says next."""
        assert self._heard.wait(LONG_S)
        time.sleep(0.05)


def never():
    raise AssertionError("stop was called")


def test_the_result_is_returned_and_reports_come_in_order_in_the_calling_thread():
    reports = []
    workers = []

    def work(emit):
        workers.append(threading.current_thread())
        for number in range(100):
            emit(number)
        return "done"

    def report(number):
        assert threading.current_thread() is threading.main_thread()
        reports.append(number)

    assert run_in_worker(work, report=report, stop=never) == "done"
    assert reports == list(range(100))
    assert workers[0] is not threading.main_thread()
    assert workers[0].daemon, "an abandoned worker must not keep the process alive"


@pytest.mark.parametrize("result", [None, 0, [], ValueError("a result, not an error")])
def test_any_result_is_a_result(result):
    assert run_in_worker(lambda _: result, report=ignore, stop=never) is result


def test_reports_arrive_while_the_work_goes_on():
    seen = threading.Event()

    def work(emit):
        emit("half")
        return seen.wait(LONG_S)

    assert run_in_worker(work, report=lambda _: seen.set(), stop=never)


@pytest.mark.parametrize("error", [StoppedError("why"), KeyError("x"), SystemExit(3), KeyboardInterrupt()])
def test_an_error_of_the_work_is_raised_after_its_reports(error):
    reports = []

    def work(emit):
        emit("before")
        raise error

    with pytest.raises(type(error)) as raised:
        run_in_worker(work, report=reports.append, stop=never)
    assert raised.value is error
    assert reports == ["before"]


def test_an_interrupt_asks_the_step_to_stop_and_waits_while_it_still_reports():
    listener, stops = Listener(), []
    stopping, ended = threading.Event(), threading.Event()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt()
        stopping.wait(LONG_S)
        emit("stopping")
        time.sleep(0.2)
        emit("stopped")
        ended.set()

    def stop():
        stops.append(threading.current_thread())
        stopping.set()

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=stop)
    assert ended.is_set()
    assert listener.items == ["started", "stopping", "stopped"]
    assert stops == [threading.main_thread()]


def test_an_interrupt_at_the_very_start_of_a_step_asks_it_to_stop_too():
    """The worker runs already while the caller still starts it."""
    for _ in range(20):
        stopping = threading.Event()

        def work(emit, stopping=stopping):
            interrupt()
            stopping.wait(LONG_S)

        with pytest.raises(KeyboardInterrupt):
            run_in_worker(work, report=ignore, stop=stopping.set)
        assert stopping.is_set()


def test_an_interrupt_reaches_a_main_thread_that_waits_for_a_silent_step(release):
    began = time.monotonic()

    def work(emit):
        time.sleep(0.2)
        interrupt()
        release.wait(LONG_S)

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=ignore, stop=release.set)
    assert time.monotonic() - began < LONG_S / 4


def test_an_interrupt_that_does_not_wake_the_caller_is_noticed_soon():
    """A signal just before the caller falls asleep wakes nobody; one of another thread does so every time."""
    stopping, listener, stopped_in_time = threading.Event(), Listener(), []

    def work(emit):
        emit("started")
        listener.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        stopped_in_time.append(stopping.wait(3))

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=stopping.set, grace_s=1)
    assert stopped_in_time == [True]


def test_an_interrupt_just_as_the_step_ends_does_not_wait_for_what_has_ended():
    """It may fall between the end's arrival and its being looked at."""
    listener = Listener()

    def work(emit):
        emit("started")
        listener.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=lambda: None, grace_s=4)
    assert time.monotonic() - began < 3


def test_an_interrupt_is_raised_even_where_the_step_still_ends_well():
    stopping, listener = threading.Event(), Listener()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt()
        stopping.wait(LONG_S)
        return "done after all"

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=stopping.set)


def test_a_second_interrupt_abandons_the_step(release):
    began = time.monotonic()
    stopping, stops, listener = threading.Event(), [], Listener()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt()
        stopping.wait(LONG_S)
        time.sleep(0.3)  # the caller is in its grace by now
        interrupt()
        release.wait(LONG_S)

    def stop():
        stops.append(1)
        stopping.set()

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=stop, grace_s=LONG_S)
    assert 0.25 < time.monotonic() - began < LONG_S / 4
    assert stops == [1]


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGINT])
def test_a_terminal_that_closes_is_an_interrupt_and_never_a_second_one(first):
    """The kernel sends SIGHUP and the shell sends another; or somebody presses Ctrl+C and then closes the window."""
    stopping, ended, listener = threading.Event(), threading.Event(), Listener()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt(first)
        stopping.wait(LONG_S)
        for _ in range(3):
            time.sleep(0.1)
            interrupt(signal.SIGHUP)
        time.sleep(0.1)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=stopping.set, grace_s=LONG_S)
    assert ended.is_set()


def test_a_step_after_one_that_was_interrupted_is_interrupted_by_sighup_too():
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGHUP):
        stopping, listener = threading.Event(), Listener()

        def work(emit, number=number, stopping=stopping, listener=listener):
            emit("started")
            listener.wait()
            interrupt(number)
            assert stopping.wait(LONG_S)

        with pytest.raises(KeyboardInterrupt):
            run_in_worker(work, report=listener, stop=stopping.set)


def test_a_sighup_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listener = Listener()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt(signal.SIGHUP)
        time.sleep(0.1)
        return "done"

    assert run_in_worker(work, report=listener, stop=never) == "done"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_handler_of_sighup_is_put_back_after_a_step():
    assert run_in_worker(lambda _: "done", report=ignore, stop=never) == "done"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_step_that_does_not_stop_is_abandoned_after_its_grace(release):
    began = time.monotonic()
    listener = Listener()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt()
        release.wait(LONG_S)

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=lambda: None, grace_s=0.3)
    assert 0.25 < time.monotonic() - began < LONG_S / 4


def test_a_step_that_never_ceases_to_report_is_abandoned_after_its_grace_too(release):
    began = time.monotonic()
    listener = Listener()

    def work(emit):
        emit("started")
        listener.wait()
        interrupt()
        while not release.wait(0.001):
            emit("still here")

    with pytest.raises(KeyboardInterrupt):
        run_in_worker(work, report=listener, stop=lambda: None, grace_s=0.3)
    assert 0.25 < time.monotonic() - began < LONG_S / 4


def test_an_error_of_the_listener_stops_the_step_and_is_raised_when_that_has_ended():
    stopping, ended = threading.Event(), threading.Event()

    def work(emit):
        emit("first")
        stopping.wait(LONG_S)
        time.sleep(0.1)
        ended.set()

    def report(_item):
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        run_in_worker(work, report=report, stop=stopping.set)
    assert ended.is_set()


@pytest.mark.parametrize("error", [OSError("the terminal is gone"), SystemExit(1)])
def test_a_listener_that_keeps_failing_does_not_cost_the_step_its_grace(error):
    """The step stores what was paid for while it stops, and says so. Rich exits where a pipe is closed."""
    stopping, ended = threading.Event(), threading.Event()

    def work(emit):
        emit("first")
        stopping.wait(LONG_S)
        emit("stopping: answers on their way are still stored")
        time.sleep(0.2)
        ended.set()

    def report(_item):
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_in_worker(work, report=report, stop=stopping.set)
    assert ended.is_set()


def test_a_stop_signal_is_silent_until_it_is_set_and_reaches_other_threads():
    stop = StopSignal()
    stop.check()
    assert not stop.is_set()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop.set).result()
    assert stop.is_set()
    with pytest.raises(StoppedError, match="what was done so far is kept"):
        stop.check()


@pytest.mark.parametrize(
    ("progress", "speed", "line"),
    [
        (Progress("load rows", 0, 0, unit="rows", note="waiting"), Speed(), "load rows: 0 rows (waiting)"),
        (Progress("load rows", 20, 50, unit="rows"), Speed(0.5, 60), "load rows: 20 of 50 rows, 0/s, 60 s left"),
        (Progress("load rows", 50_000, 50_000, unit="rows"), Speed(1e3), "load rows: 50,000 of 50,000 rows, 1,000/s"),
        (Progress("build index", 25, 100, unit="%"), Speed(0.1, 750), "build index: 25%, 12 min left"),
        (Progress("build index", 0, 100, unit="%", note="about 5 min"), Speed(), "build index: 0% (about 5 min)"),
    ],
)  # fmt: skip
def test_progress_reads_how_far_how_fast_and_how_long_still(progress: Progress, speed: Speed, line: str) -> None:
    assert describe_progress(progress, speed) == line


def test_a_rate_is_that_of_a_step_since_it_began_and_starts_again_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    for now, done in ((0.0, 100), (10.0, 300), (20.0, 500), (21.0, 0), (23.0, 100)):  # noqa: B007 - the clock reads it
        rates.append(meter.measure(Progress("load rows", done, 1_000, unit="rows")).rate)
    assert rates == [0.0, 20.0, 20.0, 0.0, 50.0]
    assert meter.measure(Progress("build index", 50, 100, unit="%")) == Speed()


def test_a_phase_that_counts_in_another_unit_has_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    phases = ((0.0, 0, "rows"), (50.0, 0, "blocks"), (60.0, 100, "blocks"), (61.0, 100, "rows"), (71.0, 600, "rows"))
    for now, done, unit in phases:  # noqa: B007 - the clock reads it
        rates.append(meter.measure(Progress("build index", done, 1_000, unit=unit)).rate)
    assert rates == [0.0, 0.0, 10.0, 0.0, 50.0]


RESUMED = (
    # seconds, done, of which cached
    (0.0, 9_000, 9_000),
    (30.0, 20_000, 20_000),  # finding them takes time, too
    (31.0, 20_137, 20_000),
    (40.0, 22_370, 21_000),
)
"""A resumed run: 137 songs per second are embedded, the others are in the cache."""


def _resumed(seconds: float, done: int, n_free: int) -> Progress:
    return Progress("embed songs", done, 36_070, n_free=n_free)


def test_a_rate_is_that_of_what_took_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    for now, done, n_free in RESUMED:
        rates.append(meter.measure(_resumed(now, done, n_free)).rate)
    assert rates == [0.0, 0.0, 137.0, 137.0]


def _measure_left(monkeypatch: pytest.MonkeyPatch, reports: Iterable[tuple[float, int, int]], total: int) -> float:
    """Seconds left after the last of some reports: (seconds, units done, of which took no work)."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, speed = RateMeter(), Speed()
    for now, done, n_free in reports:  # noqa: B007 - the clock reads it
        speed = meter.measure(Progress("embed songs", done, total, n_free=n_free))
    return speed.seconds_left


def test_the_time_left_expects_as_many_cached_songs_as_in_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    # 50 songs of each range changed, and ten ranges take a second
    few_changed = ((second, second * 500_000, second * 499_500) for second in range(13))
    assert _measure_left(monkeypatch, few_changed, 12_000_000) == pytest.approx(12)
    # ranges with a few songs to embed pass by, and then a range with nothing cached
    passed = [(second, second * 500_000, second * 499_500) for second in range(7)]
    slow = [(6.0 + second, 3_000_000 + second * 38, 2_997_000) for second in range(1, 120)]
    assert _measure_left(monkeypatch, [*passed, *slow], 6_000_000) == pytest.approx(3_000_000 / 38, rel=0.01)


def test_a_wait_before_the_first_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that fails for a minute is slow, however fast its first answer comes after that."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    for now, done in ((0.0, 100), (59.0, 100), (60.0, 160)):  # noqa: B007 - the clock reads it
        rates.append(meter.measure(Progress("embed songs", done, 1_000, n_free=100, is_trouble=True)).rate)
    assert rates == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("face", ["bars", "lines"])
def test_both_faces_show_the_rate_of_what_is_embedded(monkeypatch: pytest.MonkeyPatch, face: str) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(width=120, record=True, force_terminal=True, file=StringIO())
    lines: list[str] = []
    with bars(console) if face == "bars" else contextlib.nullcontext(ProgressLines(lines.append)) as show:
        for now, done, n_free in RESUMED:
            show(_resumed(now, done, n_free))
    last = [line for line in [*console.export_text().splitlines(), *lines] if line.strip()][-1]
    assert ("22,370" in last, "137/s" in last, "58 s left" in last) == (True, True, True), last


def test_a_line_comes_every_five_seconds_and_when_a_step_reaches_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = 1000.0, list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    show = ProgressLines(lines.append)
    for second in range(9):
        now = 1000.0 + second
        show(Progress("load rows", second, 8, unit="rows"))
        show(Progress("load rows", second, 8, unit="rows"))
    assert [line.split(",")[0] for line in lines] == [f"load rows: {n} of 8 rows" for n in (0, 5, 8)]


def test_trouble_is_a_warning_as_often_as_progress_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines, warnings = 1000.0, list[str](), list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    show = ProgressLines(lines.append, warnings.append)
    for second in range(12):
        now = 1000.0 + second
        show(Progress("embed songs", second, 100, note=f"answered 503 at {second}", is_trouble=True))
    assert warnings == [f"answered 503 at {second}" for second in (0, 5, 10)]
    show(Progress("embed songs", 13, 100, note="$0.0001 so far"))
    assert (len(warnings), len(lines)) == (3, 3), "a note that is no trouble warns of nothing"
