"""The same model from another server, or under another name: compared with the cache once, and not paid for again.

A scenario across settings, cache, embedding, table and search.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from songvec_assets.cache.comparison import N_SONGS
from songvec_assets.errors import BudgetExceededError, ModelChangedError, TableMismatchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import FIREWORKS_MODEL
from songvec_assets_tests.cache.filling import billed, plain_songs, plain_texts
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider, vector_of

NAME = "Qwen/Qwen3-Embedding-8B"
OLD, NEW = [*range(1, 31), *range(101, 131)], range(201, 211)
OLD_TEXTS, NEW_TEXTS = plain_texts(OLD), plain_texts(NEW)

Begin = Callable[..., Pipeline]


@pytest.fixture
def begin(database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path) -> Begin:
    """60 songs are embedded and loaded, and ten more came; the provider now serves the model as NAME. Begins a run."""

    def make(**settings: object) -> Pipeline:
        given = {"embedding_model": NAME, "model_id": FIREWORKS_MODEL, "query_prompt": "{query}"} | settings
        return make_pipeline(database, provider, tmp_path / "store", **given)

    songs(*plain_songs(OLD))
    make(embedding_model=FIREWORKS_MODEL, model_id=None).run()
    songs(*plain_songs(NEW))
    provider.control(model=NAME)
    provider.reset_ledger()
    return make


def compared(provider: Provider) -> dict[str, int]:
    """How often each text of a cached song was billed."""
    paid = billed(provider)
    assert paid.keys() <= {*OLD_TEXTS.values(), *NEW_TEXTS.values()}
    return {text: n for text, n in paid.items() if text in OLD_TEXTS.values()}


def paid_new(provider: Provider) -> int:
    return sum(n for text, n in billed(provider).items() if text in NEW_TEXTS.values())


def test_the_same_vectors_under_another_name_are_compared_once_and_not_paid_for_again(
    begin: Begin, provider: Provider, songs: Callable[..., None]
) -> None:
    moved = begin()
    moved.run()
    assert len(compared(provider)) == N_SONGS
    assert {*billed(provider).values()} == {1}
    assert paid_new(provider) == len(NEW)
    assert moved.status().tables == {"song_embeddings": f"vector(64) by {FIREWORKS_MODEL}"}
    assert moved.status().total["n_loaded"] == len(OLD) + len(NEW)
    assert all(finding.passed for finding in moved.verify().values())
    for more, settings in ((211, {}), (212, {"embedding_model": FIREWORKS_MODEL, "model_id": None})):
        provider.control(model=settings.get("embedding_model", NAME))
        provider.reset_ledger()
        songs(*plain_songs([more]))
        begin(**settings).run()
        assert [*billed(provider)] == [*plain_texts([more]).values()], "both servers are known"


def test_another_address_is_another_server(begin: Begin, provider: Provider) -> None:
    provider.control()
    url = provider.base_url.replace("127.0.0.1", "localhost")
    begin(embedding_model=FIREWORKS_MODEL, model_id=None, fireworks_base_url=url).run()
    assert len(compared(provider)) == N_SONGS


def test_other_vectors_stop_the_run_before_a_song_is_paid_for_and_the_worst_is_named(
    begin: Begin, provider: Provider
) -> None:
    provider.control(model=NAME, turn=1.0)
    for n_times in (1, 2):
        with pytest.raises(ModelChangedError) as raised:
            begin().run()
        assert paid_new(provider) == 0
        assert {*compared(provider).values()} == {n_times}, "it is asked again until the answer is right"
    cosines = {}
    for song_id, text in OLD_TEXTS.items():
        if text in compared(provider):
            vector = vector_of(text, 64)
            cosines[song_id] = float(vector @ np.roll(vector, 1))
    worst = min(cosines, key=lambda song_id: cosines[song_id])
    for words in (
        f"the worst is song {worst} with {cosines[worst]:.4f}",
        provider.base_url,
        f"{NAME!r}",
        f"cached as {FIREWORKS_MODEL!r}",
        "SONGVEC_MODEL_ID",
        "--confirm-model-change",
    ):
        assert words in str(raised.value)
    assert raised.value.code == "provider.model-changed"
    assert begin().status().total["n_loaded"] == len(OLD)


@pytest.mark.parametrize("turn", [0.02, 0.1])
def test_rounding_passes_and_a_little_more_does_not(begin: Begin, provider: Provider, turn: float) -> None:
    provider.control(model=NAME, turn=turn)
    if turn == 0.02:
        assert begin().run().embed[-1].n_embedded == len(NEW)
    else:
        with pytest.raises(ModelChangedError, match=r"with 0\.99[0-8]"):
            begin().run()


def test_a_confirmed_server_is_not_compared_and_recorded(begin: Begin, provider: Provider) -> None:
    provider.control(model=NAME, turn=1.0)
    begin().run(confirm_model_change=True)
    assert (compared(provider), paid_new(provider)) == ({}, len(NEW))
    provider.control(model=NAME)
    with pytest.raises(ModelChangedError, match="the probe's vector"):
        begin().embed(reembed=True)


def test_a_text_that_the_server_refuses_counts_as_another_vector(begin: Begin, provider: Provider) -> None:
    provider.control(model=NAME, poison=["Song 000001"])
    with pytest.raises(ModelChangedError, match=r"1 have a cosine under 0.999, the worst is song 1 with 0\.0000"):
        begin().run()
    assert paid_new(provider) == 0


def test_a_budget_holds_for_what_is_compared(begin: Begin, provider: Provider) -> None:
    # of about seven tokens each
    with pytest.raises(BudgetExceededError):
        begin(max_usd=50 * 0.1 / 1e6).run()
    assert 0 < len(compared(provider)) < N_SONGS
    assert provider.ledger()["tokens_billed"] <= 50
    assert paid_new(provider) == 0
    provider.reset_ledger()
    with pytest.raises(BudgetExceededError):
        begin(max_usd=0.0).run()
    assert provider.ledger()["requests"] == 0


def test_what_is_compared_counts_in_the_bill_and_in_what_was_expected(begin: Begin, provider: Provider) -> None:
    moved = begin()
    report = moved.run().embed[-1]
    assert report.n_tokens == provider.ledger()["tokens_billed"]
    assert report.n_tokens - report.n_tokens_expected == 2, "the probe"
    assert moved.month_spending().reserved == 0


@pytest.mark.parametrize("n_cached", [0, 3])
def test_a_store_of_fewer_songs_is_compared_as_a_whole(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path, n_cached: int
) -> None:
    def begin(**settings: object) -> Pipeline:
        return make_pipeline(database, provider, tmp_path / "store", **settings)

    if n_cached:
        songs(*plain_songs(range(1, n_cached + 1)))
        begin().run()
    songs(*plain_songs(NEW))
    provider.control(model=NAME)
    provider.reset_ledger()
    begin(embedding_model=NAME, model_id=FIREWORKS_MODEL).run()
    assert (len(compared(provider)), paid_new(provider)) == (n_cached, len(NEW))


def test_runs_at_once_pay_for_each_song_once(begin: Begin, provider: Provider) -> None:
    begin().export()
    provider.control(model=NAME, latency_s=0.01)
    runs = [threading.Thread(target=begin().embed) for _ in range(2)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert paid_new(provider) == len(NEW)
    assert N_SONGS <= sum(compared(provider).values()) <= 2 * N_SONGS
    assert begin().estimate().n_texts == 0


def test_questions_are_answered_and_a_run_without_new_songs_asks_nobody(begin: Begin, provider: Provider) -> None:
    moved = begin()
    assert f"{NAME} at {provider.base_url}, as {FIREWORKS_MODEL}" in moved.describe()
    assert moved.estimate().n_texts == 0, "the snapshots are as they were"
    moved.export()
    assert moved.estimate().n_texts == len(NEW)
    assert any(line.startswith(f"embed: {len(NEW)} texts") for line in moved.dry_run().describe())
    assert moved.status().total["n_missing"] == len(NEW)
    assert moved.embed([moved.tiling.range_of(1)])[0].n_unchanged == 30
    assert provider.ledger()["requests"] == 0


def test_without_the_id_the_refusal_names_it(begin: Begin, provider: Provider) -> None:
    with pytest.raises(TableMismatchError, match=f"SONGVEC_MODEL_ID={FIREWORKS_MODEL}"):
        begin(model_id=None).run()
    assert provider.ledger()["requests"] == 0
    with pytest.raises(TableMismatchError, match=f"answered 404.*SONGVEC_MODEL_ID={FIREWORKS_MODEL}"):
        begin(model_id=None).search("waves")


def test_searches_ask_for_the_model_by_the_providers_name(begin: Begin) -> None:
    [hit] = begin().search(OLD_TEXTS[7], 1)
    assert (hit.song_id, round(hit.similarity or 0, 4)) == (7, 1.0)


def test_a_swap_to_another_model_takes_its_name_as_the_id(begin: Begin, provider: Provider) -> None:
    provider.control(model="other", turn=1.0)
    moved = begin()
    moved.swap(model="other")
    assert moved.status().tables["song_embeddings"] == "vector(64) by other"
    assert moved.search(OLD_TEXTS[7], 1)[0].song_id == 7, "the settings still name the former model"
