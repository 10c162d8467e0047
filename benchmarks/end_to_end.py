"""50,000 songs from Postgres to a pgvector table, from process start to process end: this project and its peers.

    python -m benchmarks.end_to_end                    three rounds in turn; LangChain with a tenth of the songs
    python -m benchmarks.end_to_end --peers PYTHON     an interpreter with `langchain-postgres`; without it no LangChain
    make bench-e2e                                     installs the peers, and compares with all of them

Every contestant is a process of its own with a fresh copy of the songs' database, after a CHECKPOINT. All send the same
texts in requests of 256, eight in flight, to the tests' provider: its own process, 100 ms of latency, vectors of 2,000
values in 200 clusters. Peers are programs in `by_hand`, and have neither index nor checks. `songvec run` exports,
embeds, loads, indexes, measures recall, checks and draws; `embed, load` is this package's API without the index. After
each, rows are counted and some vectors compared. CPU seconds are user and system, of the process, and of Postgres.

Exit code 1 if a goal is missed: `songvec run` in 1.1 times the time of the program with AsyncOpenAI and COPY; without
the index at 1.5 times its rate.
"""

import argparse
import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.cache_fill import N_SONGS, create_catalogue
from benchmarks.embedding_client import print_table
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import variables
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import Provider, running_provider, vector_of

BATCH, IN_FLIGHT, DIMENSIONS, N_CLUSTERS, LATENCY_S = 256, 8, 2000, 200, 0.1
_HERE = Path(__file__).parent
_PROVIDER: dict[str, Any] = {"latency_s": LATENCY_S, "clusters": N_CLUSTERS, "keep_texts": False}

WITHOUT_INDEX = """
import json, time
from songvec_assets.pipeline import Pipeline

seconds = {}
with Pipeline.from_env() as songs:
    for name in STEPS:
        started = time.perf_counter()
        getattr(songs, name)()
        seconds[name] = time.perf_counter() - started
print(json.dumps(seconds))
"""
RUN, CORE, STEPS, SCRIPT = "songvec run", "export, embed, load", "the same and index", "AsyncOpenAI + COPY"
BASETEN, LANGCHAIN = "Baseten + COPY", "LangChain PGVectorStore"
_PEERS = {
    SCRIPT: "openai, psycopg",
    BASETEN: "baseten_performance_client, psycopg",
    LANGCHAIN: "langchain_openai, langchain_postgres, psycopg",
}
"""The libraries that each needs."""


@dataclass(frozen=True)
class Contestant:
    """A way to get songs into a table.

    Attributes:
        command: of its process.
        share: of the songs: slow ones get fewer, at the same rate.
    """

    command: Sequence[str]
    share: float = 1.0


@dataclass(frozen=True)
class Measure:
    """One process.

    Attributes:
        n_songs: embedded.
        seconds: from its start to its end.
        cpu_s, postgres_s: CPU seconds of it, and of the server meanwhile.
        peak_mb: its peak memory.
        in_flight: most requests at the provider at once.
        steps: seconds by step, if it says so.
    """

    n_songs: int
    seconds: float
    cpu_s: float
    postgres_s: float
    peak_mb: float
    in_flight: int
    steps: dict[str, float] = field(default_factory=dict)


