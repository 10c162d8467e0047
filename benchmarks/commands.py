"""How long a person waits for a command, compared with Python's own `import dagster` in the same run.

    python -m benchmarks.commands                    five rounds; the demo, and 10,000 songs of 2,000 values
    python -m benchmarks.commands --rounds 1 --songs 1000

Each command is a process from its start to its end, with imports and, on the demo, the start and stop of the embedded
Postgres. The commands take turns, so that a busy moment hits all alike. The 10,000 songs are in a server that runs;
their vectors are by the tests' provider. Exit code 1 if a goal is missed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from benchmarks.at_size import children_cpu_s, create_songs
from benchmarks.embedding_client import print_table
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import DEFAULT_DIMENSIONS, variables
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import Provider, running_provider

_SONGVEC = str(Path(sys.executable).parent / "songvec")
_YARDSTICK = "import dagster"
N_SONGS, N_ROUNDS = 10_000, 5


class Timed(NamedTuple):
    """A command to time.

    Attributes:
        name: in the table.
        command: its arguments.
        max_s: seconds to reach; None: it is only compared with.
        at_size: whether it runs on the large catalogue; else on the demo.
    """

    name: str
    command: Sequence[str]
    max_s: float | None
    at_size: bool = False


COMMANDS = (
    Timed(_YARDSTICK, (sys.executable, "-c", "import dagster"), None),
    Timed("--help", (_SONGVEC, "--help"), 0.4),
    Timed("settings", (_SONGVEC, "settings"), 0.4),
    Timed("search", (_SONGVEC, "search", "leaving home to begin a new life overseas"), 1.5),
    Timed("status", (_SONGVEC, "status"), 1.5),
    Timed("run, nothing to do", (_SONGVEC, "run"), 5.0),
    Timed("run, nothing to do", (_SONGVEC, "run"), 6.0, at_size=True),
)


def time_command(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of a process, and its CPU seconds, which say more if the machine is busy.

    Raises:
        RuntimeError: it failed.
    """
    started, cpu_s = time.perf_counter(), children_cpu_s()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, children_cpu_s() - cpu_s


def prepare(folder: Path, provider: Provider, n_songs: int) -> dict[bool, tuple[Path, dict[str, str]]]:
    """Folder and environment of the demo and, under True, of the large catalogue, each after its first run."""
    # without compiled files each process would compile the package again, which no user's does
    dropped = {*variables(), "DAGSTER_HOME", "PYTHONDONTWRITEBYTECODE"}
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    url = start_embedded_server(folder / "pg").url
    execute(url, "CREATE DATABASE catalogue")
    url = with_parts(url, database="catalogue")
    create_songs(url, n_songs)
    large = {
        "POSTGRES_URL": url,
        "FIREWORKS_API_KEY": provider.api_key,
        "FIREWORKS_BASE_URL": provider.base_url,
        "SONGVEC_EMBEDDING_DIMENSIONS": str(DEFAULT_DIMENSIONS),
        "SONGVEC_TOKENS_PER_MINUTE": "2000000000",
        "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
    }
    places = {False: (folder / "demo", clean), True: (folder / "large", clean | large)}
    for at_size, (place, environment) in places.items():
        place.mkdir()
        seconds, _ = time_command((_SONGVEC, "run" if at_size else "demo"), place, environment)
        print(f"first run, {f'{n_songs:,} songs' if at_size else 'demo'}: {seconds:.1f} s", flush=True)
    return places


def main(arguments: Sequence[str] | None = None) -> int:
    """Time and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--songs", type=int, default=N_SONGS)
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args(arguments)
    taken: dict[Timed, list[tuple[float, float]]] = {each: [] for each in COMMANDS}
    with (
        tempfile.TemporaryDirectory(prefix="songvec-commands-", ignore_cleanup_errors=True) as name,
        running_provider() as provider,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        places = prepare(folder, provider, given.songs)
        for _ in range(given.rounds):
            for each in COMMANDS:
                taken[each].append(time_command(each.command, *places[each.at_size]))
    yardstick = median(seconds for seconds, _ in taken[COMMANDS[0]])
    rows, missed = [], []
    for each, pairs in taken.items():
        times, cpu_s = zip(*pairs, strict=True)
        where = "" if each.max_s is None else f"{given.songs:,} songs" if each.at_size else "demo"
        spread, goal = f"{min(times):.2f}–{max(times):.2f}", "" if each.max_s is None else f"<= {each.max_s}"
        ratio = f"{median(times) / yardstick:.2f}"
        rows.append([each.name, where, f"{median(times):.2f}", spread, ratio, f"{median(cpu_s):.2f}", goal])
        if each.max_s is not None and median(times) > each.max_s:
            missed.append(f"{each.name} ({where})")
    print_table(f"command | on | seconds | min–max | of {_YARDSTICK} | CPU s | to reach", rows, given.markdown)
    print(f"{given.rounds} rounds, {psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print(f"missed: {', '.join(missed)}" if missed else "all reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
