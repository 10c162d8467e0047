"""Who is refused before a search, and what every response says to a browser."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from songvec_assets.pipeline import Pipeline
from songvec_assets.serve.app import OPEN
from songvec_assets.serve.guard import Limits, Rates, _read_client
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.serve.conftest import Get, running_server

TOKEN = "0123456789abcdef"


def code_of(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80", "LOCALHOST."]
)
def test_a_request_by_another_name_is_refused(get: Get, host: str) -> None:
    for path in ("/", "/healthz", "/similar/7"):
        assert code_of(get(path, headers={"Host": host})) == (421, "serve.host")


@pytest.mark.parametrize("host", ["localhost", "LocalHost:9999", "127.0.0.1:80", "[::1]:80", "[::1]"])
def test_loopback_has_its_names(get: Get, host: str) -> None:
    assert get("/similar/7", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
def test_nothing_can_be_sent(get: Get, method: str) -> None:
    refused = get("/similar/7", method)
    assert code_of(refused) == (405, "serve.method")
    assert refused.headers["allow"] == "GET, HEAD"


def test_a_body_is_refused_before_it_is_read(address: str) -> None:
    def endless() -> Any:
        yield b"x" * 1000
        raise AssertionError("it was read on")

    assert code_of(httpx2.request("GET", f"{address}/similar/7", content=b"x" * 10_000_000)) == (413, "serve.body")
    assert code_of(httpx2.request("GET", f"{address}/similar/7", content=iter([b"x"]))) == (413, "serve.body")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_cannot_let_a_browser_search(get: Get, songs_provider: Provider, site: str) -> None:
    n_sent = songs_provider.ledger()["requests"]
    assert code_of(get("/search", headers={"Sec-Fetch-Site": site}, q="a storm")) == (403, "serve.cross-site")
    assert songs_provider.ledger()["requests"] == n_sent
    # a link to the page is no search
    assert get("/", headers={"Sec-Fetch-Site": site}).status_code == 200


def test_every_response_forbids_what_the_page_does_not_need(get: Get) -> None:
    for path in [*OPEN, "/similar/7", "/nothing", "/search"]:
        headers = get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy, path
        assert "frame-ancestors 'none'" in policy
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert headers["cache-control"] == ("no-cache" if path in OPEN - {"/healthz"} else "no-store"), path
        assert not [name for name in headers if name.startswith("access-control")]
        assert "server" not in headers


class TestToken:
    def test_is_needed_for_songs_and_shown_to_nobody(self, pipeline: Pipeline) -> None:
        with running_server(pipeline, Limits(token=TOKEN)) as address, httpx2.Client(base_url=address) as client:
            for given in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {TOKEN}"},
                          {"Authorization": "Bearer é"}, {"Authorization": "Bearer"}):  # fmt: skip
                headers = {name: value.encode() for name, value in given.items()}
                for path in ("/similar/7", "/search?q=a", "/nothing", "/search/"):
                    assert code_of(client.get(path, headers=headers)) == (401, "serve.unauthorized"), path
                assert client.get("/healthz", headers=headers).json() == {"status": "ok"}
                assert client.get("/", headers=headers).status_code == 200
            headers = {"Authorization": f"bearer {TOKEN}"}
            assert len(client.get("/similar/7", headers=headers).json()["hits"]) == 10
            assert client.get("/healthz", headers=headers).json()["dimensions"] == 64
            assert client.get(f"/similar/7?token={TOKEN}", headers=headers).status_code == 400


class TestRate:
    def test_of_one_address_is_limited_and_the_page_is_not(self, pipeline: Pipeline) -> None:
        with running_server(pipeline, Limits(requests_per_minute=12)) as address:
            statuses = [httpx2.get(f"{address}/similar/7").status_code for _ in range(4)]
            refused = httpx2.get(f"{address}/similar/7", headers={"X-Forwarded-For": "10.0.0.1"})
            assert (statuses, code_of(refused)) == ([200, 200, 429, 429], (429, "serve.rate"))
            assert refused.headers["retry-after"] == "5"
            assert httpx2.get(address).status_code == 200

    def test_comes_back_with_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        rates = Rates(60)
        assert [rates.take("a") for _ in range(12)] == [True] * 10 + [False] * 2
        assert rates.take("b")
        now += 2.5
        assert [rates.take("a") for _ in range(3)] == [True, True, False]

    def test_of_many_addresses_is_kept_for_some(self) -> None:
        rates = Rates(1)
        assert all(rates.take(str(n)) for n in range(10_010))
        assert len(rates._full_at) == 10_000

    def test_counts_networks_of_ipv6(self) -> None:
        clients = [_read_client({"client": (host, 1)}) for host in ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:1::1")]
        assert clients == ["2001:db8::/64", "2001:db8::/64", "2001:db8:1::/64"]
        assert _read_client({"client": ("10.0.0.1", 1)}) == "10.0.0.1"
        assert _read_client({"client": None}) == ""


def test_more_searches_at_once_than_allowed_are_sent_away(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, end, ask = threading.Semaphore(0), threading.Event(), type(pipeline).ask

    def hold(*given: Any, **options: Any) -> Any:
        begun.release()
        assert end.wait(60)
        return ask(*given, **options)

    monkeypatch.setattr(type(pipeline), "ask", hold)
    with running_server(pipeline, Limits(n_at_once=3)) as address, ThreadPoolExecutor(3) as pool:
        held = [pool.submit(httpx2.get, f"{address}/similar/7", timeout=60) for _ in range(3)]
        assert all(begun.acquire(timeout=60) for _ in held)
        busy = httpx2.get(f"{address}/similar/7", timeout=60)
        assert (code_of(busy), busy.headers["retry-after"]) == ((503, "serve.busy"), "1")
        assert httpx2.get(f"{address}/healthz", timeout=60).status_code == 200
        end.set()
        assert {each.result().status_code for each in held} == {200}
        assert httpx2.get(f"{address}/similar/7", timeout=60).status_code == 200


def test_an_unexpected_error_is_answered_and_logged_without_the_query(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(pipeline), "ask", fail)
    with running_server(pipeline) as address:
        answered = httpx2.get(f"{address}/search?q=secret+wish")
    assert code_of(answered) == (500, "serve.failed")
    assert "content-security-policy" in answered.headers
    assert "a bug" in caplog.text and "secret" not in caplog.text
    assert threading.active_count() < 50
