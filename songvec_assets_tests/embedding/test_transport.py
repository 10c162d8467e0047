"""One try over HTTP: a batch, or a failure that says whether it was sent, whether it may be billed, and what to do."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from songvec_assets.embedding import transport as transport_module
from songvec_assets.embedding.embedder import Endpoint
from songvec_assets.embedding.transport import TIMEOUT, Dialect, Failure, Request, Transport, check_redirect
from songvec_assets.embedding.wire import EmbeddingBatch, encode_request
from songvec_assets.errors import ProviderError, RequestRefusedError
from songvec_assets_tests.administration import free_port
from songvec_assets_tests.provider import Provider, count_tokens, vector_of

MODEL = "fireworks/qwen3-embedding-8b"
TEXTS = ["Sea by Ann", "Hill by Ben"]
BASE64 = Dialect("base64", True, 64)

Send = Callable[..., EmbeddingBatch | Failure]


@pytest.fixture
def endpoint(provider: Provider) -> Endpoint:
    return Endpoint(provider.base_url, provider.api_key, MODEL, 64)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def send(
    endpoint: Endpoint,
    texts: list[str] = TEXTS,
    dialect: Dialect = BASE64,
    timeout_s: float = 20.0,
    first: bool = False,
) -> Any:
    """One try over connections of its own."""
    body = encode_request(MODEL, texts, dialect.encoding_format, endpoint.dimensions)
    request = Request(body, len(texts), sum(map(len, texts)), sum(map(count_tokens, texts)))

    async def work() -> EmbeddingBatch | Failure:
        transport = Transport(endpoint)
        try:
            return await transport.send(request, dialect, timeout_s, first)
        finally:
            await transport.close()

    return asyncio.run(work())


@pytest.mark.parametrize("n_texts", [2, transport_module.MAX_TEXTS_IN_LOOP + 1])
@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_an_answer_becomes_a_batch_wherever_it_is_decoded(endpoint: Endpoint, n_texts: int, encoding: Any) -> None:
    texts = [f"song {number}" for number in range(n_texts)]
    batch = send(endpoint, texts, Dialect(encoding, True, 64))
    np.testing.assert_allclose(batch.embeddings, [vector_of(text, 64) for text in texts], atol=1e-6)
    assert batch.n_tokens == sum(map(count_tokens, texts))


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (
            {"statuses": [{"status": 429, "retry_after_s": 2.5}]},
            {
                "kind": "status 429",
                "status": 429,
                "retry_after_s": 2.5,
                "may_be_billed": False,
                "first_patience_s": None,
            },
        ),
        (
            {"statuses": [{"status": 504}]},
            {"kind": "status 504", "may_be_billed": True, "first_patience_s": None},
        ),
        ({"statuses": [{"status": 418}]}, {"kind": "status 418", "first_patience_s": 12.0}),
        ({"reset": 1.0, "reset_when": "after"}, {"kind": "connection", "sent": True, "may_be_billed": True}),
        ({"truncate": 1.0}, {"kind": "connection", "sent": True, "may_be_billed": True}),
        ({"corrupt": "not_json"}, {"kind": "malformed", "may_be_billed": True, "first_patience_s": 3.0}),
        ({"page": "<html>"}, {"kind": "malformed", "may_be_billed": True, "advice": "correct FIREWORKS_BASE_URL"}),
    ],
)
def test_a_failure_says_what_may_have_happened(
    endpoint: Endpoint, provider: Provider, faults: dict[str, Any], expected: dict[str, object]
) -> None:
    provider.control(**faults)
    failure = send(endpoint)
    assert isinstance(failure, Failure)
    assert {name: getattr(failure, name) for name in expected} == expected


def test_no_whole_answer_in_time_may_be_billed(endpoint: Endpoint, provider: Provider) -> None:
    provider.control(stall=1.0)
    failure = send(endpoint, timeout_s=0.3)
    assert (failure.kind, failure.may_be_billed, failure.sent) == (TIMEOUT, True, True)


def test_what_never_reached_a_server_costs_nothing(endpoint: Endpoint) -> None:
    failure = send(replace(endpoint, url=f"http://127.0.0.1:{free_port()}/v1"), first=True)
    assert (failure.kind, failure.sent, failure.may_be_billed) == ("connection", False, False)
    assert "nothing listens there" in failure.advice


@pytest.mark.parametrize(("variable", "scheme"), [("http_proxy", "http://"), ("all_proxy", "")])
def test_a_proxy_of_the_environment_is_named(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    monkeypatch.setenv(variable, f"{scheme}127.0.0.1:{(port := free_port())}")
    failure = send(replace(endpoint, url="http://provider.invalid/v1"), first=True)
    assert f"127.0.0.1:{port}" in failure.message
    assert "HTTP_PROXY" in failure.advice
    assert "add provider.invalid to NO_PROXY" in failure.advice


@pytest.mark.parametrize(
    ("faults", "kind"),
    [
        ({"statuses": [{"status": 401}]}, ProviderError),
        ({"poison": ["Sea"]}, RequestRefusedError),
        ({"poison": ["Sea"], "poison_inside": True}, RequestRefusedError),
    ],
)
def test_a_refusal_is_raised_without_the_key_or_the_librarys_error(
    endpoint: Endpoint, provider: Provider, faults: dict[str, Any], kind: type[Exception]
) -> None:
    provider.control(**faults)
    with pytest.raises(kind) as refused:
        send(endpoint)
    assert refused.value.__cause__ is None
    assert provider.api_key not in str(refused.value)


def test_a_redirect_is_refused_before_and_while_texts_are_sent(endpoint: Endpoint, provider: Provider) -> None:
    check_redirect(endpoint.url)
    provider.control(redirect="https://elsewhere.invalid/v1/embeddings")
    for ask in (lambda: check_redirect(endpoint.url), lambda: send(endpoint)):
        with pytest.raises(ProviderError, match=r"set FIREWORKS_BASE_URL=https://elsewhere\.invalid/v1"):
            ask()
    check_redirect(f"http://127.0.0.1:{free_port()}/v1")
