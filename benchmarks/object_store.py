"""A bucket compared with a folder: a fill and a load of one range, in turns; and what they ask of the bucket.

    python -m benchmarks.object_store [--rounds 5 3 3] [--songs 20000]

The real fill and load, each in a fresh process, over SeaweedFS's server on this machine, which shares its cores, and
over a folder of the same disk; the provider has no latency, and quotas are too high to matter. To reach: a bucket has
0.8 of the folder's rates. Memory is RssAnon, which no file shares. In later rounds the range's parts are one base, of
which a load may read a slice at a time only; and the provider answers after a second, as real ones do, so that the
cores are idle most of the time, and the server's share of them, which a real bucket does not take, costs nothing.
Requests are counted by a proxy, in a round that is not timed.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil

from benchmarks.cache_fill import create_catalogue
from songvec_assets.cache import completion
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import Settings
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import Provider, running_provider
from songvec_assets_tests.s3 import S3, running_s3

STEPS = ("fill", "load", "nothing to do")
MERGED = ("fill into one base", "load of one base")
LATE = ("fill, an answer takes 1 s",)
_SAMPLE_S = 0.01


class Measure(NamedTuple):
    """A step: seconds, CPU seconds of its process and of the object store, and the peak of RssAnon, in MB."""

    seconds: float
    cpu_s: float
    peak_mb: float
    server_cpu_s: float = 0.0


def take_step(step: str, settings: dict[str, Any], environment: dict[str, str]) -> Measure:
    """Take a step, in its own process."""
    os.environ |= environment
    pipeline = Pipeline(Settings(**settings))
    ended, peaks = threading.Event(), [0.0]

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peaks[0] = max(peaks[0], int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6)

    sampler = threading.Thread(target=sample)
    sampler.start()
    cpu_s, started = time.process_time(), time.perf_counter()
    with patch.object(completion, "_MOST_FILES", 0 if step in MERGED else completion._MOST_FILES):
        if not step.startswith("load"):
            pipeline.embed()
        if not step.startswith("fill"):
            pipeline.load()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    ended.set()
    sampler.join()
    return Measure(seconds, cpu_s, peaks[0])


def settings_of(server_url: str, provider: Provider, n_songs: int, storage: str) -> dict[str, Any]:
    """Settings over a new database with the songs."""
    name = f"round_{time.monotonic_ns()}"
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE catalogue")
    return {
        "postgres_url": with_parts(server_url, database=name),
        "fireworks_api_key": provider.api_key,
        "fireworks_base_url": provider.base_url,
        "storage": storage,
        "tokens_per_minute": 2_000_000_000,
        "requests_per_minute": 1_000_000,
        "max_request_texts": 256,
        "range_size": n_songs,
        "song_id_stop": n_songs,
    }


def run_round(settings: dict[str, Any], environment: dict[str, str], steps: Sequence[str]) -> list[Measure]:
    """Export into a new store, then take the steps."""
    os.environ |= environment
    with Pipeline(Settings(**settings)) as pipeline:
        pipeline.export()
    measures = []
    for step in steps:
        before = server_cpu_s()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
            measure = processes.submit(take_step, step, settings, environment).result()
        measures.append(measure._replace(server_cpu_s=server_cpu_s() - before))
    return measures


def server_cpu_s() -> float:
    """CPU seconds that SeaweedFS has taken."""
    [server] = [each for each in psutil.Process().children() if each.name() == "weed"]
    times = server.cpu_times()
    return float(times.user + times.system)


def print_rows(steps: Sequence[str], found: dict[str, list[list[Measure]]]) -> None:
    """Print a row per step: medians, and the ratio of the rates of each round."""
    for place, step in enumerate(steps):
        folders, buckets = ([each[place] for each in found[kind]] for kind in ("folder", "bucket"))
        ratios = [mine.seconds / its.seconds for mine, its in zip(folders, buckets, strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        mine, its = (Measure(*map(median, zip(*each, strict=True))) for each in (folders, buckets))
        print(
            f"| {step} | {mine.seconds:.2f} | {its.seconds:.2f} | {ratio} | {mine.cpu_s:.2f} | {its.cpu_s:.2f} "
            f"| {its.server_cpu_s:.2f} | {mine.peak_mb:.0f} | {its.peak_mb:.0f} |",
            flush=True,
        )


def count_requests(settings: dict[str, Any], s3: S3) -> None:
    """Print the requests of each step, over a new store."""
    os.environ |= s3.environment
    s3.requests()
    print("\n| step | PUT | GET, HEAD | LIST | DELETE |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for note in ("", ", nothing to do"):
        with Pipeline(Settings(**settings)) as pipeline:
            for step in (pipeline.export, pipeline.embed, pipeline.load):
                step()
                found = s3.count()
                n_read, n_deleted = found["GET"] + found["HEAD"], found["POST"] + found["DELETE"]
                print(f"| {step.__name__}{note} | {found['PUT']} | {n_read} | {found['LIST']} | {n_deleted} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.object_store")
    parser.add_argument("--rounds", type=int, nargs=3, default=(5, 3, 3), help="of parts, one base, late answers")
    parser.add_argument("--songs", type=int, default=20_000)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="store-", ignore_cleanup_errors=True) as name,
        running_s3("weed") as s3,
        running_provider(keep_texts=False) as provider,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        url = start_embedded_server(folder / "pg").url
        create_catalogue(url, asked.songs)
        direct = s3.environment | {"AWS_ENDPOINT_URL": s3.direct_url}
        print(
            "| step | folder s | bucket s | rate of both (to reach: >= 0.8) | CPU s | CPU s | of the server | MB | MB |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for steps, latency_s, n_rounds in zip((STEPS, MERGED, LATE), (0.0, 0.0, 1.0), asked.rounds, strict=True):
            provider.control(latency_s=latency_s, keep_texts=False)
            found: dict[str, list[list[Measure]]] = {"folder": [], "bucket": []}
            for number in range(n_rounds):
                places = {"folder": (str(folder / f"{steps[0]} {number}"), {}), "bucket": (s3.new_url(), direct)}
                for kind, (storage, environment) in places.items():
                    settings = settings_of(url, provider, asked.songs, storage)
                    found[kind].append(run_round(settings, environment, steps))
            if n_rounds:
                print_rows(steps, found)
        provider.control(keep_texts=False)
        count_requests(settings_of(url, provider, asked.songs, s3.new_url()), s3)


if __name__ == "__main__":
    main()
