"""One load in its own process: its seconds, its CPU seconds, and its memory, sampled from outside."""

import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from benchmarks.loaders import CLIENTS, Job, Loading

_SAMPLE_S = 0.02


class Outcome(NamedTuple):
    """One load by one client.

    Attributes:
        n_rows: loaded.
        seconds: to the commit.
        upkeep_s: from there to the call's end: this package's VACUUM (ANALYZE).
        cpu_s: of the client, all threads.
        marks: seconds until each hundredth of the rows was passed on, if the client reports it.
        peak_anon_mb: the client's peak of memory that is not mapped files.
    """

    n_rows: int
    seconds: float
    upkeep_s: float
    cpu_s: float
    marks: list[float]
    peak_anon_mb: float = 0.0


def run_client(name: str, job: Job) -> Outcome:
    """Load in its own process, whose memory is sampled from outside."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_load, args=(name, job, sender))
    process.start()
    sender.close()
    peak_kib = 0
    while not receiver.poll(_SAMPLE_S):
        peak_kib = max(peak_kib, _read_anon_kib(process.pid))
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name} did not load its rows: its error is printed above") from None
    finally:
        process.join()
    return outcome._replace(peak_anon_mb=peak_kib * 1024 / 1e6)


def _load(name: str, job: Job, to: Connection) -> None:
    load = CLIENTS[name].prepare(job)
    cpu_s, started = time.process_time(), time.perf_counter()
    loading = load()
    ended = time.perf_counter()
    committed_at, marks_at = loading or Loading(ended, [])
    marks = [at - started for at in marks_at]
    to.send(Outcome(job.n_rows, committed_at - started, ended - committed_at, time.process_time() - cpu_s, marks))


def _read_anon_kib(pid: int | None) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, _, rest = status.partition("RssAnon:")
    return int(rest.split()[0]) if rest else 0
