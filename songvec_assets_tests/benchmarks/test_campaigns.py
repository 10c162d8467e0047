"""Short forms of `make bench-client`, `make bench-quota` and `make chaos`: no figures, only what must hold."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import chaos, embedding_client, quota
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
@pytest.mark.parametrize("store", ["folder", "moto"])
def test_runs_that_are_killed_and_files_that_are_damaged_cost_no_more_than_promised(store) -> None:
    campaign = chaos.run_campaign(4, seed=1, n_songs=880, warm=True, store=store)
    assert campaign.passed, campaign.render()
    assert len(campaign.kills) == 4
    assert campaign.damages


def test_a_provider_that_counts_over_every_sliding_minute_refuses_nothing(server_url: str, tmp_path: Path) -> None:
    scenarios = quota.SCENARIOS[0], quota.SCENARIOS[2]
    with ThreadPoolExecutor(len(scenarios)) as pool:  # side by side, as the benchmark runs them: they wait, mostly
        runs = [
            pool.submit(quota.run_scenario, each, server_url, tmp_path / str(place), seconds=8, n_songs=2_000)
            for place, each in enumerate(scenarios)
        ]
    for run in runs:
        result = run.result()
        assert result.n_limited == 0, result
        assert 0 < result.used < 1.3, f"a bucketful at the start, then the quota: {result}"


@pytest.mark.parametrize("client", ["this", "this, floats"])
def test_the_client_that_is_benchmarked_gives_the_right_vectors(
    database: Database, provider: Provider, client: str
) -> None:
    # it compares vectors of each request with the provider's, and raises
    embedding_client.measure(embedding_client.Load(client, 128, 32, 2, provider, database.url))
    assert provider.ledger()["texts_billed"] == 128
