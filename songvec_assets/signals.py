"""A terminal that closes (SIGHUP) ends a run as SIGTERM does: without this, the answers in flight, paid for, are lost.

When to add here: another signal that ends a process. Keep out: how a step is then stopped (`progress`).
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Hangup:
    """A handler of SIGHUP that interrupts once, as SIGTERM does at that moment.

    A terminal that closes sends several: one from the kernel, another from the shell. Only the first one counts: a
    second interrupt would abandon what the first one waits for.

    Attributes:
        is_ending: whether the process was interrupted, by SIGHUP or otherwise; later SIGHUPs change nothing.
    """

    def __init__(self) -> None:
        self.is_ending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread."""
        if self.is_ending:
            return
        self.is_ending = True
        terminate = signal.getsignal(signal.SIGTERM)
        if callable(terminate):
            terminate(number, frame)
        else:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupted_by_hangup() -> Iterator[Hangup]:
    """Let SIGHUP interrupt the block, if this is the main thread and SIGHUP would end the process.

    `nohup` ignores SIGHUP, and so does what it starts.

    Yields:
        The handler in force: that of an enclosing block, if there is one.
    """
    # only the main thread may set handlers
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGHUP) if is_main else None
    if isinstance(before, Hangup):
        before.is_ending = False  # a process that begins something was not ended by an earlier interrupt
        yield before
        return
    hangup = Hangup()
    if before != signal.SIG_DFL:
        yield hangup
        return
    signal.signal(signal.SIGHUP, hangup)
    try:
        yield hangup
    finally:
        if hangup.is_ending:
            # Python's own end restores the default: a second SIGHUP then would kill the process and hide its exit code
            atexit.register(signal.signal, signal.SIGHUP, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGHUP, before)


def discard_unwritable_output() -> None:
    """Send standard output and error nowhere if they are closed: unwritten text makes Python exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
