"""/metrics: what was searched and refused, behind the token, whatever the load, and no word of a query."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from songvec_assets.pipeline import Pipeline
from songvec_assets.serve import metrics
from songvec_assets.serve.guard import Limits
from songvec_assets.wiring import Wiring
from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.serve.conftest import running_server
from songvec_assets_tests.serve.test_guard import TOKEN, code_of

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def scrape(client: httpx2.Client) -> dict[str, float]:
    """The samples, by name and labels; of histograms the numbers alone."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    samples = (each for family in families for each in family.samples if not each.name.endswith(("_bucket", "_sum")))
    return {" ".join([each.name.removeprefix("songvec_"), *each.labels.values()]): each.value for each in samples}


@pytest.fixture
def client(pipeline: Pipeline) -> Iterator[httpx2.Client]:
    """Asks a server of its own."""
    with (
        running_server(type(pipeline)(pipeline.settings)) as address,
        httpx2.Client(base_url=address, timeout=60) as asks,
    ):
        yield asks


def test_searches_count_by_mode_and_outcome_and_errors_by_code(client: httpx2.Client, pipeline: Pipeline) -> None:
    for path in ("/search?q=secret+wish", "/search?q=song&mode=text", "/similar/7", "/similar/8"):
        assert client.get(path).status_code == 200
    for path in ("/similar/100000", "/search?q=a&mode=secret", "/search?q=a&where=secret=1", "/secret", "/search?b=1"):
        assert client.get(path).status_code >= 400
    assert client.post("/search").status_code == 405
    found = scrape(client)
    searches = {name: n for name, n in found.items() if name.startswith("search_duration_seconds_count")}
    assert searches == {
        "search_duration_seconds_count vector found": 1,
        "search_duration_seconds_count text found": 1,
        "search_duration_seconds_count song found": 2,
        "search_duration_seconds_count song refused": 1,
        "search_duration_seconds_count unknown refused": 1,
        "search_duration_seconds_count vector refused": 1,
    }
    errors = {name.split()[1]: n for name, n in found.items() if name.startswith("http_errors_total")}
    assert errors == {
        "search.unknown-song": 1,
        "search.invalid": 1,
        "search.column": 1,
        "serve.not-found": 1,
        "serve.request": 1,
        "serve.method": 1,
    }
    assert found["searches_running"] == 0
    assert (found["songs loaded"], found["state_read_success database"], found["state_read_success ranges"]) == (
        60,
        1,
        1,
    )
    assert not re.search("secret|wish", client.get("/metrics").text)


def test_searches_by_words_alone_count_with_the_reason(client: httpx2.Client, songs_provider: Provider) -> None:
    songs_provider.control(statuses=[{"status": 401}])
    try:
        assert client.get("/search?q=song+9").json()["mode"] == "text"
    finally:
        songs_provider.control()
    found = scrape(client)
    assert found["degraded_searches_total provider.key-refused"] == 1
    assert found["search_duration_seconds_count vector words"] == 1


def test_it_needs_the_token_and_no_place_among_the_searches(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, end, ask = threading.Semaphore(0), threading.Event(), type(pipeline).ask

    def hold(*given: Any, **options: Any) -> Any:
        begun.release()
        assert end.wait(60)
        return ask(*given, **options)

    monkeypatch.setattr(type(pipeline), "ask", hold)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    limits = Limits(token=TOKEN, requests_per_minute=6, n_at_once=1)
    with running_server(pipeline, limits) as address, ThreadPoolExecutor(1) as pool:
        assert code_of(httpx2.get(f"{address}/metrics")) == (401, "serve.unauthorized")
        held = pool.submit(httpx2.get, f"{address}/similar/7", headers=bearer, timeout=60)
        assert begun.acquire(timeout=60)
        with httpx2.Client(base_url=address, headers=bearer, timeout=60) as client:
            found = [scrape(client) for _ in range(5)][-1]
            assert (found["searches_running"], found["http_errors_total serve.unauthorized"]) == (1, 1)
            end.set()
            assert held.result().status_code == 200
            assert code_of(client.get("/similar/7")) == (429, "serve.rate"), (
                "the scrapes took none of it, and give none"
            )


def test_a_state_that_cannot_be_read_says_so_and_the_rest_is_there(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = type(pipeline)(pipeline.settings.model_copy(update={"postgres_url": "postgresql://127.0.0.1:1/none"}))
    monkeypatch.setattr(metrics, "READ_S", 0.2)
    with running_server(nowhere) as address, httpx2.Client(base_url=address, timeout=60) as client:
        assert client.get("/similar/7").status_code == 503
        found = scrape(client)
    assert (found["state_read_success database"], found["state_read_success ranges"]) == (0, 0)
    assert found["http_errors_total database.unavailable"] == 1
    assert "spent_dollars_total" not in found


def test_a_read_that_hangs_holds_up_no_scrape(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    end, read = threading.Event(), Wiring.read_inventory
    monkeypatch.setattr(metrics, "READ_S", 1.0)
    monkeypatch.setattr(Wiring, "read_inventory", lambda *given: end.wait(60) and read(*given))
    with running_server(pipeline) as address, httpx2.Client(base_url=address, timeout=60) as client:
        for _ in range(2):
            found = scrape(client)
            assert (found["state_read_success database"], found["state_read_success ranges"]) == (1, 0)
        assert len([each for each in threading.enumerate() if each.name == "songvec-serve"]) == 1
        end.set()
        wait_until(lambda: scrape(client)["state_read_success ranges"])


def test_the_text_is_what_promtool_expects(client: httpx2.Client) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool on the PATH: apt-get install prometheus")
    client.get("/similar/7")
    text = client.get("/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_page_has_a_row_for_each_metric(client: httpx2.Client) -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(songvec_\w+)`[^|]*\| (\w+) \|", table, re.M))
    shown = dict(re.findall(r"^# TYPE (songvec_\w+) (\w+)$", client.get("/metrics").text, re.M))
    assert rows == shown
