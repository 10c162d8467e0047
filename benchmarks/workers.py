"""Several machines fill one catalogue through Dagster's Celery launcher, and die: speed, quota, fairness, the bill.

    python -m benchmarks.workers                     500,000 songs, about 28 minutes
    python -m benchmarks.workers --songs 80000       a short form

Postgres has the songs and Dagster's instance, SeaweedFS the store, Redis the queue. Workers are processes with homes
and temporary folders of their own. The provider answers after one second. One backfill goes through four phases: one
worker; three of them; three that the quota limits; and the same while machines, or the processes of runs, get SIGKILL
at random, until all is filled. Then a backfill of more songs, with a budget that is too small; they are killed again.
The window of the third phase lies within runs, so that it shows how a quota is shared; what is lost between two runs,
some 10 seconds each, is in the last phase. Exit code 1 if a promise is broken; speeds and shares are judged only
if the machine was less than 60 % busy.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import md5
from pathlib import Path
from typing import Any

import psutil

from benchmarks.embedding_client import print_table
from songvec_assets.cache.model_cache import lock_name
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.locks import find_holders, lock_key
from songvec_assets.settings import Settings
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.fleet import Fleet, make_configuration
from songvec_assets_tests.provider import Provider, digest_of, running_provider, vector_of
from songvec_assets_tests.s3 import running_s3

N_SONGS, N_WORKERS, DIMENSIONS = 500_000, 3, 32
LATENCY_S, CONCURRENCY, REQUEST_TEXTS = 1.0, 8, 64
IN_FLIGHT = CONCURRENCY * REQUEST_TEXTS
# a run of three that share the quota takes about 100 s: longer than the wait for a window and the window
RANGE_SIZE, RANGES_PER_RUN = 5_000, 5
WINDOW_S, MIN_WINDOW_S = 60.0, 10.0
KILL_EVERY_S, DOWN_S, MAX_RUNTIME_S = (10.0, 30.0), (1.0, 5.0), 180
USD_PER_MILLION_TOKENS, USD = 10.0, 1e6 / 10.0
EXTRA_SHARE = 0.1
UNLIMITED = 2_000_000_000
MAX_BUSY = 0.60


@dataclass
class Phase:
    """What was billed in a window of time.

    Attributes:
        begin, end: seconds since the epoch.
        n_songs, n_tokens: billed.
        busy: share of all cores' time that anything used.
        by_worker: songs by the worker that held their range.
    """

    name: str
    begin: float
    end: float
    busy: float
    n_songs: int = 0
    n_tokens: int = 0
    by_worker: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Songs per second."""
        return self.n_songs / (self.end - self.begin)

    @property
    def tokens_per_minute(self) -> float:
        """Tokens per minute."""
        return self.n_tokens / (self.end - self.begin) * 60

    @property
    def fairness(self) -> float:
        """What the slowest worker got of an equal share."""
        return min(self.by_worker.values(), default=0) * len(self.by_worker) / max(1, sum(self.by_worker.values()))


