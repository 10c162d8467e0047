"""Songs a second from request to durable cache file: one range of 50,000 songs, a provider without latency.

    python -m benchmarks.cache_fill

The real fill, in a process of its own a round, fsync included; quotas are set out of the way. The songs are exported
before. `sending` counts from the first request to the end; `step` the whole call, with reading and comparing.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from songvec_assets.deployment import Deployment
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import Settings
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import Tiling
from songvec_assets_tests.provider import running_provider

TILING = Tiling(width=50_000, stop=50_000)
TO_REACH = 6_000


def fill(settings: dict[str, Any]) -> tuple[float, float, float]:
    """Fill the range; seconds of the step, seconds of sending, peak RSS in MB."""
    deployment = Deployment(Settings.from_environment({}, **settings), TILING)
    began: list[float] = []
    filler = deployment.filler(progress=lambda told: began.append(time.monotonic()))
    started = time.monotonic()
    filler.fill_ranges(list(TILING), lambda _: None)
    ended = time.monotonic()
    return ended - started, ended - began[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Rounds over fresh stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chars", type=int, default=1_600, help="characters of a song's lyrics")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fill-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        database = start_embedded_server(Path(folder) / "pg")
        with database.get_connection() as connection:
            connection.execute(
                sa.text("CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
            )
            connection.execute(
                sa.text(
                    "INSERT INTO songs SELECT id, 'Song ' || id, 'Ann', left(repeat(md5(id::text) || ' ', :n), :chars) "
                    "FROM generate_series(0, 49999) AS id"
                ),
                {"n": asked.chars // 33 + 1, "chars": asked.chars},
            )
        with running_provider(keep_texts=False) as provider:
            steps, sendings, peaks = [], [], []
            for place in range(asked.rounds):
                settings = {
                    "postgres_url": database.url,
                    "fireworks_api_key": provider.api_key,
                    "fireworks_base_url": provider.base_url,
                    "storage": str(Path(folder) / f"store-{place}"),
                    "tokens_per_minute": 2_000_000_000,
                    "requests_per_minute": 1_000_000,
                }
                deployment = Deployment(Settings.from_environment({}, **settings), TILING)
                database_facts = sa.text("DELETE FROM songvec.settings")
                if place:
                    with database.get_connection() as connection:
                        connection.execute(database_facts)
                cache_songs_to_parquet(deployment.database, deployment.source, deployment.store.songs, TILING)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    step, sending, peak = pool.apply(fill, (settings,))
                steps.append(step)
                sendings.append(sending)
                peaks.append(peak)
                print(
                    place,
                    round(50_000 / step),
                    round(50_000 / sending),
                    round(peak),
                    provider.ledger()["max_in_flight"],
                    flush=True,
                )


if __name__ == "__main__":
    main()
