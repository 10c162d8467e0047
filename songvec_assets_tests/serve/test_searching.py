"""Searches while the provider fails, hangs, costs too much, or the table is swapped."""

import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from songvec_assets.pipeline import Pipeline
from songvec_assets.serve import searching
from songvec_assets.vectors.swap import drop_others
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.serve.conftest import running_server


@pytest.fixture
def provider(songs_provider: Provider) -> Iterator[Provider]:
    """A provider that behaves again after the test."""
    songs_provider.control()
    yield songs_provider
    songs_provider.control()


@pytest.fixture
def client(pipeline: Pipeline, provider: Provider) -> Iterator[httpx2.Client]:
    """Asks a server of its own, which has sent nothing yet."""
    with (
        running_server(type(pipeline)(pipeline.settings)) as address,
        httpx2.Client(base_url=address, timeout=60) as asks,
    ):
        yield asks


@pytest.fixture
def embed_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a vector is waited for: less than in earnest, where nothing else is tested."""
    monkeypatch.setattr(searching, "EMBED_S", 2.0)
    return 2.0


def ask(client: httpx2.Client, words: str = "song 9", **given: Any) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    found = client.get("/search", params={"q": words} | given)
    return found.json(), time.monotonic() - started


def test_one_client_is_kept_for_all_searches(client: httpx2.Client, provider: Provider) -> None:
    provider.reset_ledger()
    for n in range(5):
        assert len(ask(client, f"query {n}")[0]["hits"]) == 10
    assert provider.ledger()["requests"] == 6, "one probe, and one request per query"


@pytest.mark.parametrize("mode", ["vector", "hybrid"])
def test_while_the_provider_fails_songs_are_found_by_words_and_it_is_left_alone(
    client: httpx2.Client, provider: Provider, mode: str, embed_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "REST_S", 5.0)
    provider.control(statuses=[{"status": 500}])
    found, seconds = ask(client, mode=mode)
    assert seconds < 15
    assert (found["mode"], found["hits"][0]["song_id"]) == ("text", 9)
    assert found["notice"]["code"] == "provider.unavailable"
    n_sent = provider.ledger()["requests"]
    found, seconds = ask(client, mode=mode)
    assert (found["mode"], seconds < embed_s, provider.ledger()["requests"]) == ("text", True, n_sent)
    # the rest is over, and so is the failure
    provider.control()
    wait_until(lambda: ask(client, mode=mode)[0]["mode"] == mode)
    assert ask(client, mode=mode)[0]["notice"] is None


def test_a_provider_that_hangs_is_waited_for_once(client: httpx2.Client, provider: Provider, embed_s: float) -> None:
    provider.control(hold_after=0)
    found, seconds = ask(client)
    assert embed_s <= seconds < 15
    assert (found["mode"], found["notice"]["code"]) == ("text", "provider.unavailable")
    assert ask(client)[1] < embed_s


def test_a_wrong_key_is_a_notice_too(pipeline: Pipeline) -> None:
    wrong = type(pipeline)(pipeline.settings.model_copy(update={"fireworks_api_key": "wrong"}))
    with running_server(wrong) as address, httpx2.Client(base_url=address, timeout=60) as client:
        found, _ = ask(client)
        assert (found["mode"], found["notice"]["code"]) == ("text", "provider.key-refused")


def test_where_words_find_nothing_either_the_failure_is_the_answer(
    client: httpx2.Client, provider: Provider, pipeline: Pipeline, embed_s: float
) -> None:
    provider.control(statuses=[{"status": 500}])
    url = pipeline.database.adbc_uri
    execute(url, "UPDATE pg_class SET reltuples = 60000 WHERE oid = 'songs'::regclass")
    try:
        failed = client.get("/search", params={"q": "song 9"})
        assert (failed.status_code, failed.json()["error"]["code"]) == (502, "provider.unavailable")
    finally:
        execute(url, "ANALYZE songs")


def test_a_spent_budget_is_a_notice(pipeline: Pipeline, provider: Provider) -> None:
    update = {"usd_per_million_tokens": 1e6, "max_search_usd_a_month": 20.0}
    provider.reset_ledger()
    poor = type(pipeline)(pipeline.settings.model_copy(update=update))
    with running_server(poor) as address, httpx2.Client(base_url=address, timeout=60) as client:
        modes = [ask(client, f"song {n}")[0]["mode"] for n in range(20)]
        found, _ = ask(client)
    assert modes[0] == "vector"
    assert modes == sorted(modes, reverse=True)
    assert (found["mode"], found["notice"]["code"]) == ("text", "budget.exceeded")
    assert provider.ledger()["tokens_billed"] <= 20
    [(usd, reserved)] = execute(
        pipeline.database.adbc_uri, "SELECT usd, reserved_usd FROM songvec.budgets WHERE name LIKE 'searches %'"
    )
    assert 0 < usd <= 20
    assert reserved == 0


@pytest.mark.slow
def test_after_a_swap_queries_are_embedded_by_the_new_size(client: httpx2.Client, pipeline: Pipeline) -> None:
    assert ask(client)[0]["mode"] == "vector"
    for dimensions in (32, 64):
        other = type(pipeline)(pipeline.settings)
        other.swap(dimensions=dimensions)
        found, _ = ask(client)
        assert (len(found["hits"]), found["mode"], found["notice"]) == (10, "vector", None)
        drop_others(other.database)
