"""Searches while a table is loaded, indexed again and swapped: errors, songs not found, and how much slower they are.

    python -m benchmarks.serving              all phases, five minutes
    python -m benchmarks.serving --steps      also the searches of each step of a phase
    python -m benchmarks.serving --short      500 songs: whether it works, no figures

A searcher in its own process, on one connection, sends searches at fixed times, whether or not the previous one has
been answered; its latency counts from then, so that a stall counts for every search that it delayed. Statements and
transactions are those of `songvec search`. It looks for songs that never change, by their own vectors: one that is not
among the ten found is missing. Writing the changes to the cache beforehand is not part of a phase.
Exit code 1 if a search failed or a song was missing, or a phase's p99 is not below three times the quiet one.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.searcher import Sample, Window, collect, render, searching
from songvec_assets.cache import completion
from songvec_assets.cache.manifest import Completion
from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.upkeep import bring_index_up_to_date
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.swap import STAGED_FROM_ROWS, WantedTable, bring_table_up_to_date, drop_others, roll_back
from songvec_assets.vectors.table import SERVING, STAGING, TableSpec, VectorTable

MODEL = "made-up"
QUIET = "quiet"
_N_CLUSTERS, _N_FACTORS, _SPREAD = 300, 64, 1.15
_BATCH = 2_000


@dataclass(frozen=True)
class Size:
    """How large the world is.

    Attributes:
        n_songs, dimensions: of the table.
        n_ranges: of the cache.
        n_known: songs that are searched for and never change.
        searches_per_s: sent, however long they take.
        quiet_s: seconds without anything else.
        small_s: seconds for which small changes are loaded one after the other.
        settle_s: seconds after a swap that are counted with it: searches then read pages that none has read before.
        staged_from_rows: as `WantedTable` has it.
    """

    n_songs: int = 80_000
    dimensions: int = 2_000
    n_ranges: int = 5
    n_known: int = 200
    searches_per_s: float = 20.0
    quiet_s: float = 25.0
    small_s: float = 12.0
    settle_s: float = 2.0
    staged_from_rows: int = STAGED_FROM_ROWS

    @property
    def tiling(self) -> Tiling:
        """How song_ids are divided."""
        return Tiling(self.n_songs // self.n_ranges, self.n_songs)


SHORT = Size(
    n_songs=500,
    dimensions=16,
    n_known=20,
    searches_per_s=20,
    quiet_s=0.1,
    small_s=0.0,
    settle_s=0.1,
    staged_from_rows=100,
)


@dataclass
class Log:
    """What went on, and when, by the monotonic clock that all processes share."""

    phases: list[Window] = field(default_factory=list)
    steps: list[Window] = field(default_factory=list)
    swaps: list[Window] = field(default_factory=list)
    n_written: Counter[str] = field(default_factory=Counter)
    _step: Window | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase: the block, which reports its steps."""
        start = time.monotonic()
        self._step = Window(f"{name}: begin", start, start)
        yield
        self._begin("")
        self.phases.append(Window(name, start, time.monotonic()))

    def rows_a_second(self, name: str) -> float:
        """Rows written in a phase, over its seconds."""
        return self.n_written[name] / sum(each.stop - each.start for each in self.phases if each.name == name)

    def receive(self, progress: Progress) -> None:
        """Receive the package's progress: an index build's notes are its phases."""
        name = progress.step
        if progress.unit == "%" and progress.note and not progress.note.startswith("estimated"):
            name = f"{name}, {progress.note.rpartition(': ')[2]}"
        self._begin(name)

    def _begin(self, step: str) -> None:
        if self._step is None or self._step.name.endswith(f": {step}"):
            return
        now = time.monotonic()
        self.steps.append(replace(self._step, stop=now))
        phase = self._step.name.partition(":")[0]
        self._step = Window(f"{phase}: {step}", now, now) if step else None

    def swapped(self, name: str) -> None:
        """A swap has just ended."""
        now = time.monotonic()
        self.swaps.append(Window(name, now - 1, now + 1))


