"""What a large catalogue costs: seconds and memory of a first run, of refreshes, of `status` and `estimate`; disk.

    python -m benchmarks.at_size                     1,000,000 songs with short lyrics, vectors of 16 values
    python -m benchmarks.at_size --songs 300000 1200000 12000000 --dimensions 8    several sizes, and the growth
    python -m benchmarks.at_size --songs 20000       a short form

Real commands, each in its own process, on a real Postgres and Dagster instance; the tests' provider answers at once,
since the days that a real one takes are not what is measured. Everything is embedded, loaded and indexed first. Then
each command runs: a refresh with nothing to do, one after 0.1 % of the songs changed in all ranges, `status`, and
`estimate` on the complete cache.
Seconds are from start to end, imports included; `start` is a command that does nothing. Dagster's are those of a run
outside the bodies of its steps: imports, the instance, events at the start and end of steps. CPU seconds and peak
RssAnon are of the command's process. Growth is p in size^p, between the last two sizes: 1 is linear.
Exit code 1 if a goal is missed; seconds are to be reached with up to a million songs.
"""

import argparse
import math
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.embedding_client import print_table
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import variables
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import running_provider

_BIN = Path(sys.executable).parent
_LOOK_S = 0.05
N_SONGS, DIMENSIONS = 1_000_000, 16
MAX_ANON_MB = 500


class Step(NamedTuple):
    """A command to measure, and the seconds that it may take; if it only reads, beyond the start of a command."""

    name: str
    command: Sequence[str]
    max_s: float = math.inf
    is_look: bool = False


class Measure(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_s: float
    anon_mb: float


STEPS = (
    Step("first run", ("run",)),
    Step("start", ("settings",)),
    Step("nothing to do", ("run",), 12),
    Step("0.1 % changed", ("run",), 18),
    Step("status", ("status",), 2, is_look=True),
    Step("estimate", ("estimate", "--no-refresh"), 3, is_look=True),
)
CHANGE = "UPDATE songs SET lyrics = lyrics || ' new' WHERE id % 1000 = 7"


def create_songs(url: str, n_songs: int) -> None:
    """Table `songs`, its texts of about 100 bytes."""
    execute(url, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
    execute(
        url,
        "INSERT INTO songs SELECT n, 'Song no. ' || n, 'Artist ' || n % 5000, 'la ' || md5(n::text) || md5('x' || n) "
        f"FROM generate_series(0, {n_songs - 1}) n",
    )
    execute(url, "VACUUM ANALYZE songs")


def run_command(command: Sequence[str], environment: dict[str, str], folder: Path) -> Measure:
    """Run a `songvec` command.

    Raises:
        RuntimeError: it failed.
    """
    started, cpu_s, peak_kib = time.perf_counter(), children_cpu_s(), 0
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [str(_BIN / "songvec"), *command], cwd=folder, env=environment, stdout=output, stderr=output
        )
        while process.poll() is None:
            peak_kib = max(peak_kib, read_anon_kib(process.pid))
            time.sleep(_LOOK_S)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"songvec {' '.join(command)} failed: {output.read()[-2000:]}")
    return Measure(seconds, children_cpu_s() - cpu_s, peak_kib * 1024 / 1e6)


def children_cpu_s() -> float:
    """CPU seconds of all processes that this one waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_anon_kib(pid: int) -> int:
    """Anonymous memory of a process; 0 if it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0


def read_last_run(home: Path, seconds: float) -> dict[str, float]:
    """Seconds of the bodies of the last run's steps and of the rest, and its events.

    Args:
        home: of the Dagster instance.
        seconds: of the command.
    """
    runs = [path for path in (home / "history" / "runs").glob("*.db") if path.stem != "index"]
    with closing(sqlite3.connect(max(runs, key=lambda path: path.stat().st_mtime))) as events:
        # the last output of a step is recorded when its body has ended
        bodies = dict(
            events.execute("""
                SELECT step_key, 86400 * (
                    julianday(max(timestamp) FILTER (WHERE dagster_event_type = 'STEP_OUTPUT'))
                    - julianday(min(timestamp) FILTER (WHERE dagster_event_type = 'STEP_START')))
                FROM event_logs WHERE step_key <> '' GROUP BY step_key ORDER BY min(id)
            """)
        )
        [(n_events,)] = events.execute("SELECT count(*) FROM event_logs")
    return bodies | {"outside of the steps' bodies": seconds - sum(bodies.values()), "events": n_events}


