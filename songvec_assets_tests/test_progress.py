"""A long step in a worker thread: its result, its error, and how it is interrupted."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from songvec_assets.errors import StoppedError
from songvec_assets.progress import StopSignal, run_in_worker

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
            stopping.wait(0.5)

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
