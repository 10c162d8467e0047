"""Short forms of `make bench-client`, `make bench-quota` and `make chaos`: no figures, only what must hold."""

from pathlib import Path

import pytest

from benchmarks import chaos, embedding_client, quota
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.provider import Provider


def test_runs_that_are_killed_and_shards_that_are_damaged_cost_no_more_than_promised() -> None:
    campaign = chaos.run_campaign(4, seed=1, n_songs=880)
    assert campaign.passed, campaign.render()
    assert len(campaign.kills) == 4
    assert campaign.damages


@pytest.mark.parametrize("scenario", [quota.SCENARIOS[0], quota.SCENARIOS[2]], ids=lambda scenario: scenario.name)
def test_a_provider_that_counts_over_every_sliding_minute_refuses_nothing(
    server_url: str, tmp_path: Path, scenario: quota.Scenario
) -> None:
    result = quota.run_scenario(scenario, server_url, tmp_path / "scenario", seconds=8, n_songs=2_000)
    assert result.n_limited == 0
    assert 0 < result.used < 1.3, "a bucketful at the start, then the quota"


@pytest.mark.parametrize("client", ["this", "this, floats"])
def test_the_client_that_is_benchmarked_gives_the_right_vectors(
    database: Database, provider: Provider, client: str
) -> None:
    # it compares vectors of each request with the provider's, and raises
    embedding_client.measure(embedding_client.Load(client, 128, 32, 2, provider, database.url))
    assert provider.ledger()["texts_billed"] == 128
