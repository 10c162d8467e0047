"""A provider that changes the model under its name: found by the probe, before a song is paid for.

Another server, or another name, is in `scenarios/test_moves`.

A scenario across embedding, cache and database: what a run is to stop is the run.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets.errors import ModelChangedError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute
from songvec_assets_tests.cache.filling import export, plain_songs
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

Songs = Callable[..., None]
Embed = Callable[..., int]


@pytest.fixture
def embed(database: Database, songs: Songs, provider: Provider, tmp_path: Path) -> Embed:
    """Runs an export and a fill after ten more songs came; how many texts were sent, the probe left out."""
    n_songs = 0

    def run(n_more: int = 10, confirm: bool = False, **settings: object) -> int:
        nonlocal n_songs
        songs(*plain_songs(range(n_songs + 1, n_songs + n_more + 1)))
        n_songs += n_more
        provider.reset_ledger()
        pipeline: Pipeline = make_pipeline(database, provider, tmp_path / "store", **settings)
        export(pipeline)
        pipeline.filler(confirm_model_change=confirm).fill_ranges(list(pipeline.tiling), lambda _: None)
        return sum(n for text, n in provider.texts().items() if text != "probe")

    return run


def test_another_model_under_the_same_name_ends_the_run_before_a_song_is_paid_for(
    embed: Embed, provider: Provider
) -> None:
    assert embed() == 10
    provider.control(turn=1.0)
    with pytest.raises(ModelChangedError, match=r"is -?0\.\d{4}, expected 0\.999.*--confirm-model-change") as raised:
        embed()
    assert raised.value.code == "provider.model-changed"
    assert set(provider.texts()) == {"probe"}
    provider.control()
    assert embed(0) == 10, "the former model goes on"


def test_a_change_that_is_confirmed_is_what_later_runs_compare_with(embed: Embed, provider: Provider) -> None:
    assert embed() == 10
    provider.control(turn=1.0)
    assert embed(confirm=True) == 10
    assert embed() == 10
    provider.control()
    with pytest.raises(ModelChangedError):
        embed()


@pytest.mark.parametrize("recorded", ["7", '"AAAA"', '"?"', '{"a": 1}'])
def test_a_recorded_probe_that_cannot_be_read_is_replaced_once_cached_songs_were_compared(
    embed: Embed, database: Database, provider: Provider, recorded: str
) -> None:
    embed()
    execute(database.adbc_uri, f"UPDATE songvec.settings SET value = '{recorded}' WHERE key LIKE 'probe of %'")
    provider.control(turn=1.0)
    with pytest.raises(ModelChangedError, match="10 cached songs"):
        embed()
    provider.control()
    assert embed() == 30, "10 are compared, 20 are new"
    assert embed() == 10


@pytest.mark.parametrize(("turn", "ends"), [(0.02, False), (0.1, True)])
def test_what_other_hardware_changes_is_no_other_model(
    embed: Embed, provider: Provider, turn: float, ends: bool
) -> None:
    embed()
    provider.control(turn=turn)
    if ends:
        with pytest.raises(ModelChangedError, match=r"is 0\.99[0-8]"):
            embed()
    else:
        assert embed() == 10


def test_a_run_with_nothing_to_send_does_not_ask(embed: Embed, provider: Provider) -> None:
    embed()
    provider.control(turn=1.0)
    assert embed(0) == 0
    assert provider.ledger()["requests"] == 0


@pytest.mark.parametrize("faults", [{"refuse_base64": True}, {"ignore_dimensions": True}, {"refuse_dimensions": True}])
def test_the_same_model_in_another_dialect_is_the_same(
    embed: Embed, provider: Provider, faults: dict[str, object]
) -> None:
    embed()
    provider.control(**faults)
    assert embed() == 10


def test_each_model_and_size_is_compared_with_itself(embed: Embed, provider: Provider) -> None:
    embed()
    provider.control(turn=1.0, model="other")
    assert embed(embedding_model="other") == 20
    assert embed(embedding_model="other", embedding_dimensions=128, truncate=True) == 30
    with pytest.raises(ModelChangedError):
        provider.control()
        embed(embedding_dimensions=64)
        provider.control(turn=1.0)
        embed(embedding_dimensions=64)


def test_the_offline_embedder_asks_nobody(embed: Embed, provider: Provider) -> None:
    settings = {"embedding_model": "offline-v1", "fireworks_api_key": None}
    for _ in range(2):
        assert embed(**settings) == 0