def find_contestants(peers: str | None) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that can run, by name; and why the others cannot."""
    python, folder = sys.executable, _HERE / "by_hand"
    core, steps = (
        WITHOUT_INDEX.replace("STEPS", repr(names))
        for names in (("export", "embed", "load"), ("export", "embed", "load", "build_index"))
    )
    found = {
        RUN: Contestant((str(Path(python).parent / "songvec"), "run")),
        CORE: Contestant((python, "-c", core)),
        STEPS: Contestant((python, "-c", steps)),
        SCRIPT: Contestant((python, str(folder / "openai_copy.py"))),
        BASETEN: Contestant((python, str(folder / "baseten_copy.py"))),
        # contestants run in folders of their own; a link is not followed: it is what makes an environment
        LANGCHAIN: Contestant((str(Path(peers or python).absolute()), str(folder / "langchain_store.py")), 0.1),
    }
    left_out = {}
    for name, libraries in _PEERS.items():
        imported = subprocess.run(
            [found[name].command[0], "-c", f"import {libraries}"], capture_output=True, text=True, check=False
        )
        if imported.returncode:
            left_out[name] = imported.stderr.strip().splitlines()[-1]
            del found[name]
    return found, left_out


@dataclass
class Bench:
    """A server with the songs, and the provider."""

    folder: Path
    provider: Provider
    n_songs: int
    _number: int = 0

    def __post_init__(self) -> None:
        self.url = start_embedded_server(self.folder / "pg").url
        create_catalogue(self.url, self.n_songs)
        self.postmaster = psutil.Process(self._find_postmaster())

    def _find_postmaster(self) -> int:
        return int((self.folder / "pg" / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])

    def run(self, label: str, contestant: Contestant) -> Measure:
        """Run one in a new database, check what it stored, and print its time: all of them take minutes.

        Raises:
            RuntimeError: it failed, or stored something else.
        """
        self._number += 1
        name, n_songs = f"run_{self._number}", round(contestant.share * self.n_songs)
        execute(self.url, f"CREATE DATABASE {name} TEMPLATE catalogue")
        url = with_parts(self.url, database=name)
        if n_songs < self.n_songs:
            execute(url, f"DELETE FROM songs WHERE id >= {n_songs}")
        execute(self.url, "CHECKPOINT")
        self.provider.reset_ledger()
        place = self.folder / name
        place.mkdir()
        measure = self._time(contestant, self._environment(url, place), place, n_songs)
        print(f"{label}: {n_songs:,} songs in {measure.seconds:.1f} s", flush=True)
        self._check(url, n_songs)
        execute(self.url, f"DROP DATABASE {name}")
        shutil.rmtree(place)
        return measure

    def _environment(self, url: str, place: Path) -> dict[str, str]:
        dropped = {*variables(), "DAGSTER_HOME"}
        return {name: value for name, value in os.environ.items() if name not in dropped} | {
            "POSTGRES_URL": url,
            "FIREWORKS_API_KEY": self.provider.api_key,
            "FIREWORKS_BASE_URL": self.provider.base_url,
            "SONGVEC_STORAGE": str(place / "store"),
            "SONGVEC_CONCURRENCY": str(IN_FLIGHT),
            "SONGVEC_MAX_REQUEST_TEXTS": str(BATCH),
            "SONGVEC_MAX_REQUEST_TOKENS": "1000000",
            "SONGVEC_TOKENS_PER_MINUTE": "2000000000",
            "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
        }

    def _time(self, contestant: Contestant, environment: dict[str, str], place: Path, n_songs: int) -> Measure:
        with (place / "output").open("w+") as output:
            postgres_s, started = self._postgres_s(), time.perf_counter()
            process = subprocess.Popen(contestant.command, cwd=place, env=environment, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            output.seek(0)
            said = output.read()
        if status:
            raise RuntimeError(f"{contestant.command} failed: {said[-3000:]}")
        return Measure(
            n_songs,
            seconds,
            usage.ru_utime + usage.ru_stime,
            self._postgres_s() - postgres_s,
            usage.ru_maxrss * 1024 / 1e6,
            self.provider.ledger()["max_in_flight"],
            json.loads(said.splitlines()[-1]) if said.rstrip().endswith("}") else {},
        )

    def _postgres_s(self) -> float:
        """CPU seconds of the server's processes, those that ended included."""
        times = [self.postmaster.cpu_times(), *(each.cpu_times() for each in self.postmaster.children())]
        return sum(each.user + each.system for each in times) + times[0].children_user + times[0].children_system

    def _check(self, url: str, n_songs: int) -> None:
        [(n_rows,)] = execute(url, "SELECT count(*) FROM song_embeddings")
        if n_rows != n_songs:
            raise RuntimeError(f"expected {n_songs} rows, got {n_rows}")
        for song_id in (0, n_songs // 2, n_songs - 1):
            query = (
                "SELECT name || ' by ' || artist || chr(10) || lyrics, embedding FROM songs JOIN song_embeddings ON "
            )
            [(text, vector)] = execute(url, f"{query} song_id = id WHERE id = {song_id}")
            found = np.array(json.loads(vector), dtype=np.float32)
            if np.abs(found - vector_of(text, DIMENSIONS, N_CLUSTERS)).max() > 1e-6:
                raise RuntimeError(f"wrong vector for song {song_id}")


def compare(measures: dict[str, list[Measure]]) -> list[list[str]]:
    """Medians over the rounds."""
    return [
        [
            name,
            f"{runs[0].n_songs:,}",
            f"{median(each.seconds for each in runs):.1f}",
            f"{min(each.seconds for each in runs):.1f}–{max(each.seconds for each in runs):.1f}",
            f"{median(each.n_songs / each.seconds for each in runs):,.0f}",
            f"{median(each.cpu_s for each in runs):.1f}",
            f"{median(each.postgres_s for each in runs):.1f}",
            f"{median(each.peak_mb for each in runs):,.0f}",
            f"{max(each.in_flight for each in runs)}",
        ]
        for name, runs in measures.items()
    ]


def compare_pairs(measures: dict[str, list[Measure]]) -> tuple[list[list[str]], bool]:
    """Seconds per song in ratio to the program by hand, within each round; and whether the goals are reached."""
    rows, all_reached = [], True
    for name, runs in measures.items():
        if name == SCRIPT or SCRIPT not in measures:
            continue
        pairs = list(zip(runs, measures[SCRIPT], strict=True))
        ratios = [one.seconds / one.n_songs / (other.seconds / other.n_songs) for one, other in pairs]
        cpus = [
            (one.cpu_s + one.postgres_s) / one.n_songs / ((other.cpu_s + other.postgres_s) / other.n_songs)
            for one, other in pairs
        ]
        goal = {RUN: 1.1, CORE: 1 / 1.5}.get(name)
        all_reached &= goal is None or median(ratios) <= goal
        rows.append(
            [
                f"{name} / {SCRIPT}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                f"{1 / median(ratios):.2f}",
                f"{median(cpus):.2f}",
                "" if goal is None else f"<= {goal:.2f}",
                "" if goal is None else "yes" if median(ratios) <= goal else "NO",
            ]
        )
    return rows, all_reached


def main() -> None:
    """Measure what the command line asks for, print it, and say whether the goals are reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--songs", type=int, default=N_SONGS)
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with langchain-postgres and langchain-openai")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants, by the beginning of their names")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    found, left_out = find_contestants(asked.peers)
    contestants = {
        name: each for name, each in found.items() if asked.only is None or name.startswith(tuple(asked.only))
    }
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}; `make bench-e2e` installs it and compares with it", flush=True)
    if not contestants:
        parser.error(f"expected beginnings of {', '.join(found)}, got {' '.join(asked.only)}")
    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    folder = tempfile.TemporaryDirectory(prefix=f"e2e-{getpass.getuser()}-", ignore_cleanup_errors=True)
    with folder, running_provider(**_PROVIDER) as provider:
        Path(folder.name).chmod(0o755)  # the embedded server may run as another user
        bench = Bench(Path(folder.name), provider, asked.songs)
        rounds = [{name: bench.run(name, each) for name, each in contestants.items()} for _ in range(asked.rounds)]
    measures = {name: [each[name] for each in rounds] for name in contestants}
    columns = "contestant | songs | seconds | min–max | songs/s | CPU s | Postgres CPU s | peak MB | in flight"
    print_table(columns, compare(measures), asked.markdown)
    for name, runs in measures.items():
        steps = [[step, f"{median(each.steps[step] for each in runs):.1f}"] for step in runs[0].steps]
        print_table(f"{name} | seconds", steps, asked.markdown)
    if SCRIPT not in measures:
        print(f"no ratios: {SCRIPT}, which all are compared with, did not run")
    rows, all_reached = compare_pairs(measures)
    columns = "ratio | of seconds per song | min–max | of rates | of CPU seconds | to reach | reached"
    print_table(columns, rows, asked.markdown)
    sys.exit(not all_reached)


if __name__ == "__main__":
    main()