@dataclass
class Campaign:
    """The catalogue, its fleet, and what is seen of both."""

    fleet: Fleet
    provider: Provider
    pipeline: Pipeline
    ledger: Path
    settings: dict[str, str]
    n_songs: int
    draw: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    held_by: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = {lock_key(lock_name(each)): ("filling", each.key) for each in self.pipeline.tiling}

    def expect(self, holds: bool, words: str) -> None:
        """Record a promise, kept or broken."""
        print(f"{'PASS' if holds else 'FAIL'}  {words}", flush=True)
        if not holds:
            self.failures.append(words)

    def start_workers(self, n_workers: int, **settings: object) -> None:
        """Let n workers run, with other settings than before."""
        self.settings |= {f"SONGVEC_{name.upper()}": str(value) for name, value in settings.items()}
        for name in [*self.fleet.workers] if settings else ():
            self.kill(name)
        for number in range(1, n_workers + 1):
            if f"worker-{number}" not in self.fleet.workers:
                self.fleet.start_worker(f"worker-{number}")

    def kill(self, name: str, everything: bool = True) -> None:
        """Kill a machine, or the process of its run."""
        if everything:
            self.kills["machines"] += 1
            self.fleet.kill_worker(name)
        else:
            self.kills["runs"] += self.fleet.workers[name].kill(everything=False)

    def watch(self, seconds: float) -> set[str]:
        """Write down who holds which range, every second; returns the workers that hold any at the end."""
        until, busy = time.monotonic() + seconds, set()
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            workers = {}
            for name, worker in self.fleet.workers.items():
                workers |= dict.fromkeys([child.pid for child in psutil.Process(worker.process.pid).children()], name)
            with self.pipeline.database.get_connection() as connection:
                holders = find_holders(connection, self.tasks)
            busy = {workers[each.process] for each in holders if each.process in workers}
            for holder in holders:
                if holder.process in workers:
                    self.held_by.setdefault(holder.key, []).append((time.time(), workers[holder.process]))
        return busy

    def measure(self, name: str, seconds: float) -> Phase:
        """Watch for a time."""
        began, before = time.time(), psutil.cpu_times()
        self.watch(seconds)
        return Phase(name, began, time.time(), _busy_share(before, psutil.cpu_times()))

    def kill_until_done(self, backfill: str, name: str) -> Phase:
        """Kill at random until no run of a backfill is left."""
        began, before, last = time.time(), psutil.cpu_times(), time.time()
        while self.fleet.status_of(backfill) == "REQUESTED":
            if not (busy := self.watch(self.draw.uniform(*KILL_EVERY_S))):
                continue
            last = time.time()
            victim, everything = self.draw.choice(sorted(busy)), self.draw.random() < 0.5
            self.kill(victim, everything)
            if everything:
                self.watch(self.draw.uniform(*DOWN_S))
                self.start_workers(N_WORKERS)
        return Phase(name, began, last, _busy_share(before, psutil.cpu_times()))

    def wait_for_answers(self, backfill: str) -> None:
        """Wait until the provider bills songs again, or nothing is left to fill."""
        n_billed = self.provider.ledger()["texts_billed"]
        while self.provider.ledger()["texts_billed"] < n_billed + IN_FLIGHT:
            if self.fleet.status_of(backfill) != "REQUESTED":
                raise RuntimeError("all songs were filled before the last phase: take more --songs")
            time.sleep(0.5)

    def read_ledger(self) -> Iterator[tuple[float, int, list[int]]]:
        """When how many tokens of which songs were billed."""
        song_ids = {digest_of(text_of(song_id)).hex(): song_id for song_id in range(self.n_songs)}
        for line in map(json.loads, self.ledger.read_text(encoding="utf-8").splitlines()):
            if found := [song_ids[each] for each in line["hashes"] if each in song_ids]:
                yield line["time"], line["tokens"], found

    def count(self, phases: list[Phase]) -> Counter[int]:
        """Fill in what each phase billed; returns how often each song was billed."""
        billed: Counter[int] = Counter()
        for at, n_tokens, song_ids in self.read_ledger():
            billed.update(song_ids)
            for phase in phases:
                if phase.begin <= at < phase.end:
                    phase.n_songs += len(song_ids)
                    phase.n_tokens += n_tokens
                    seen = self.held_by.get(self.pipeline.tiling.range_of(song_ids[0]).key, ())
                    nearest = min(seen, key=lambda each: abs(each[0] - at), default=(0.0, "unknown"))
                    phase.by_worker[nearest[1]] += len(song_ids)
        return billed

    def find_peak(self, begin: float, end: float) -> int:
        """The most tokens that were billed in any minute of this time."""
        lines, first, n_tokens, peak = list(self.read_ledger()), 0, 0, 0
        lines = [each for each in lines if begin <= each[0] < end]
        for at, n_new, _ in lines:
            n_tokens += n_new
            while lines[first][0] <= at - 60:
                n_tokens -= lines[first][1]
                first += 1
            peak = max(peak, n_tokens)
        return peak


def text_of(song_id: int) -> str:
    """The text of one of `insert_songs`: about 100 bytes."""
    digests = (md5(f"{prefix}{song_id}".encode()).hexdigest() for prefix in ("", "x"))
    return f"Song no. {song_id} by Artist {song_id % 5000}\nla {''.join(digests)}"


def insert_songs(url: str, song_ids: range) -> None:
    """Add songs to the table `songs`."""
    execute(
        url,
        "INSERT INTO songs SELECT n, 'Song no. ' || n, 'Artist ' || n % 5000, 'la ' || md5(n::text) || md5('x' || n) "
        f"FROM generate_series({song_ids.start}, {song_ids.stop - 1}) n",
    )


