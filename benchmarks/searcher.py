"""A searcher in its own process, and the outcome of its searches.

It sends searches at fixed times over one connection, whether or not the previous one has been answered; latency
counts from the time a search was due, so that a stall counts for every search that it delayed. The table is searched
without its songs, so not by `songvec.search`. Times are of the monotonic clock, which all processes of a machine share.
"""

import gc
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.table import TableSpec, VectorTable, define_table

SLOWER_AT_MOST = 3.0
MISSING = "missing"
Known = dict[int, NDArray[np.float32]]
"""song_ids and their vectors."""


class Sample(NamedTuple):
    """A search: when it was due, its seconds, and its outcome: empty, `missing`, or an error."""

    at: float
    seconds: float
    outcome: str


@dataclass(frozen=True)
class Window:
    """When something was going on."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Figures:
    """The outcome of searches in all windows of a name; times are milliseconds."""

    name: str
    seconds: float
    outcomes: Counter[str]
    n: int
    p50: float
    p99: float
    slowest: float

    @classmethod
    def of(cls, name: str, windows: list[Window], samples: list[Sample]) -> "Figures":
        """The searches that were due within the windows."""
        met = [each for each in samples if any(window.start <= each.at < window.stop for window in windows)]
        ms = np.sort([1e3 * each.seconds for each in met] or [math.nan])
        p50, p99 = (float(ms[math.ceil(share * len(ms)) - 1]) for share in (0.5, 0.99))
        outcomes = Counter(each.outcome for each in met if each.outcome)
        return cls(name, sum(each.stop - each.start for each in windows), outcomes, len(met), p50, p99, float(ms[-1]))

    def is_reached(self, quiet: "Figures") -> bool:
        """Whether searches met neither errors nor missing songs, and were not three times as slow."""
        return not self.outcomes and (self is quiet or self.p99 < SLOWER_AT_MOST * quiet.p99)


@contextmanager
def searching(url: str, known: Known, per_s: float) -> Iterator[list[Sample]]:
    """Search for known songs, by their own vectors, while the block runs; the list has the searches after it."""
    samples: list[Sample] = []
    context = get_context("spawn")
    stop, (ours, theirs) = context.Event(), context.Pipe()
    process = context.Process(target=search, args=(url, known, per_s, stop, theirs), name="searcher")
    process.start()
    theirs.close()  # so that its end is ours too
    try:
        ours.recv()
        yield samples
        stop.set()
        samples.extend(ours.recv())
    finally:
        process.terminate()
        process.join()


def search(url: str, known: Known, per_s: float, stop: Event, to: Connection) -> None:
    """Search until asked to stop, then send all samples. Runs in its own process."""
    database = Database(url)
    samples: list[Sample] = []
    _search(database, *next(iter(known.items())))  # connects
    # collecting all objects of the libraries takes this process a tenth of a second now and then: no server's doing
    gc.freeze()
    gc.disable()
    to.send(None)
    at, parent = time.monotonic(), parent_process()
    for song_id, vector in itertools.cycle(known.items()):
        at += 1 / per_s
        if stop.is_set() or parent is None or not parent.is_alive():
            break
        time.sleep(max(0.0, at - time.monotonic()))
        try:
            outcome = _search(database, song_id, vector)
        except Exception as error:  # noqa: BLE001 - whatever a search meets is counted
            outcome = f"{type(error).__name__}: {error}"
        samples.append(Sample(at, time.monotonic() - at, outcome))
    to.send(samples)


def _search(database: Database, song_id: int, vector: NDArray[np.float32]) -> str:
    """A search by SQL of its own: `missing` if the song is not among the ten."""
    table, columns = VectorTable(database), define_table(TableSpec("", len(vector))).c
    distance = columns.embedding.cosine_distance(vector)
    nearest = sa.select(columns.song_id, (1 - distance).label("similarity")).order_by(distance).limit(10)
    with database.get_connection("web") as connection:
        table.read_spec(connection)
        probes = {"probes": str(table.read_probes(connection) or 1)}
        connection.execute(sa.text("SELECT set_config('ivfflat.probes', :probes, true)"), probes)
        found = connection.execute(nearest).all()
        table.read_spec(connection)
    return "" if song_id in {row.song_id for row in found} else MISSING


def collect(windows: list[Window], samples: list[Sample]) -> list[Figures]:
    """Figures by name, in the order of what went on."""
    names = dict.fromkeys(window.name for window in windows)
    return [Figures.of(name, [window for window in windows if window.name == name], samples) for name in names]


def render(figures: list[Figures], quiet: Figures, title: str) -> str:
    """Figures as a Markdown table."""
    rows = [
        f"| {title} | seconds | searches | errors | missing | p50 ms | p99 ms | slowest ms | p99 / quiet p99 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in figures:
        n_missing = each.outcomes[MISSING]
        rows.append(
            f"| {each.name} | {each.seconds:.1f} | {each.n} | {each.outcomes.total() - n_missing} | {n_missing} "
            f"| {each.p50:.1f} | {each.p99:.1f} | {each.slowest:.1f} | {each.p99 / quiet.p99:.2f} |"
        )
    return "\n".join(rows)
