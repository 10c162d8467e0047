"""Songs per second from request to durable cache file: one range of 50,000 songs, a provider without latency.

    python -m benchmarks.cache_fill [--texts 2048] [--fsync-ms 10]
    python -m benchmarks.cache_fill --rounds 1 --songs 1000    a short form

The real fill with its locks, limiter and fsyncs, in a fresh process, database and storage per round; quotas are too
high to matter. The songs (1,600 characters, about 400 tokens) are exported beforehand. A step is the whole call:
reading and comparing the songs, sending, storing.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa

from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import Settings
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets_tests.administration import execute, with_parts
from songvec_assets_tests.provider import Provider, running_provider

N_SONGS = 50_000


def fill(settings: dict[str, Any], fsync_ms: float) -> tuple[float, float, int]:
    """Fill the range, in its own process; seconds of the step, peak memory in MB, bytes of its files."""
    fsync = os.fsync

    def fsync_slowly(descriptor: int) -> None:
        time.sleep(fsync_ms / 1000)
        fsync(descriptor)

    if fsync_ms:
        os.fsync = fsync_slowly
    pipeline = Pipeline(Settings(**settings))
    song_range = pipeline.tiling.range_of(0)
    started = time.perf_counter()
    pipeline.filler().fill_ranges([song_range], lambda report: None)
    seconds = time.perf_counter() - started
    # getrusage's peak would include what the parent held before exec
    peak_kib = int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return seconds, peak_kib * 1024 / 1e6, sum(pipeline.cache.look(song_range).sizes.values())


def run_round(
    server_url: str, provider: Provider, folder: Path, number: int, asked: argparse.Namespace
) -> tuple[float, float, int]:
    """Export into a new store, then fill it."""
    execute(server_url, f"CREATE DATABASE round_{number} TEMPLATE catalogue")
    settings = {
        "postgres_url": with_parts(server_url, database=f"round_{number}"),
        "fireworks_api_key": provider.api_key,
        "fireworks_base_url": provider.base_url,
        "storage": str(folder / f"store-{number}"),
        "tokens_per_minute": 2_000_000_000,
        "requests_per_minute": 1_000_000,
        "max_request_texts": asked.texts,
        "range_size": asked.songs,
        "song_id_stop": asked.songs,
    }
    pipeline = Pipeline(Settings(**settings))
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, pipeline.tiling)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(fill, settings, asked.fsync_ms).result()


def create_catalogue(server_url: str, n_songs: int = N_SONGS) -> None:
    """The database that each round copies."""
    execute(server_url, "CREATE DATABASE catalogue")
    with Database(with_parts(server_url, database="catalogue")) as database, database.get_connection() as connection:
        connection.execute(sa.text("CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)"))
        connection.execute(
            sa.text("""
                INSERT INTO songs
                SELECT id, 'Song ' || id, 'Ann', left(repeat(md5(id::text) || ' ', 49), 1580)
                FROM generate_series(0, :n_songs - 1) AS id
            """),
            {"n_songs": n_songs},
        )


def main() -> None:
    """Print a table with a row per round, and the median."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_fill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--songs", type=int, default=N_SONGS, help="of the range")
    parser.add_argument("--texts", type=int, default=256, help="per request, at most")
    parser.add_argument("--fsync-ms", type=float, default=0.0, help="by which each fsync is slower than the disk's")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fill-", ignore_cleanup_errors=True) as folder:
        # the embedded server may run as another user
        Path(folder).chmod(0o755)
        url = start_embedded_server(Path(folder) / "pg").url
        create_catalogue(url, asked.songs)
        rates = []
        print("| round | songs/s (to reach: >= 6,000) | seconds | peak MB | files MB |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        with running_provider(keep_texts=False) as provider:
            for number in range(1, asked.rounds + 1):
                seconds, peak_mb, n_bytes = run_round(url, provider, Path(folder), number, asked)
                rates.append(asked.songs / seconds)
                print(f"| {number} | {rates[-1]:,.0f} | {seconds:.1f} | {peak_mb:,.0f} | {n_bytes / 1e6:,.0f} |")
        print(f"| median | {median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) | | | |")


if __name__ == "__main__":
    main()
