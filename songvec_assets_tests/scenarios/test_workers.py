"""A backfill that several machines fill, through Dagster's own Celery launcher; a run is killed in the middle of it.

Machines that die, and many kills in a row, are in `benchmarks/workers.py`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.cache.filling import assert_stored, billed, plain_songs, plain_texts
from songvec_assets_tests.conftest import TILING, environment_of, make_pipeline
from songvec_assets_tests.fleet import Fleet, make_configuration
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.s3 import S3, Kind

pytestmark = pytest.mark.slow

N_SONGS, RANGES_PER_RUN, REQUEST_TEXTS, CONCURRENCY = 600, 3, 16, 2
IN_FLIGHT = REQUEST_TEXTS * CONCURRENCY
USD_PER_MILLION_TOKENS = 1_000.0
SHORT = {
    "run_coordinator": {"config": {"dequeue_interval_seconds": 1}},
    "run_monitoring": {"poll_interval_seconds": 1},
}


@pytest.mark.timeout(300)
def test_of_a_run_that_is_killed_only_what_was_in_flight_is_paid_for_again(
    songs: Callable[..., None],
    database: Database,
    provider: Provider,
    bare_url: str,
    use_s3: Callable[[Kind], S3],
    tmp_path: Path,
) -> None:
    s3 = use_s3("weed")
    songs(*plain_songs(range(N_SONGS)))
    pipeline = make_pipeline(database, provider, s3.new_url())
    pipeline.export()
    max_usd = (N_SONGS + 4 * IN_FLIGHT) * 8 / 1e6 * USD_PER_MILLION_TOKENS
    environment = environment_of(database, provider, tmp_path) | s3.environment
    environment |= {
        "SONGVEC_STORAGE": str(pipeline.settings.storage_location),
        "SONGVEC_RANGE_SIZE": str(TILING.width),
        "SONGVEC_SONG_ID_STOP": str(TILING.stop),
        "SONGVEC_RANGES_PER_RUN": str(RANGES_PER_RUN),
        "SONGVEC_CONCURRENCY": str(CONCURRENCY),
        "SONGVEC_MAX_REQUEST_TEXTS": str(REQUEST_TEXTS),
        "SONGVEC_USD_PER_MILLION_TOKENS": str(USD_PER_MILLION_TOKENS),
    }
    # of one run at least a few requests are answered, and others in flight
    provider.control(latency_s=0.1, hold_after=12)
    with Fleet(tmp_path, bare_url, environment, make_configuration(**SHORT)) as fleet:
        for name in ("worker-1", "worker-2"):
            fleet.start_worker(name)
        held = pipeline.held_ranges()
        backfill = fleet.submit([each.key for each in held], {}, max_usd=max_usd)
        fleet.start_daemon()
        wait_until(lambda: provider.count_in_flight() > CONCURRENCY, seconds=120)
        holders = pipeline.status(0).holders
        assert len({(each.process, each.run_id) for each in holders}) == 2, "two runs, each in its process"
        assert len({each.key for each in holders}) == len(holders), "no range is filled twice at once"
        assert fleet.workers["worker-1"].kill(everything=False)
        provider.control(latency_s=0.1)
        wait_until(lambda: pipeline.status(0).total["n_cached"] == N_SONGS, seconds=120)
        assert fleet.count_runs(backfill)["FAILURE"] == 1, "the run that was killed, and retried"
    assert_stored(pipeline, plain_texts(range(N_SONGS)))
    texts = billed(provider)
    assert texts.keys() == {*plain_texts(range(N_SONGS)).values()}
    assert sum(texts.values()) - N_SONGS <= IN_FLIGHT
    [(usd, reserved)] = execute(
        database.url, "SELECT usd, reserved_usd FROM songvec.budgets WHERE name = %s", (backfill,)
    )
    paid = provider.ledger()["tokens_billed"] / 1e6 * USD_PER_MILLION_TOKENS
    assert float(usd) <= paid <= float(usd + reserved) <= max_usd, "all runs share one budget"