def measure_folder(folder: Path) -> dict[str, float]:
    """Its files and megabytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {f"files in {folder.name}": len(sizes), f"MB in {folder.name}": sum(sizes) / 1e6}


def measure_size(n_songs: int, dimensions: int, url: str, folder: Path) -> dict[str, float]:
    """All figures of one size, by name.

    Args:
        n_songs: to create.
        dimensions: values of a vector.
        url: of an empty database.
        folder: to work in.
    """
    figures: dict[str, float] = {}
    create_songs(url, n_songs)
    with running_provider(keep_texts=False) as provider:
        # without compiled files each process would compile the package again, which no user's does
        dropped = {*variables(), "DAGSTER_HOME", "PYTHONDONTWRITEBYTECODE"}
        environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
            "POSTGRES_URL": url,
            "FIREWORKS_API_KEY": provider.api_key,
            "FIREWORKS_BASE_URL": provider.base_url,
            "SONGVEC_STORAGE": str(folder / "store"),
            "SONGVEC_EMBEDDING_DIMENSIONS": str(dimensions),
            "SONGVEC_TOKENS_PER_MINUTE": "2000000000",
            "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
        }
        for step in STEPS:
            if step.name == "0.1 % changed":
                execute(url, CHANGE)
            measured = run_command(step.command, environment, folder)
            found = dict(zip(("seconds", "CPU s", "RssAnon MB"), measured, strict=True))
            if step.command == ("run",):
                found |= read_last_run(folder / ".dagster", measured.seconds)
                found |= measure_folder(folder / ".dagster") | measure_folder(folder / "store")
            figures |= {f"{step.name}: {name}": figure for name, figure in found.items()}
            print(f"{n_songs:,} songs, {step.name}: {measured.seconds:.1f} s", flush=True)
    return figures


def find_missed(n_songs: int, figures: dict[str, float]) -> list[str]:
    """The steps that missed a goal."""
    missed = [step.name for step in STEPS if figures[f"{step.name}: RssAnon MB"] > MAX_ANON_MB]
    for step in STEPS if n_songs <= N_SONGS else ():
        max_s = step.max_s + figures["start: seconds"] * step.is_look
        if figures[f"{step.name}: seconds"] > max_s:
            missed.append(f"{step.name} ({max_s:.1f} s)")
    return missed


def render_growth(before: float, after: float, ratio: float) -> str:
    """The exponent of growth; nothing for what does not grow or is zero."""
    return f"{math.log(after / before) / math.log(ratio):.2f}" if before > 0 and after > 0 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--songs", type=int, nargs="+", default=[N_SONGS])
    parser.add_argument("--dimensions", type=int, default=DIMENSIONS)
    given = parser.parse_args(arguments)
    sizes, taken, missed = sorted(given.songs), [], []
    with tempfile.TemporaryDirectory(prefix="songvec-size-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        server_url = start_embedded_server(folder / "pg").url
        for n_songs in sizes:
            database, place = f"songs_{n_songs}", folder / f"{n_songs}"
            place.mkdir()
            print(f"{n_songs:,} songs in {place}", flush=True)
            execute(server_url, f"CREATE DATABASE {database}")
            taken.append(measure_size(n_songs, given.dimensions, with_parts(server_url, database=database), place))
            execute(server_url, f"DROP DATABASE {database} WITH (FORCE)")
            shutil.rmtree(place)
            missed += [f"{each} of {n_songs:,}" for each in find_missed(n_songs, taken[-1])]
    rows = []
    for figure in taken[-1]:
        values = [figures.get(figure, 0.0) for figures in taken]
        growth = [render_growth(*values[-2:], sizes[-1] / sizes[-2])] if len(sizes) > 1 else []
        rows.append([figure, *(f"{value:,.1f}" for value in values), *growth])
    columns = ["", *(f"{n_songs:,} songs" for n_songs in sizes), *(["growth"] if len(sizes) > 1 else [])]
    print_table(" | ".join(columns), rows, markdown=False)
    print(f"vectors of {given.dimensions}, {psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print(f"missed: {', '.join(missed)}" if missed else f"all reached, and RssAnon of {MAX_ANON_MB} MB at most")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