@dataclass
class World:
    """A cache of made-up vectors, what loads it, and the log."""

    database: Database
    folder: Path
    size: Size
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        self.cache = ModelCache(LocalStorage(self.folder / "embeddings"), MODEL, self.size.dimensions)
        self.spec = TableSpec(MODEL, self.size.dimensions)
        draw = np.random.default_rng(0)
        self._clusters = draw.standard_normal((_N_CLUSTERS, _N_FACTORS), dtype=np.float32)
        self._factors = draw.standard_normal((_N_FACTORS, self.size.dimensions), dtype=np.float32)
        known = draw.choice(self.size.n_songs, self.size.n_known, replace=False)
        self.known = {int(song_id): self.make(np.array([song_id]))[0] for song_id in known}

    def make(self, song_ids: NDArray[np.int64], version: int = 0) -> NDArray[np.float32]:
        """Vectors in clusters, (n, dimensions); another version's are others."""
        latent = np.stack([self._make_latent(song_id, version) for song_id in song_ids.tolist()])
        return latent @ self._factors

    def _make_latent(self, song_id: int, version: int) -> NDArray[np.float32]:
        draw = np.random.default_rng((song_id, version))
        noise = draw.standard_normal(_N_FACTORS, dtype=np.float32)
        return self._clusters[draw.integers(_N_CLUSTERS)] + _SPREAD * noise

    def change(self, version: int, share: float = 1.0) -> None:
        """Give a share of each range's songs vectors of a version, as a fill does; known songs keep theirs."""
        for song_range in itertools.islice(self.size.tiling, self.size.n_ranges):
            draw = np.random.default_rng((version, song_range.start))
            n_changed = round(share * self.size.tiling.width)
            song_ids = song_range.start + np.sort(draw.choice(self.size.tiling.width, n_changed, replace=False))
            if version:
                song_ids = song_ids[~np.isin(song_ids, list(self.known))]
            cached, _ = load_embeddings_from_cache(self.cache, song_range)
            for start in range(0, len(song_ids), _BATCH):
                piece = song_ids[start : start + _BATCH]
                hashes = [hash_text(f"{song_id} {version}") for song_id in piece.tolist()]
                write_embeddings_to_file(cached, piece.tolist(), hashes, self.make(piece, version))
            cached.add_written()
            completion.complete(cached, Completion(None, "", len(song_ids), 0, 0, "", 0, b""), 0.0)

    def load(self, target: str = SERVING, *, swap: bool = False) -> int:
        """Make the serving table equal the cache, through this table; rows written."""
        source = LoadSource(self.cache, self.size.tiling, Snapshots(LocalStorage(self.folder / "songs")))
        wanted = WantedTable(self.spec, IndexSettings(), swap, self.size.staged_from_rows)
        report = bring_table_up_to_date(self.database, source, wanted, RunContext(self.log.receive))
        assert report.target.table.name == target, report.target
        return sum(load.n_written for load in report.loads)

    def index(self, more_lists: int = 0) -> None:
        """Build the index; even if there is one, if it is to have more lists."""
        table = VectorTable(self.database)
        index = table.index
        wanted = IndexSettings(lists=index.lists + more_lists if index else None)
        bring_index_up_to_date(table, self.cache, self.spec, wanted, RunContext(self.log.receive))


def run(database: Database, folder: Path, size: Size) -> tuple[Log, list[Sample]]:
    """Run all phases on a table that serves."""
    world = World(database, folder, size)
    log, versions = world.log, itertools.count(1)
    world.change(0)
    world.load()
    world.index()
    with searching(database.url, world.known, size.searches_per_s) as samples:
        time.sleep(size.settle_s)
        with log.phase(QUIET):
            time.sleep(size.quiet_s)
        for share in (0.01, 0.05):
            _load_small_changes(world, versions, share)
        with log.phase("index rebuilt"):
            world.index(more_lists=1)
        world.change(next(versions))
        with log.phase("all changed, staged and swapped in"):
            world.load(STAGING)
            log.swapped("swap")
            time.sleep(size.settle_s)
        world.spec = replace(world.spec, vector_type="halfvec")
        with log.phase("another type, staged and swapped in"):
            world.load(STAGING, swap=True)
            log.swapped("swap of another type")
            time.sleep(size.settle_s)
        with log.phase("rolled back, and the other dropped"):
            roll_back(database)
            log.swapped("rollback")
            time.sleep(size.settle_s)
            drop_others(database)
            time.sleep(size.settle_s)
    return log, samples


def _load_small_changes(world: World, versions: Iterator[int], share: float) -> None:
    """One after the other, until the phase has lasted long enough to have a 99th percentile."""
    name, seconds = f"{share:.0%} changed, in place, again and again", 0.0
    while not seconds or seconds < world.size.small_s:
        world.change(next(versions), share)
        with world.log.phase(name):
            world.log.n_written[name] += world.load()
        seconds += world.log.phases[-1].stop - world.log.phases[-1].start


def main() -> None:
    """Print the table, and what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--songs", type=int, default=Size.n_songs)
    parser.add_argument("--short", action="store_true", help=f"{SHORT.n_songs} songs, and no pauses")
    parser.add_argument("--steps", action="store_true", help="also by step")
    asked = parser.parse_args()
    # all songs changed must be many enough to be staged
    given = Size(n_songs=asked.songs, staged_from_rows=min(STAGED_FROM_ROWS, asked.songs // 2))
    with tempfile.TemporaryDirectory(prefix="serving-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # the embedded server may run as another user
        database = start_embedded_server(Path(folder) / "pg")
        ensure_schema(database)
        log, samples = run(database, Path(folder), SHORT if asked.short else given)
    figures = collect(log.phases, samples)
    quiet = figures[0]
    print(render(figures, quiet, "phase (to reach: no error, none missing, p99 / quiet p99 < 3)"))
    print()
    print(render(collect(log.swaps, samples), quiet, "a second around"))
    if asked.steps:
        print()
        print(render(collect(log.steps, samples), quiet, "step"))
    print()
    for name in log.n_written:
        print(f"{name}: {log.rows_a_second(name):,.0f} rows a second")
    outcomes = Counter(sample.outcome for sample in samples)
    print(f"all the while: {outcomes.total():,} searches, {dict(outcomes - Counter({'': len(samples)})) or 'all well'}")
    reached = all(each.is_reached(quiet) for each in figures) and set(outcomes) == {""}
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
