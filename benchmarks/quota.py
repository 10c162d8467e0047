"""How much of a quota is used, and how often it is exceeded, against a provider that counts over every sliding minute.

    python -m benchmarks.quota                   all scenarios at once, for three minutes
    python -m benchmarks.quota --seconds 20      a short form

The provider allows 900,000 tokens and 6,000 requests in any sliding minute and answers 429 to what is more, without a
Retry-After. Songs have about 400 tokens, in ranges of 2,000 song_ids, so that ranges end in the middle of it. Each
scenario has its own provider, database and storage; its filling processes run the real fill and are killed at the end.
Exit code 1 if a scenario misses its goal in three minutes.
Used: tokens billed from the first song's answer on, over the seconds measured, as a share of the quota.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import Settings
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import Tiling
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import Provider, running_provider

ROOT = Path(__file__).parents[1]
TOKENS_PER_MINUTE, REQUESTS_PER_MINUTE = 900_000, 6_000
N_SONGS = 10_000
TILING = Tiling(width=2_000, stop=N_SONGS)


@dataclass(frozen=True)
class Scenario:
    """Processes that fill, and how the provider differs from their settings."""

    name: str
    latency_s: float
    n_processes: int = 1
    configured: float = 1.0

    @property
    def to_reach(self) -> str:
        """Its goal."""
        return ">= 97 %, < 0.5 %" if self.configured == 1 else ">= 90 %, < 5 % after a minute"


SCENARIOS = (
    Scenario("one process, 100 ms", 0.1),
    Scenario("one process, 10 s", 10.0),
    Scenario("two processes, 1 s", 1.0, n_processes=2),
    Scenario("twice the quota configured, 1 s", 1.0, configured=2.0),
)


@dataclass(frozen=True)
class Result:
    """What a scenario came to; shares are of one."""

    scenario: Scenario
    used: float
    used_by_minute: list[float]
    n_requests: int
    n_limited: int
    n_limited_after_a_minute: int
    n_requests_after_a_minute: int
    max_in_flight: int

    @property
    def reached(self) -> bool:
        """Whether it reached its goal."""
        if self.scenario.configured == 1:
            return self.used >= 0.97 and self.n_limited < 0.005 * self.n_requests
        return self.used >= 0.90 and self.n_limited_after_a_minute < 0.05 * self.n_requests_after_a_minute


def run_scenario(scenario: Scenario, server_url: str, folder: Path, seconds: float, n_songs: int = N_SONGS) -> Result:
    """Run one scenario in a new database and folder."""
    database = f"quota_{SCENARIOS.index(scenario)}"
    execute(server_url, f"CREATE DATABASE {database}")
    quota = {"tokens_per_minute": TOKENS_PER_MINUTE, "requests_per_minute": REQUESTS_PER_MINUTE}
    control: dict[str, Any] = {"latency_s": scenario.latency_s, "quota": quota, "keep_texts": False}
    folder.mkdir()
    with running_provider(ledger_file=folder / "ledger", **control) as provider:
        settings = {
            "postgres_url": with_parts(server_url, database=database),
            "fireworks_api_key": provider.api_key,
            "fireworks_base_url": provider.base_url,
            "storage": str(folder / "store"),
            "tokens_per_minute": round(TOKENS_PER_MINUTE * scenario.configured),
            "requests_per_minute": round(REQUESTS_PER_MINUTE * scenario.configured),
            "range_size": TILING.width,
            "song_id_stop": TILING.stop,
        }
        _export(Pipeline(Settings(**settings)), n_songs)
        with _filling(settings, scenario.n_processes):
            return _watch(scenario, provider, folder / "ledger", seconds)


def _export(pipeline: Pipeline, n_songs: int) -> None:
    """Songs of 1,400 to 1,800 characters: at four characters per token, about 400 tokens each."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2_000)]
    songs = [
        {"id": song_id, "lyrics": " ".join(draw.choices(words, k=400))[: draw.randint(1_400, 1_800)]}
        for song_id in range(n_songs)
    ]
    with pipeline.database.get_connection() as connection:
        connection.execute(sa.text("CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)"))
        connection.execute(sa.text("INSERT INTO songs VALUES (:id, 'Song ' || :id, 'Ann', :lyrics)"), songs)
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, TILING)


