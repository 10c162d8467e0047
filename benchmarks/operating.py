"""What Dagster costs: the graph as `songvec run` compared with the bare core, and the first minutes of `dagster dev`.

    python -m benchmarks.operating                    100,000 songs, three rounds in turn; then 10,000 in `dagster dev`
    python -m benchmarks.operating --songs 2000 --ui-songs 500 --rounds 1    a short form

Both do the same with a new database and store, each in its own process from start to end, imports included:
export, embed (the tests' provider, 64 values, no latency, no quota), load, index, measure recall. The core calls four
functions; the run also makes what a person sees: events, metadata, charts, checks. The second part counts
from the start of `dagster dev` to the answer of its server, and from the launch of job `refresh` to the first
materialization and to the end. Exit code 1 if the ratio is over 1.15.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

from benchmarks.embedding_client import print_table
from songvec_assets.postgres.embedded import add_generated_songs, create_songs_table, start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import variables
from songvec_assets_tests.administration import dispose, execute, free_port, with_parts
from songvec_assets_tests.provider import Provider, running_provider

MOST = 1.15
_DIMENSIONS = 64
"""The provider's vectors are noise, of which an index finds little: at 2,000 values measuring that takes minutes, and
would hide what Dagster costs."""
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

CORE = """
from songvec_assets.pipeline import Pipeline
from songvec_assets.settings import Settings

pipeline = Pipeline(Settings())
pipeline.export()
pipeline.filler().fill_ranges(pipeline.held_ranges(), lambda report: print(report.error) if report.error else None)
pipeline.load()
pipeline.build_index()
"""
_LAUNCH = """
mutation ($params: ExecutionParams!) {
    launchRun(executionParams: $params) {
        __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
    }
}
"""
_STATUS = """
query ($id: ID!) {
    runOrError(runId: $id) { ... on Run { status stats { ... on RunStatsSnapshot { materializations } } } }
}
"""


class Bench:
    """A server with songs as a template database, a provider, and a project's folder."""

    def __init__(self, folder: Path, provider: Provider) -> None:
        self.folder, self.provider = folder, provider
        self.url = start_embedded_server(folder / "pg").url
        for name in ("pyproject.toml", "workspace.yaml", "dagster.yaml"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "songvec_assets").symlink_to(ROOT / "songvec_assets")
        self._number = 0

    def make_template(self, n_songs: int) -> str:
        """A database with the songs."""
        name = f"songs_{n_songs}"
        execute(self.url, f"CREATE DATABASE {name}")
        database = Database(with_parts(self.url, database=name))
        create_songs_table(database)
        add_generated_songs(database, n_songs)
        dispose(database.url)
        return name

    def begin(self, template: str) -> dict[str, str]:
        """The environment of a run over a fresh copy and a new store."""
        self._number += 1
        name = f"run_{self._number}"
        execute(self.url, f"CREATE DATABASE {name} TEMPLATE {template}")
        execute(self.url, "CHECKPOINT")
        dropped = {*variables(), "DAGSTER_HOME"}
        return {name: value for name, value in os.environ.items() if name not in dropped} | {
            "POSTGRES_URL": with_parts(self.url, database=name),
            "FIREWORKS_API_KEY": self.provider.api_key,
            "FIREWORKS_BASE_URL": self.provider.base_url,
            "SONGVEC_STORAGE": str(self.folder / f"store_{self._number}"),
            "SONGVEC_EMBEDDING_DIMENSIONS": str(_DIMENSIONS),
            "SONGVEC_TOKENS_PER_MINUTE": "2000000000",
            "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def time(self, command: Sequence[str], template: str) -> float:
        """Seconds of a process that does everything."""
        environment = self.begin(template)
        started = time.perf_counter()
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        shutil.rmtree(environment["SONGVEC_STORAGE"])
        return seconds

    @contextmanager
    def serving(self, environment: dict[str, str]) -> Iterator[str]:
        """`dagster dev`; the address of its GraphQL."""
        port = free_port()
        with (self.folder / "dev.log").open("wb") as log:
            command = [str(BIN / "dagster"), "dev", "-h", "127.0.0.1", "-p", str(port)]
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
            try:
                yield f"http://127.0.0.1:{port}/graphql"
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def ask(url: str, query: str, **variables: Any) -> Any:
    """One GraphQL question."""
    response = httpx2.post(url, json={"query": query, "variables": variables}, timeout=60)
    return response.json()["data"]


def wait_for(look: Any, patience_s: float = 900.0) -> Any:
    """Repeat the question until there is an answer."""
    deadline = time.perf_counter() + patience_s
    while time.perf_counter() < deadline:
        try:
            if answer := look():
                return answer
        except (httpx2.HTTPError, json.JSONDecodeError, KeyError, TypeError):
            pass
        time.sleep(0.1)
    raise TimeoutError


def time_ui(bench: Bench, template: str) -> dict[str, float]:
    """Seconds of the first minutes with the UI's server."""
    loaded = '{ repositoryOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: '
    loaded += '"songvec_assets"}) { ... on Repository { name } } }'
    started = time.perf_counter()
    with bench.serving(bench.begin(template)) as url:
        wait_for(lambda: ask(url, loaded)["repositoryOrError"].get("name"))
        ready = time.perf_counter()
        selector = {
            "repositoryName": "__repository__",
            "repositoryLocationName": "songvec_assets",
            "jobName": "refresh",
        }
        params = {"selector": selector, "runConfigData": {}, "mode": "default"}
        launched = ask(url, _LAUNCH, params=params)["launchRun"]
        run_id = launched["run"]["runId"]

        def status() -> Any:
            return ask(url, _STATUS, id=run_id)["runOrError"]

        wait_for(lambda: status()["stats"]["materializations"])
        first = time.perf_counter()
        ended = wait_for(lambda: status() if status()["status"] in ("SUCCESS", "FAILURE") else None)
        end = time.perf_counter()
        if ended["status"] != "SUCCESS":
            raise RuntimeError("the run failed; see dev.log")
    return {
        "server ready, from its start": ready - started,
        "first materialization, from the launch": first - ready,
        "end of the run, from the launch": end - ready,
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operating")
    parser.add_argument("--songs", type=int, default=100_000)
    parser.add_argument("--ui-songs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="operating-", ignore_cleanup_errors=True) as folder,
        running_provider() as provider,
    ):
        Path(folder).chmod(0o755)
        bench = Bench(Path(folder), provider)
        template = bench.make_template(asked.songs)
        ways = {"bare core": [sys.executable, "-c", CORE], "songvec run": [str(BIN / "songvec"), "run"]}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(asked.rounds):
            for name, command in ways.items():
                seconds[name].append(bench.time(command, template))
        rows = [[name, f"{median(each):.1f}", f"{min(each):.1f}–{max(each):.1f}"] for name, each in seconds.items()]
        print_table(f"{asked.songs:,} songs | seconds | min–max", rows, markdown=True)
        ratios = [run / core for core, run in zip(*seconds.values(), strict=True)]
        ratio = median(ratios)
        rows = [["songvec run / bare core", f"{ratio:.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}", f"<= {MOST}"]]
        print_table("ratio | median | min–max | to reach", rows, markdown=True)
        first_minutes = time_ui(bench, bench.make_template(asked.ui_songs))
        rows = [[name, f"{each:.1f}"] for name, each in first_minutes.items()]
        print_table(f"`dagster dev`, {asked.ui_songs:,} songs | seconds", rows, markdown=True)
    sys.exit(0 if ratio <= MOST else 1)


if __name__ == "__main__":
    main()