def _busy_share(before: Any, after: Any) -> float:
    spent = {name: getattr(after, name) - getattr(before, name) for name in before._fields}
    return 1 - (spent["idle"] + spent["iowait"]) / (sum(spent.values()) - spent["guest"] - spent["guest_nice"])


def run(campaign: Campaign, window_s: float, tokens_per_minute: int) -> list[Phase]:
    """All phases, and the promises."""
    fleet, pipeline, n_first = campaign.fleet, campaign.pipeline, round(campaign.n_songs / (1 + EXTRA_SHARE))
    tags = {"dagster/max_runtime_seconds": str(MAX_RUNTIME_S)}
    campaign.start_workers(1)
    backfill = fleet.submit([each.key for each in pipeline.held_ranges()], tags, max_usd=1e6)
    fleet.start_daemon()
    phases = []
    for name, n_workers, settings in (
        ("one worker", 1, {}),
        ("three workers", N_WORKERS, {}),
        ("three, limited by the quota", N_WORKERS, {"tokens_per_minute": tokens_per_minute}),
    ):
        if settings:
            quota = {"tokens_per_minute": round(1.01 * tokens_per_minute), "requests_per_minute": UNLIMITED}
            campaign.provider.control(latency_s=LATENCY_S, keep_texts=False, quota=quota)
        campaign.start_workers(n_workers, **settings)
        campaign.wait_for_answers(backfill)
        # until all have begun, and the first tokens of the quota, which may go at once, are spent
        campaign.watch(window_s / 3)
        phases.append(campaign.measure(name, window_s))
    phases.append(campaign.kill_until_done(backfill, "the same, killed at random"))
    billed, n_kills = campaign.count(phases), campaign.kills.total()
    one, three, limited, killed = phases
    status = pipeline.status(0).total
    campaign.expect(
        fleet.status_of(backfill) == "COMPLETED_SUCCESS", f"the backfill ended: {fleet.count_runs(backfill)}"
    )
    campaign.expect(
        status["n_cached"] == n_first == len(billed), f"each of {n_first:,} songs has a vector, and was billed"
    )
    n_again = billed.total() - len(billed)
    campaign.expect(
        n_again <= n_kills * IN_FLIGHT,
        f"{n_kills} kills ({dict(campaign.kills)}) cost {n_again:,} songs again, <= in flight",
    )
    peak = campaign.find_peak(limited.begin, killed.end) / tokens_per_minute
    used = limited.tokens_per_minute / tokens_per_minute
    # a window of a short form may fall between two runs
    speedup = three.rate / max(1.0, one.rate) / N_WORKERS
    n_limited = campaign.provider.ledger()["requests_by_status"].get("429", 0)
    campaign.expect(
        peak <= 1.01 and n_limited == 0, f"the fullest minute has {peak:.1%} of the quota, {n_limited} times 429"
    )
    for phase, holds, words in (
        (limited, used >= 0.97, f"three workers use {used:.1%} of the quota"),
        (limited, limited.fairness >= 0.8, f"the slowest gets {limited.fairness:.1%} of an equal share of the quota"),
        (three, speedup >= 0.9, f"three workers have {speedup:.2f} of three times the rate of one"),
    ):
        if phase.busy < MAX_BUSY:
            campaign.expect(holds, words)
        else:
            print(f"----  {words}: not judged, the machine was {phase.busy:.0%} busy", flush=True)
    check_vectors(campaign, n_first)
    check_budget(campaign, n_first, tags)
    return phases


def check_vectors(campaign: Campaign, n_songs: int) -> None:
    """Load on another machine, and compare a sample."""
    loaded = campaign.fleet.run_command("load")
    if loaded.returncode:
        print(loaded.stderr[-2000:])
    sample = sorted(campaign.draw.sample(range(n_songs), min(n_songs, 500)))
    found = campaign.pipeline.embeddings(sample)
    wrong = [
        song_id
        for song_id, vector in found.iter_rows()
        if abs(vector_of(text_of(song_id), DIMENSIONS) - vector).max() > 1e-6
    ]
    holds = loaded.returncode == 0 and found.height == len(sample) and not wrong
    campaign.expect(holds, f"{len(sample)} loaded songs have their text's vector")


