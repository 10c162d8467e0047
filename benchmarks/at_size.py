"""What commands cost over a large catalogue: seconds and memory of a refresh, of `status` and of `estimate`.

    python -m benchmarks.at_size                     1,000,000 songs with short lyrics, vectors of 16 values
    python -m benchmarks.at_size --songs 20000       a short form

Everything is embedded, loaded and indexed first. Then each command runs in its own process: a refresh with nothing to
do, one after 0.1 % of the songs changed in all ranges, `status`, and `estimate` on the complete cache.
Seconds are from start to end, imports included; `start` is a command that does nothing. CPU seconds and peak RssAnon
are of the command's process. Exit code 1 if a goal is missed.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.embedding_client import print_table
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import variables
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import running_provider

_BIN = Path(sys.executable).parent
_DIMENSIONS = 16
_LOOK_S = 0.02
N_SONGS = 1_000_000
MAX_ANON_MB = 500


class Step(NamedTuple):
    """A command to measure, and the seconds that it may take; if it only reads, beyond the start of a command."""

    name: str
    command: Sequence[str]
    max_s: float
    is_look: bool = False


class Measure(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_s: float
    anon_mb: float

    def row(self, name: str, to_reach: str) -> list[str]:
        """For the table."""
        return [name, f"{self.seconds:.1f}", to_reach, f"{self.cpu_s:.1f}", f"{self.anon_mb:,.0f}"]


STEPS = (
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--songs", type=int, default=N_SONGS)
    given = parser.parse_args(arguments)
    rows, missed = [], []
    with (
        tempfile.TemporaryDirectory(prefix="songvec-size-", ignore_cleanup_errors=True) as name,
        running_provider() as provider,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        url = start_embedded_server(folder / "pg").url
        execute(url, "CREATE DATABASE catalogue")
        url = with_parts(url, database="catalogue")
        create_songs(url, given.songs)
        dropped = {*variables(), "DAGSTER_HOME"}
        environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
            "POSTGRES_URL": url,
            "FIREWORKS_API_KEY": provider.api_key,
            "FIREWORKS_BASE_URL": provider.base_url,
            "SONGVEC_STORAGE": str(folder / "store"),
            "SONGVEC_EMBEDDING_DIMENSIONS": str(_DIMENSIONS),
            "SONGVEC_TOKENS_PER_MINUTE": "2000000000",
            "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
        }
        rows.append(run_command(("run",), environment, folder).row("first run", ""))
        start = run_command(("settings",), environment, folder)
        rows.append(start.row("start", ""))
        for step in STEPS:
            if step.name == "0.1 % changed":
                execute(url, CHANGE)
            measured = run_command(step.command, environment, folder)
            max_s = step.max_s + start.seconds * step.is_look
            rows.append(measured.row(step.name, f"{max_s:.1f}"))
            if measured.seconds > max_s or measured.anon_mb > MAX_ANON_MB:
                missed.append(step.name)
    print_table("command | seconds | to reach | CPU s | RssAnon MB", rows, markdown=False)
    print(f"{given.songs:,} songs, {psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print(f"missed: {', '.join(missed)}" if missed else f"all reached, and RssAnon of {MAX_ANON_MB} MB at most")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
