"""What the server tells of an index build while it runs, as one percentage; and its end where that is asked for."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, ReportProgress, StopSignal
from songvec_assets.vectors.sizes import BuildEstimate

STEP = "build index"
_POLL_S = 1.0


class ServerProgress(NamedTuple):
    """A row of `pg_stat_progress_create_index`."""

    phase: str
    blocks_done: int
    blocks_total: int
    tuples_done: int
    tuples_total: int


_PHASES = {
    # the server's phase: ours, and where in ours it begins and ends
    "building index: performing k-means": ("k-means", 0.0, 1.0),
    "building index: assigning tuples": ("assigning", 0.0, 1.0),
    "building index: loading tuples": ("loading", 0.0, 1.0),
    "index validation: scanning index": ("validation", 0.0, 0.3),
    "index validation: sorting tuples": ("validation", 0.3, 0.35),
    "index validation: scanning table": ("validation", 0.35, 1.0),
}


class BuildProgress:
    """One percentage over all phases of a build, each as long as it is estimated to be; it never goes back."""

    def __init__(self, estimate: BuildEstimate, progress: ReportProgress) -> None:
        self._estimate, self._report = estimate, progress
        self._phase, self._since, self._percent = "", 0.0, 0

    def tell(self, row: ServerProgress, now: float) -> None:
        """Report what the server says at a time, in seconds of any clock."""
        if row.phase != self._phase:
            self._phase, self._since = row.phase, now
        if row.phase in _PHASES:
            name, begin, end = _PHASES[row.phase]
            seconds = self._estimate.seconds
            share = begin + (end - begin) * self._share_of_phase(row, now, (end - begin) * seconds.get(name, 0.0))
            names = list(seconds)
            before = sum(seconds[each] for each in names[: names.index(name)]) if name in seconds else 0.0
            done = (before + share * seconds.get(name, 0.0)) / max(self._estimate.total_seconds, 1e-9)
            self._percent = max(self._percent, min(99, int(100 * done)))
        self._report(Progress(STEP, self._percent, 100, unit="%", note=row.phase))

    def _share_of_phase(self, row: ServerProgress, now: float, expected_s: float) -> float:
        """By the server's counters; k-means has none, and goes by the clock."""
        if row.phase.endswith("loading tuples"):
            return row.tuples_done / row.tuples_total if row.tuples_total else 0.0
        if row.blocks_total:
            return row.blocks_done / row.blocks_total
        return min(0.95, (now - self._since) / expected_s) if expected_s else 0.0


@contextlib.contextmanager
def watched(database: Database, pid: int, progress: BuildProgress, stop: StopSignal) -> Iterator[None]:
    """Tell the server's progress, and cancel its work where that is asked for, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            if stop.is_set():
                database.cancel()
            # the build goes on where its progress cannot be read
            with contextlib.suppress(DatabaseError), database.get_connection("web") as connection:
                row = connection.execute(
                    text("""
                        SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total
                        FROM pg_stat_progress_create_index WHERE pid = :pid
                    """),
                    {"pid": pid},
                ).one_or_none()
                if row is not None:
                    progress.tell(ServerProgress(*row), time.monotonic())

    watcher = threading.Thread(target=watch, daemon=True, name="songvec-index-progress")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=5)