def check_budget(campaign: Campaign, n_first: int, tags: dict[str, str]) -> None:
    """More songs, and a budget for half of them."""
    insert_songs(campaign.pipeline.database.url, range(n_first, campaign.n_songs))
    campaign.pipeline.export()
    before = campaign.provider.ledger()["tokens_billed"]
    max_usd = (campaign.n_songs - n_first) / 2 * 30 / USD
    new = [each.key for each in campaign.pipeline.held_ranges() if each.stop > n_first]
    backfill = campaign.fleet.submit(new, tags, max_usd=max_usd)
    n_kills = campaign.kills.total()
    campaign.kill_until_done(backfill, "budget")
    n_kills = campaign.kills.total() - n_kills
    usd = (campaign.provider.ledger()["tokens_billed"] - before) / USD
    sql = "SELECT usd, reserved_usd FROM songvec.budgets WHERE name = %s"
    [(billed, reserved)] = execute(campaign.pipeline.database.url, sql, (backfill,))
    campaign.expect(
        usd <= max_usd and 0.5 * max_usd < usd <= float(billed + reserved) + 1e-6,
        f"a budget of ${max_usd:.4f}: ${usd:.4f} on the provider's bill, ${billed:.4f} and ${reserved:.4f} reserved in "
        f"ours, after {n_kills} kills; {campaign.fleet.count_runs(backfill)}",
    )


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--songs", type=int, default=N_SONGS)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    n_songs = round(asked.songs * (1 + EXTRA_SHARE))
    range_size = max(1_000, RANGE_SIZE * asked.songs // N_SONGS)
    with (
        tempfile.TemporaryDirectory(prefix="songvec-workers-", ignore_cleanup_errors=True) as name,
        running_s3("weed") as s3,
        running_provider(ledger_file=Path(name) / "ledger", latency_s=LATENCY_S, keep_texts=False) as provider,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        server_url = start_embedded_server(folder / "pg").url
        for database in ("music", "dagster"):
            execute(server_url, f"CREATE DATABASE {database}")
        url = with_parts(server_url, database="music")
        execute(url, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
        insert_songs(url, range(asked.songs))
        store = {name: value for name, value in s3.environment.items() if name != "AWS_ENDPOINT_URL"}
        os.environ |= store | {"AWS_ENDPOINT_URL": s3.direct_url}
        settings = {
            "POSTGRES_URL": url,
            "FIREWORKS_API_KEY": provider.api_key,
            "FIREWORKS_BASE_URL": provider.base_url,
            "SONGVEC_STORAGE": s3.new_url(),
            "SONGVEC_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
            "SONGVEC_RANGE_SIZE": str(range_size),
            "SONGVEC_SONG_ID_STOP": str(-(-n_songs // range_size) * range_size),
            "SONGVEC_RANGES_PER_RUN": str(RANGES_PER_RUN),
            "SONGVEC_CONCURRENCY": str(CONCURRENCY),
            "SONGVEC_MAX_REQUEST_TEXTS": str(REQUEST_TEXTS),
            "SONGVEC_USD_PER_MILLION_TOKENS": str(USD_PER_MILLION_TOKENS),
            "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
            "SONGVEC_TOKENS_PER_MINUTE": str(UNLIMITED),
        }
        pipeline = Pipeline(Settings(**settings))
        pipeline.export()
        configuration = make_configuration(
            run_coordinator={"config": {"dequeue_interval_seconds": 2}},
            # one worker lets five runs wait in Redis
            run_monitoring={"start_timeout_seconds": 2 * MAX_RUNTIME_S},
            # more kills a run than a year of a deployment has
            run_retries={"max_retries": 100},
        )
        # half of what three workers would send
        tokens_per_minute = N_WORKERS * IN_FLIGHT * 25 * 60 // 2
        with Fleet(folder, with_parts(server_url, database="dagster"), settings, configuration) as fleet:
            ledger, draw = folder / "ledger", random.Random(asked.seed)
            campaign = Campaign(fleet, provider, pipeline, ledger, settings, n_songs, draw)
            phases = run(campaign, max(MIN_WINDOW_S, WINDOW_S * asked.songs / N_SONGS), tokens_per_minute)
        pipeline.close()
    rows = [
        [
            each.name,
            f"{each.rate:,.0f}",
            f"{each.tokens_per_minute / tokens_per_minute:.0%}",
            f"{each.end - each.begin:.0f}",
            f"{each.busy:.0%}",
            f"{each.fairness:.0%}",
        ]
        for each in phases
    ]
    heads = "phase | songs/s | of the later quota | seconds | busy | slowest of an equal share"
    print_table(heads, rows, markdown=True)
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
