"""The provider that other tests trust: each thing it does, right or wrong on purpose, once over real HTTP."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import psutil
import pybase64
import pytest

from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.provider import count_tokens, digest_of, faults, running_provider, vector_of
from songvec_assets_tests.provider.faults import FaultPlan, Faults, Quota
from songvec_assets_tests.provider.modes import MODES

MODEL = "fireworks/qwen3-embedding-8b"
TEXTS = ["Loves you, yeah yeah yeah", "Ne me quitte pas", "99 Luftballons", "上を向いて歩こう"]


@pytest.fixture(scope="module")
def server():
    with running_provider() as provider:
        yield provider


@pytest.fixture
def provider(server):
    server.control()
    server.reset_ledger()
    return server


@pytest.fixture(scope="module")
def client(server):
    key = {"authorization": f"Bearer {server.api_key}"}
    with httpx.Client(base_url=server.base_url, headers=key, trust_env=False, timeout=60) as client:
        yield client


def embed(client, texts=TEXTS, **fields) -> httpx.Response:
    return client.post("/embeddings", json={"model": MODEL, "input": texts, "dimensions": 64} | fields)


def statuses(client, n_requests):
    return [embed(client).status_code for _ in range(n_requests)]


def matrix(response) -> np.ndarray:
    """The vectors of a response, ordered by their index."""
    items = sorted(response.json()["data"], key=lambda item: item["index"])
    assert [item["index"] for item in items] == list(range(len(items)))
    return np.array([decode(item["embedding"]) for item in items])


def decode(embedding) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(pybase64.b64decode(embedding, validate=True), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


def vectors_of(texts, dimensions=64) -> np.ndarray:
    return np.array([vector_of(text, dimensions) for text in texts])


# What it computes


@pytest.mark.parametrize("dimensions", [32, 64, 2000, 4095, 4096])
def test_vectors_are_unit_and_matryoshka(dimensions):
    for text in TEXTS:
        vector, start = vector_of(text, dimensions), vector_of(text, 4096)[:dimensions]
        assert vector.shape == (dimensions,)
        assert vector.dtype == np.float32
        assert math.isclose(np.linalg.norm(vector.astype(np.float64)), 1, abs_tol=1e-6)
        np.testing.assert_allclose(vector, start / np.linalg.norm(start), atol=1e-6)


def test_vectors_are_distinct_and_mostly_far_apart():
    vectors = vectors_of([f"song {n}" for n in range(3000)], 256)
    assert len(np.unique(vectors[:, :32], axis=0)) == 3000
    cosines = vectors @ vectors.T - np.eye(3000)
    assert np.mean(np.abs(cosines) > 0.5) < 1e-5


def test_clustered_vectors_are_near_those_of_their_cluster_alone(provider, client):
    provider.control(clusters=2)
    texts = [f"song no. {number}" for number in range(20)]
    vectors = matrix(embed(client, texts, dimensions=2000))
    np.testing.assert_allclose(vectors, [vector_of(text, 2000, 2) for text in texts], atol=1e-6)
    is_near = vectors @ vectors[0] > 0.2
    assert 1 < is_near.sum() < 20
    assert (vectors @ vectors[0])[~is_near].max() < 0.15


def test_tokens_are_quarters_of_characters():
    assert [count_tokens("x" * n) for n in (1, 4, 5, 400)] == [1, 1, 2, 100]


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("model", [MODEL, "accounts/fireworks/models/qwen3-embedding-8b"])
def test_answers_vectors(provider, client, encoding, model):
    response = embed(client, model=model, dimensions=2000, encoding_format=encoding, user="tester")
    assert response.status_code == 200
    body = response.json()
    n_tokens = sum(map(count_tokens, TEXTS))
    assert body["object"] == "list"
    assert body["model"] == model
    assert body["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert {item["object"] for item in body["data"]} == {"embedding"}
    assert {type(item["embedding"]) for item in body["data"]} == {str if encoding == "base64" else list}
    np.testing.assert_array_equal(matrix(response), vectors_of(TEXTS, 2000))


def test_serves_the_openai_client(provider):
    from openai import OpenAI  # half a second, in every worker that collects the tests

    with OpenAI(base_url=provider.base_url, api_key=provider.api_key, max_retries=0) as openai:
        answer = openai.embeddings.create(model=MODEL, input=TEXTS[0])
    np.testing.assert_array_equal(np.float32(answer.data[0].embedding), vector_of(TEXTS[0], 4096))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input": []}, "1 to 2048 texts, not 0"),
        ({"input": ["x"] * 2049}, "1 to 2048 texts, not 2049"),
        ({"input": ["x", ""]}, "empty text"),
        ({"input": [1, 2]}, "Expected `str`"),
        ({"dimensions": 7}, "between 8 and 4096"),
        ({"dimensions": 4097}, "between 8 and 4096"),
        ({"encoding_format": "hex"}, "Invalid enum value 'hex'"),
        ({"service_tier": "flex"}, "unknown field `service_tier`"),
    ],
)
def test_refuses_what_is_no_request(provider, client, fields, told):
    response = embed(client, **fields)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]
    assert provider.ledger()["texts_billed"] == 0


def test_refuses_another_key_and_model(provider, client):
    for wrong in ("Bearer other", ""):
        assert client.post("/embeddings", headers={"authorization": wrong}).status_code == 401
    response = embed(client, model="fireworks/retired")
    assert response.status_code == 404
    assert response.json() == {
        "error": {"message": "Model not found, inaccessible, and/or not deployed", "code": "NOT_FOUND"}
    }


def test_keeps_connections_alive(provider):
    connection = HTTPConnection(provider.base_url.split("/")[2])
    sockets = set()
    for _ in range(3):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        sockets.add(connection.sock)
    connection.close()
    assert len(sockets) == 1
    assert None not in sockets


# What it does wrong when told to


def test_unknown_faults_are_refused_and_change_nothing(provider, client):
    provider.control(max_request_tokens=1)
    with pytest.raises(ValueError, match="unknown field `lateness`"):
        provider.control(lateness=1)
    assert embed(client).status_code == 413


def test_latency_is_fixed_or_drawn(provider, client):
    for latency_s in (0.1, [0.1, 0.2]):
        provider.control(latency_s=latency_s)
        assert 0.1 <= embed(client).elapsed.total_seconds() < 30


def test_base64_can_be_refused_or_ignored(provider, client):
    provider.control(refuse_base64=True)
    response = embed(client, encoding_format="base64")
    assert response.status_code == 400
    assert "Extra inputs are not permitted, field: 'encoding_format'" in response.text
    assert embed(client, encoding_format="float").status_code == 200
    provider.control(ignore_base64=True)
    response = embed(client, encoding_format="base64")
    assert isinstance(response.json()["data"][0]["embedding"], list)


def test_dimensions_can_be_refused_or_ignored(provider, client):
    provider.control(refuse_dimensions=True, native_dimensions=1024)
    assert embed(client).status_code == 400
    response = client.post("/embeddings", json={"model": MODEL, "input": TEXTS})
    np.testing.assert_array_equal(matrix(response), vectors_of(TEXTS, 1024))
    provider.control(ignore_dimensions=True)
    assert matrix(embed(client)).shape == (4, 4096)


def test_statuses_come_by_count_from_a_request_on(provider, client):
    told = {"status": 503, "count": 2, "after": 2, "retry_after_s": 0.5, "body": {"detail": "busy"}}
    provider.control(statuses=[told, {"status": 529, "count": 1, "after": 4}])
    assert embed(client).status_code == 200
    response = embed(client)
    assert (response.status_code, response.headers["retry-after"]) == (503, "0.5")
    assert response.json() == {"detail": "busy"}
    assert statuses(client, 3) == [503, 529, 200]


def test_statuses_come_by_share_and_repeat_with_the_seed(provider, client):
    seen = []
    for _ in range(2):
        provider.control(statuses=[{"status": 500, "share": 0.3}], seed=5)
        seen.append(statuses(client, 60))
    assert seen[0] == seen[1]
    assert 6 <= seen[0].count(500) <= 30


@pytest.mark.parametrize(("when", "n_billed"), [("before", 0), ("after", 4)])
def test_connections_are_reset(provider, client, when, n_billed):
    provider.control(reset=1, reset_when=when)
    with pytest.raises(httpx.ReadError, match="reset by peer"):
        embed(client)
    assert provider.ledger()["requests_by_status"] == {"reset": 1}
    assert provider.ledger()["texts_billed"] == n_billed


def test_responses_are_truncated(provider, client):
    provider.control(truncate=1)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        embed(client)
    assert provider.ledger()["texts_billed"] == 4


def test_responses_stall_and_end(provider, client):
    provider.control(stall=1, stall_s=0.6)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/embeddings", json={"model": MODEL, "input": TEXTS}, timeout=0.2)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        embed(client)
    assert provider.ledger()["texts_billed_twice"] == 4


def test_items_are_reordered(provider, client):
    provider.control(reorder=True)
    texts = [f"song {n}" for n in range(50)]
    response = embed(client, texts)
    assert [item["index"] for item in response.json()["data"]] != list(range(50))
    np.testing.assert_array_equal(matrix(response), vectors_of(texts))


def corrupted(provider, client, corruption, encoding="base64"):
    provider.control(corrupt=corruption)
    response = embed(client, encoding_format=encoding)
    assert response.status_code == 200
    return response


def test_items_are_dropped_or_numbered_twice(provider, client):
    assert len(corrupted(provider, client, "drop_item").json()["data"]) == 3
    indexes = [item["index"] for item in corrupted(provider, client, "duplicate_index").json()["data"]]
    assert (len(indexes), len(set(indexes))) == (4, 3)


def test_one_vector_is_spoilt(provider, client):
    def decoded(corruption):
        response = corrupted(provider, client, corruption)
        return [decode(item["embedding"]) for item in response.json()["data"]]

    assert sorted(vector.size for vector in decoded("wrong_size")) == [63, 64, 64, 64]
    assert sum(np.isnan(vector).any() for vector in decoded("nan")) == 1
    assert sum(not vector.any() for vector in decoded("zero")) == 1
    assert "[null," in corrupted(provider, client, "nan", encoding="float").text
    with pytest.raises(ValueError, match="base64"):
        matrix(corrupted(provider, client, "bad_base64"))
    with pytest.raises(json.JSONDecodeError):
        corrupted(provider, client, "not_json").json()
    assert provider.ledger()["texts_billed"] == 24


def test_corruption_has_a_share(provider, client):
    provider.control(corrupt="drop_item", corrupt_share=0.3)
    sizes = [len(embed(client).json()["data"]) for _ in range(40)]
    assert 3 <= sizes.count(3) <= 24
    assert sizes.count(3) + sizes.count(4) == 40


def test_poisoned_and_large_requests_are_refused(provider, client):
    provider.control(poison=["quitte"], max_request_tokens=10)
    response = embed(client, TEXTS[1])
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "text refused by the content filter"
    assert embed(client, "x" * 40).status_code == 200
    assert embed(client, "x" * 41).status_code == 413


# Quota and ledger


def test_quota_of_requests(provider, client):
    provider.control(quota={"requests_per_minute": 3, "retry_after_s": 0.4})
    first = embed(client)
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert first.headers["x-ratelimit-over-limit"] == "no"
    assert statuses(client, 2) == [200, 200]
    refused = embed(client)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "0.4"
    assert refused.headers["x-ratelimit-over-limit"] == "yes"
    assert refused.json() == {
        "object": "error",
        "type": "invalid_request_error",
        "code": "invalid_request_error",
        "message": "rate limit exceeded, please try again later",
    }
    assert provider.ledger()["requests_by_status"] == {"200": 3, "429": 1}


def test_quota_slides(monkeypatch):
    quota, plan, now = Quota(requests_per_minute=180, window_s=1.0), FaultPlan(Faults()), 0.0
    monkeypatch.setattr(faults.time, "monotonic", lambda: now)
    admitted = []
    for moment in (0.0, 0.4, 0.4, 0.5, 1.01, 1.01, 1.41):
        now = moment
        admitted.append(plan.admit(quota, 1)[0])
    # only the first has left the window by then, and what was refused does not count
    assert admitted == [True, True, True, False, True, False, True]


def test_requests_are_held_until_the_next_control_and_a_new_beginning_forgets_them(provider, client):
    provider.control(hold_after=1)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(embed, client) for _ in range(2)]
        wait_until(lambda: provider.ledger()["requests_by_status"] == {"200": 1})
        wait_until(lambda: provider.count_in_flight() == 1)
        provider.control()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        provider.control(hold_after=0)
        held = threads.submit(embed, client)
        wait_until(lambda: provider.count_in_flight() == 1)
        provider.begin_again()
        assert held.result().status_code == 200
    figures = provider.ledger()
    assert (figures["requests"], figures["texts_billed"], figures["requests_by_status"]) == (0, 0, {})


def test_quota_of_tokens(provider, client):
    provider.control(quota={"tokens_per_minute": 100})
    seen = [embed(client, "x" * 4 * n_tokens) for n_tokens in (60, 50, 40, 1)]
    assert [response.status_code for response in seen] == [200, 429, 200, 429]
    assert seen[2].headers["x-ratelimit-remaining-tokens-prompt"] == "0"
    assert "retry-after" not in seen[1].headers


def test_ledger_tells_what_was_billed(provider, client):
    embed(client, ["one", "two", "two"])
    embed(client, "one")
    embed(client, ["x" * 400, ""])
    figures = provider.ledger()
    assert 0 < figures.pop("first_at") < figures.pop("last_at")
    assert figures == {
        "requests": 3,
        "requests_by_status": {"200": 2, "400": 1},
        "texts_billed": 4,
        "distinct_texts_billed": 2,
        "texts_billed_twice": 2,
        "tokens_billed": 4,
        "loads": 0,
        "max_in_flight": 1,
        "max_texts_in_request": 3,
        "max_tokens_in_request": 101,
    }
    assert provider.texts() == {"one": 2, "two": 2}
    provider.reset_ledger()
    assert provider.ledger()["first_at"] is None
    assert provider.texts() == {}


def test_texts_need_not_be_kept(provider, client):
    provider.control(keep_texts=False)
    embed(client)
    assert provider.texts() == {}
    assert provider.ledger()["distinct_texts_billed"] == 4


def test_ledger_counts_what_is_in_flight(provider, client):
    provider.control(hold_after=0)
    with ThreadPoolExecutor(5) as threads:
        answers = [threads.submit(embed, client) for _ in range(5)]
        wait_until(lambda: provider.count_in_flight() == 5)
        provider.control()
        assert {answer.result().status_code for answer in answers} == {200}
    assert provider.ledger()["max_in_flight"] == 5


# The process


def test_ledger_file_outlives_the_process(tmp_path):
    ledger_file = tmp_path / "billed.jsonl"
    for text in ("one", "two"):
        with running_provider(ledger_file=ledger_file, truncate=1.0) as provider:
            key = {"authorization": f"Bearer {provider.api_key}"}
            with (
                httpx.Client(base_url=provider.base_url, headers=key, trust_env=False) as client,
                pytest.raises(httpx.RemoteProtocolError),
            ):
                embed(client, [text, text])
    lines = [json.loads(line) for line in ledger_file.read_text().splitlines()]
    assert [line.pop("hashes") for line in lines] == [[digest_of(text).hex()] * 2 for text in ("one", "two")]
    assert abs(lines[0].pop("time") - time.time()) < 60
    assert lines[0] == {"n_texts": 2, "tokens": 2}


def wait_until_gone(pid):
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_ends_with_its_block():
    with running_provider() as provider:
        assert psutil.pid_exists(provider.pid)
    assert not psutil.pid_exists(provider.pid)


def test_ends_with_its_parent():
    code = """if True:
        import time
        from songvec_assets_tests.provider import running_provider
        with running_provider() as provider:
            print(provider.pid, flush=True)
            time.sleep(60)"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until_gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_at_a_signal_without_a_word(number, capfd):
    with running_provider(stall=1.0) as provider:
        stalled = HTTPConnection(provider.base_url.split("/")[2])
        body = json.dumps({"model": MODEL, "input": "x"})
        stalled.request("POST", "/v1/embeddings", body, {"authorization": f"Bearer {provider.api_key}"})
        assert stalled.getresponse().status == 200
        os.kill(provider.pid, number)
        wait_until_gone(provider.pid)
        stalled.close()
    assert capfd.readouterr().err == ""


def test_says_when_it_cannot_start(capfd):
    with pytest.raises(RuntimeError, match="ended before it listened"), running_provider(corrupt="all"):
        pass
    assert "Invalid enum value 'all'" in capfd.readouterr().err


def test_each_mode_of_a_real_server_can_be_set_and_has_its_source_and_its_row(provider):
    page = (Path(__file__).parents[1] / "docs" / "providers.md").read_text(encoding="utf-8")
    for name, mode in MODES.items():
        provider.control(mode=name)
        assert mode.source
        assert f"`{name}`" in page, name