@contextmanager
def _filling(settings: dict[str, Any], n_processes: int) -> Iterator[None]:
    """Processes that fill, each its part of the ranges."""
    command = [sys.executable, "-m", "benchmarks.quota", "--fill", json.dumps(settings)]
    parts = [f"{part}/{n_processes}" for part in range(n_processes)]
    processes = [subprocess.Popen([*command, part], cwd=ROOT) for part in parts]
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def fill(settings: dict[str, Any], part: str) -> None:
    """Fill every n-th range, in this process."""
    first, step = map(int, part.split("/"))
    pipeline = Pipeline(Settings(**settings))
    pipeline.filler().fill_ranges(list(TILING)[first::step], lambda _: None)


def _watch(scenario: Scenario, provider: Provider, ledger: Path, seconds: float) -> Result:
    """Wait until the first song was billed and the seconds have passed; read what happened from the ledgers."""
    while not (started := [line["time"] for line in _billed(ledger) if line["n_texts"] > 1]):
        time.sleep(0.05)
    minutes = []
    for end in (min(60.0, seconds), seconds):
        time.sleep(max(0.0, started[0] + end - time.time()))
        minutes.append(provider.ledger())
    after_a_minute, at_end = minutes
    lines = [(line["time"] - started[0], line["tokens"]) for line in _billed(ledger)]
    limited = [each["requests_by_status"].get("429", 0) for each in minutes]
    marks = [*range(0, int(seconds), 60), seconds]
    return Result(
        scenario,
        sum(tokens for at, tokens in lines if 0 <= at < seconds) / (TOKENS_PER_MINUTE * seconds / 60),
        [
            sum(tokens for at, tokens in lines if begin <= at < end) / (TOKENS_PER_MINUTE * (end - begin) / 60)
            for begin, end in pairwise(marks)
        ],
        at_end["requests"],
        limited[1],
        limited[1] - limited[0],
        at_end["requests"] - after_a_minute["requests"],
        at_end["max_in_flight"],
    )


def _billed(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines() if line.endswith("}")]


def render(results: list[Result]) -> str:
    """The results as a Markdown table."""
    rows = [
        "| scenario | used | by minute | requests | 429 | 429 after a minute | in flight at most | to reach |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in results:
        share = each.n_limited / each.n_requests
        later = each.n_limited_after_a_minute / max(1, each.n_requests_after_a_minute)
        rows.append(
            f"| {each.scenario.name} | {each.used:.1%} | {', '.join(f'{used:.1%}' for used in each.used_by_minute)} "
            f"| {each.n_requests} | {each.n_limited} ({share:.1%}) | {each.n_limited_after_a_minute} ({later:.1%}) "
            f"| {each.max_in_flight} | {each.scenario.to_reach} |"
        )
    return "\n".join(rows)


def main() -> None:
    """All scenarios at once: each needs a hundredth of a core."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--fill", nargs=2, metavar=("SETTINGS", "PART"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.fill:
        fill(json.loads(asked.fill[0]), asked.fill[1])
        return
    with tempfile.TemporaryDirectory(prefix="quota-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        url = start_embedded_server(Path(folder) / "pg").url
        with ThreadPoolExecutor(len(SCENARIOS)) as pool:
            runs = [
                pool.submit(run_scenario, scenario, url, Path(folder) / f"scenario_{place}", asked.seconds)
                for place, scenario in enumerate(SCENARIOS)
            ]
            results = [run.result() for run in runs]
    print(render(results))
    sys.exit(0 if all(result.reached for result in results) else 1)


if __name__ == "__main__":
    main()
