"""The client against a real HTTP provider: what it accepts, tries again, refuses, and never does."""

import asyncio
import random
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psycopg2
import pytest
import sqlalchemy as sa

from songvec_assets.embedding import client as client_module
from songvec_assets.embedding import contact as contact_module
from songvec_assets.embedding.answers import ENDS, REDIRECTS, REFUSALS, RETRIED, parse_retry_after
from songvec_assets.embedding.client import EmbeddingClient
from songvec_assets.embedding.embedder import Endpoint, Patience, RequestHooks
from songvec_assets.embedding.limits import Grant, RateLimiter
from songvec_assets.embedding.pricing import TokenEstimator
from songvec_assets.embedding.transport import Transport
from songvec_assets.embedding.wire import EmbeddingBatch, encode_request
from songvec_assets.errors import (
    ProviderError,
    ProviderUnavailableError,
    RequestRefusedError,
    RequestTooLargeError,
    StoppedError,
)
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.progress import StopSignal
from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.provider import Provider, count_tokens, running_provider, vector_of

MODEL = "fireworks/qwen3-embedding-8b"
TEXTS = [f"{word} {number}" for number in range(5) for word in ("Meer", "海", "sea", "море")]
DIMENSIONS = 64

# what facts/provider.md says of each status, written down apart from the package's own table
TRIED_AGAIN = (408, 409, 429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)
UNKNOWN = (418, 424, 520)
MOVED = (301, 302, 303, 307, 308)
ADVICE = {
    401: "FIREWORKS_API_KEY",
    402: "billing",
    403: "permissions",
    404: "SONGVEC_EMBEDDING_MODEL",
    405: "FIREWORKS_BASE_URL",
    410: "retired",
    412: "suspended or over its monthly budget",
    501: "FIREWORKS_BASE_URL",
}

Connect = Callable[..., EmbeddingClient]
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def server() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


@pytest.fixture
def provider(server: Provider) -> Provider:
    """The module's provider, well-behaved and with an empty ledger."""
    server.control()
    server.reset_ledger()
    return server


@pytest.fixture(scope="module")
def engine(server_url: str) -> Iterator[sa.Engine]:
    """A database for the quotas of all tests here; each takes a quota of its own name."""
    name = f"quotas_{uuid.uuid4().hex[:12]}"
    admin = psycopg2.connect(server_url)
    admin.autocommit = True
    admin.cursor().execute(f"CREATE DATABASE {name}")
    database = Database(sa.make_url(server_url).set(database=name).render_as_string(hide_password=False))
    ensure_schema(database)
    yield database.get_engine("web")
    database.get_engine("web").dispose()
    admin.cursor().execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 0.02)


@pytest.fixture
def limiter(engine: sa.Engine) -> RateLimiter:
    """A quota that never binds."""
    return RateLimiter(engine, uuid.uuid4().hex, requests_per_minute=1e6, tokens_per_minute=1e9)


@pytest.fixture
def connect(provider: Provider, limiter: RateLimiter) -> Connect:
    """Makes a client of the provider: connect(seconds=1)."""

    def make(patience: Patience | None = None, **changes: Any) -> EmbeddingClient:
        given = {"url": provider.base_url, "key": provider.api_key, "model": MODEL, "dimensions": DIMENSIONS}
        endpoint = Endpoint(**{name: changes.pop(name, value) for name, value in given.items()})
        waits = {name: changes.pop(name) for name in ("seconds", "stop", "on_trouble") if name in changes}
        patience = replace(patience or Patience(seconds=20.0), **waits)
        return EmbeddingClient(endpoint, **({"limiter": limiter, "patience": patience} | changes))

    return make


class TellingLimiter(RateLimiter):
    """Tells what it was asked for.

    Attributes:
        grants: in their order.
        settled: granted and billed tokens of each answer.
        pauses: the pauses after each 429, with its grant.
        waits: where set, no grant may be used for so many seconds.
    """

    def __init__(self, engine: sa.Engine, requests_per_minute: float = 1e6, tokens_per_minute: float = 1e9) -> None:
        super().__init__(engine, uuid.uuid4().hex, requests_per_minute, tokens_per_minute)
        self.grants: list[Grant] = []
        self.settled: list[tuple[int, int]] = []
        self.pauses: list[tuple[Grant, float]] = []
        self.wait_s: float | None = None

    def reserve(self, n_tokens: int) -> Grant:
        grant = super().reserve(n_tokens)
        self.grants.append(grant if self.wait_s is None else replace(grant, wait_s=self.wait_s))
        return self.grants[-1]

    def settle(self, grant: Grant, billed_tokens: int) -> None:
        self.settled.append((grant.n_tokens, billed_tokens))
        super().settle(grant, billed_tokens)

    def slow_down(self, grant: Grant, pause_s: float) -> None:
        self.pauses.append((grant, pause_s))
        super().slow_down(grant, pause_s)


@dataclass(frozen=True)
class NoPatience(Patience):
    """Notes how long it would wait, and does not."""

    seconds: float = 20.0
    waits: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Clients that give a request half a second. Notes how much they would have given."""
    send, timeouts = Transport.send, list[float]()

    async def hurry(self: Transport, request: Any, dialect: Any, timeout_s: float, is_first: bool) -> Any:
        timeouts.append(timeout_s)
        return await send(self, request, dialect, 0.5, is_first)

    monkeypatch.setattr(Transport, "send", hurry)
    return timeouts


@asynccontextmanager
async def dripping_server() -> AsyncIterator[tuple[str, list[str]]]:
    """A server that never ends an answer: a byte every 50 ms. Its URL, and what becomes of its connections."""
    seen: list[str] = []

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append("asked")
        try:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        seen.append("hung up")
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", seen
    finally:
        server.close()


@contextmanager
def provider_of(model: str) -> Iterator[Provider]:
    """A provider that serves another model."""
    command = [sys.executable, "-m", "songvec_assets_tests.provider", "--exit-with-parent", "--model", model]
    pipe, root = subprocess.PIPE, Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout
            yield Provider(process.stdout.readline().split()[-1], "test-key", process.pid)
        finally:
            process.kill()


def use(client: EmbeddingClient, work: Callable[[], Awaitable[Result]]) -> Result:
    """Run `work` in an event loop and close the client."""

    async def run() -> Result:
        try:
            return await work()
        finally:
            await client.close()

    return asyncio.run(run())


def embed(client: EmbeddingClient, *requests: Sequence[str]) -> list[EmbeddingBatch]:
    """Send requests one after another."""

    async def send() -> list[EmbeddingBatch]:
        return [await client.generate_embeddings_batch(texts) for texts in requests]

    return use(client, send)


def embed_together(client: EmbeddingClient, *requests: Sequence[str]) -> list[EmbeddingBatch | BaseException]:
    """Send requests at once; what fails is returned as its error."""

    async def send() -> list[EmbeddingBatch | BaseException]:
        answers = (client.generate_embeddings_batch(texts) for texts in requests)
        return await asyncio.gather(*answers, return_exceptions=True)

    return use(client, send)


def assert_vectors(batch: EmbeddingBatch, texts: Sequence[str] = TEXTS) -> None:
    """Each text has its own vector, in the order of the texts."""
    assert batch.embeddings.dtype == np.float32
    assert batch.embeddings.shape == (len(texts), DIMENSIONS)
    expected = np.array([vector_of(text, DIMENSIONS) for text in texts])
    np.testing.assert_allclose(batch.embeddings, expected, rtol=0, atol=1e-6)


def told(error: BaseException) -> str:
    """The messages of an error and of all that led to it, as a log of the failure shows them."""
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(causes)


def refused_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# What arrives


def test_vectors_arrive_in_the_order_of_the_texts_though_the_provider_reorders(
    connect: Connect, provider: Provider
) -> None:
    provider.control(reorder=True)
    (batch,) = embed(connect(), TEXTS)
    assert_vectors(batch)


@pytest.mark.parametrize(
    ("mode", "faults"),
    [
        ("litellm-ollama", {}),
        ("litellm-ollama", {"refuse_base64_status": 400}),
        ("bge-m3", {}),
        ("bge-m3", {"refuse_dimensions_status": 500, "refuse_dimensions_words": "no such parameters: dimensions={n}"}),
        ("gemini", {"reorder": True}),
        ("int8 base64", {}),
        ("int8 base64", {"base64_of": "float64"}),
        ("int8 base64", {"base64_of": "float64 of all bits"}),
        ("odd usage", {}),
        ("odd usage", {"usage": '{"total_tokens":{n}}'}),
        ("byte order mark", {}),
        ("byte order mark", {"mark": False, "gzip": True, "content_type": "text/html"}),
    ],
)
def test_a_server_of_a_public_report_gives_each_text_its_vector(
    connect: Connect, provider: Provider, mode: str, faults: dict[str, object]
) -> None:
    provider.control(mode=mode, model=MODEL, **faults)
    client = connect()
    (batch,) = embed(client, TEXTS)
    assert_vectors(batch)
    assert batch.n_tokens + client.take_probe_tokens() == provider.ledger()["tokens_billed"]
    assert {count for text, count in provider.texts().items() if text != "probe"} == {1}


@pytest.mark.parametrize("path", ["/api", "/api/embed"])
def test_the_url_of_a_servers_own_api_is_answered_with_the_one_to_set(
    connect: Connect, provider: Provider, path: str
) -> None:
    provider.control(mode="ollama native")
    with pytest.raises(ProviderError) as raised:
        embed(connect(url=provider.base_url.removesuffix("/v1") + path), TEXTS)
    assert type(raised.value) is ProviderError
    assert str(raised.value).endswith((f"={provider.base_url})", f"ends in /v1: {provider.base_url})"))


def test_where_base64_is_refused_the_same_vectors_arrive_as_floats_for_the_life_of_the_client(
    connect: Connect, provider: Provider
) -> None:
    (base64,) = embed(connect(), TEXTS)
    provider.reset_ledger()
    provider.control(refuse_base64=True)
    first, second = embed(connect(), TEXTS, TEXTS)
    np.testing.assert_array_equal(first.embeddings, base64.embeddings)
    np.testing.assert_array_equal(second.embeddings, base64.embeddings)
    assert_vectors(first)
    assert provider.ledger()["requests_by_status"] == {"400": 1, "200": 3}, "one refused probe, one probe, two requests"


def test_where_base64_is_ignored_the_floats_are_read(connect: Connect, provider: Provider) -> None:
    provider.control(ignore_base64=True)
    (batch,) = embed(connect(), TEXTS)
    assert_vectors(batch)
    assert provider.ledger()["requests"] == 2


@pytest.mark.parametrize("fault", ["refuse_dimensions", "ignore_dimensions"])
@pytest.mark.parametrize(
    ("other_fault", "model"),
    [
        ({}, MODEL),
        ({}, "accounts/fireworks/models/qwen3-embedding-8b"),
        ({"refuse_base64": True}, MODEL),
        ({"ignore_base64": True}, MODEL),
    ],
    ids=str,
)
def test_where_dimensions_are_not_served_the_native_vectors_are_cut_and_normalised(
    connect: Connect, provider: Provider, fault: str, other_fault: dict[str, bool], model: str
) -> None:
    provider.control(native_dimensions=256, **{fault: True}, **other_fault)
    batch, again = embed(connect(model=model), TEXTS, TEXTS)
    assert_vectors(batch)
    assert_vectors(again)
    np.testing.assert_allclose(np.linalg.norm(batch.embeddings, axis=1), 1, atol=1e-6)


def test_a_model_not_known_as_matryoshka_is_not_cut(connect: Connect) -> None:
    with provider_of("plain-embedder") as plain:
        plain.control(ignore_dimensions=True, native_dimensions=128)
        client = connect(url=plain.base_url, model="plain-embedder")
        with pytest.raises(ProviderError, match=r"64.*128.*not known.*SONGVEC_EMBEDDING_DIMENSIONS=128"):
            embed(client, TEXTS)
        assert plain.texts() == {"probe": 2}, "only the probes are paid for, base64 and numbers"
        plain.control()
        (batch,) = embed(connect(url=plain.base_url, model="plain-embedder"), TEXTS)
        assert_vectors(batch)


@pytest.mark.parametrize("faults", [{}, {"ignore_dimensions": True}, {"refuse_dimensions": True}])
def test_a_native_size_that_is_too_small_is_refused(
    connect: Connect, provider: Provider, faults: dict[str, bool]
) -> None:
    provider.control(native_dimensions=32, **faults)
    with pytest.raises(ProviderError, match=r"expected vectors of 64 values.*32.*SONGVEC_EMBEDDING_DIMENSIONS=32"):
        embed(connect(), TEXTS)
    assert set(provider.texts()) == {"probe"}


def test_a_model_that_changes_its_size_in_the_middle_ends_the_run(connect: Connect, provider: Provider) -> None:
    client = connect()

    async def work() -> None:
        assert_vectors(await client.generate_embeddings_batch(TEXTS))
        provider.control(ignore_dimensions=True, native_dimensions=128)
        with pytest.raises(ProviderError, match="64 values as before, got 128: another server answers"):
            await client.generate_embeddings_batch(TEXTS)

    use(client, work)


def test_the_probe_is_sent_once_a_client(connect: Connect, provider: Provider) -> None:
    client = connect()
    assert client.n_probe_tokens >= count_tokens("probe"), "to be reserved before it is sent"

    async def work() -> None:
        answers = (client.generate_embeddings_batch([text]) for text in TEXTS[:8])
        for text, batch in zip(TEXTS, await asyncio.gather(*answers), strict=False):
            assert_vectors(batch, [text])
        assert_vectors(await client.generate_embeddings_batch(TEXTS))

    use(client, work)
    assert provider.texts()["probe"] == 1
    assert client.n_probe_tokens == 0
    assert provider.ledger()["requests"] == 1 + 8 + 1


def test_the_tokens_told_are_those_billed_the_probe_included(connect: Connect, provider: Provider) -> None:
    client = connect()
    batches = embed(client, TEXTS, TEXTS[:3], ["la " * 1000])
    n_tokens = [batch.n_tokens for batch in batches]
    assert sum(n_tokens) + client.take_probe_tokens() == provider.ledger()["tokens_billed"]
    assert client.take_probe_tokens() == 0, "they are counted once"
    assert batches[1].n_tokens == sum(map(count_tokens, TEXTS[:3]))


def test_the_probes_tokens_are_told_though_the_first_request_is_refused(connect: Connect, provider: Provider) -> None:
    provider.control(poison=["POISON"])
    client = connect()

    async def work() -> int:
        with pytest.raises(RequestRefusedError):
            await client.generate_embeddings_batch(["POISON"])
        return client.take_probe_tokens()

    assert use(client, work) == provider.ledger()["tokens_billed"]


def test_the_estimator_learns_from_what_is_billed(connect: Connect) -> None:
    estimator = TokenEstimator()
    before = estimator.estimate([12_000])
    embed(connect(estimator=estimator), ["海" * 40_000])
    assert before == [3000]
    assert estimator.estimate([12_000])[0] == pytest.approx(1000, rel=0.1), "12 bytes a token here"


# What each status means


def test_every_status_of_the_table_is_tested_here() -> None:
    assert {*TRIED_AGAIN, *REFUSED, *MOVED, *ADVICE} == {*RETRIED, *REFUSALS, *REDIRECTS, *ENDS}


@pytest.mark.parametrize("status", [*TRIED_AGAIN, *REFUSED, *ADVICE, *UNKNOWN])
def test_each_status_does_what_the_facts_say_of_it(connect: Connect, provider: Provider, status: int) -> None:
    """Those that are tried again succeed afterwards; the others raise after the probe and one request."""
    body = {"error": {"message": "told words", "code": "TOLD"}}
    rule = {"status": status, "count": 2, "after": 2, "retry_after_s": 0, "body": body}
    provider.control(statuses=[rule])
    client = connect()
    if status in TRIED_AGAIN + UNKNOWN:
        (batch,) = embed(client, TEXTS)
        assert_vectors(batch)
        assert batch.n_retries == 2
        assert batch.n_limited == (2 if status == 429 else 0)
        assert provider.ledger()["requests_by_status"] == {"200": 2, str(status): 2}
        assert provider.ledger()["texts_billed_twice"] == 0
        return
    expected = RequestTooLargeError if status == 413 else RequestRefusedError if status in REFUSED else ProviderError
    with pytest.raises(ProviderError) as caught:
        embed(client, TEXTS)
    assert type(caught.value) is expected
    assert f"answered {status}" in str(caught.value)
    assert "told words" in str(caught.value)
    assert ADVICE.get(status, "") in str(caught.value)
    assert provider.ledger()["requests_by_status"] == {"200": 1, str(status): 1}


@pytest.mark.parametrize(("status", "is_billed"), [(429, False), (504, True)])
def test_each_try_without_an_answer_is_told_with_what_it_may_have_cost(
    connect: Connect, provider: Provider, status: int, is_billed: bool
) -> None:
    provider.control(statuses=[{"status": status, "count": 2, "after": 2, "retry_after_s": 0}])
    client, told = connect(), []

    class Noting(RequestHooks):
        def count_unusable(self, n_tokens: int) -> None:
            told.append(n_tokens > 0)

    use(client, lambda: client.generate_embeddings_batch(TEXTS, Noting()))
    assert told == [is_billed] * 2


@pytest.mark.parametrize("status", ADVICE)
def test_a_status_that_ends_the_run_ends_it_at_the_probe(connect: Connect, provider: Provider, status: int) -> None:
    provider.control(statuses=[{"status": status, "body": {"error": {"message": "told words"}}}])
    with pytest.raises(ProviderError, match="told words") as caught:
        embed(connect(), TEXTS)
    assert type(caught.value) is ProviderError
    assert ADVICE[status] in str(caught.value)
    assert provider.ledger()["requests"] == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_probe_that_fails_for_a_while_is_tried_again_as_it_was(
    connect: Connect, provider: Provider, status: int
) -> None:
    provider.control(statuses=[{"status": status, "count": 1, "retry_after_s": 0}])
    (batch,) = embed(connect(), TEXTS)
    assert_vectors(batch)
    assert provider.ledger()["requests_by_status"] == {str(status): 1, "200": 2}


@pytest.mark.parametrize("status", REFUSED)
def test_a_provider_that_refuses_even_the_probe_ends_the_run_with_its_words(
    connect: Connect, provider: Provider, status: int
) -> None:
    provider.control(statuses=[{"status": status, "body": {"error": {"message": "told words"}}}])
    with pytest.raises(ProviderError, match=r"refuses even one short text.*told words") as caught:
        embed(connect(), TEXTS)
    assert type(caught.value) is ProviderError
    assert provider.ledger()["requests"] == 4, "with and without base64 and dimensions"


def test_a_refused_request_leaves_the_next_one_alone(connect: Connect, provider: Provider) -> None:
    provider.control(poison=["POISON"])
    client = connect()

    async def work() -> None:
        with pytest.raises(RequestRefusedError, match="content filter"):
            await client.generate_embeddings_batch([*TEXTS, "POISON"])
        batch = await client.generate_embeddings_batch(TEXTS)
        assert_vectors(batch)
        assert (batch.n_retries, batch.n_limited) == (0, 0)

    use(client, work)


def test_a_retired_model_reads_as_such(connect: Connect, provider: Provider) -> None:
    with pytest.raises(ProviderError, match=r"Model not found.*retired.*SONGVEC_EMBEDDING_MODEL"):
        embed(connect(model="fireworks/retired"), TEXTS)


def test_one_refusal_of_the_account_is_enough_for_all_requests_in_flight(connect: Connect, provider: Provider) -> None:
    provider.control(statuses=[{"status": 412}])
    answers = embed_together(connect(), *([text] for text in TEXTS[:8]))
    assert {type(answer) for answer in answers} == {ProviderError}
    assert provider.ledger()["requests"] == 1


# Trying again


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(connect: Connect, provider: Provider, status: int) -> None:
    provider.control(statuses=[{"status": status, "count": 1, "after": 2, "retry_after_s": 0.7}])
    started = time.monotonic()
    (batch,) = embed(connect(), TEXTS)
    assert_vectors(batch)
    assert time.monotonic() - started >= 0.7


def test_a_429_holds_back_every_client_of_the_quota(connect: Connect, provider: Provider, engine: sa.Engine) -> None:
    name = uuid.uuid4().hex
    one, other = (RateLimiter(engine, name, requests_per_minute=1e6, tokens_per_minute=1e9) for _ in range(2))
    provider.control(statuses=[{"status": 429, "after": 2, "retry_after_s": 60}])
    with pytest.raises(ProviderUnavailableError):
        embed(connect(limiter=one, seconds=10), TEXTS)
    assert 40 < other.reserve(1).wait_s <= 61


def test_a_429_without_retry_after_holds_back_for_a_second(connect: Connect, provider: Provider) -> None:
    provider.control(statuses=[{"status": 429, "count": 1, "after": 2}])
    started = time.monotonic()
    embed(connect(), TEXTS)
    assert time.monotonic() - started > 0.9


def test_a_429_that_names_no_time_pauses_all_for_a_second_then_two_then_four_then_five(
    connect: Connect, provider: Provider, engine: sa.Engine
) -> None:
    provider.control(statuses=[{"status": 429, "count": 5, "after": 2}])
    limiter, heard = TellingLimiter(engine), list[str]()
    patience = NoPatience()
    client = connect(patience, limiter=limiter, on_trouble=heard.append)

    async def work() -> None:
        batch = await client.generate_embeddings_batch(TEXTS)
        assert_vectors(batch)
        assert (batch.n_retries, batch.n_limited) == (5, 5)
        provider.control(statuses=[{"status": 429, "count": 1}])
        assert (await client.generate_embeddings_batch(TEXTS)).n_limited == 1

    use(client, work)
    assert [pause_s for _, pause_s in limiter.pauses] == [1, 2, 4, 5, 5, 1], "a good answer ends the row"
    assert [grant for grant, _ in limiter.pauses] == [*limiter.grants[1:6], limiter.grants[7]]
    assert [wait_s for wait_s in patience.waits if wait_s in (1, 2, 4, 5)] == [1, 2, 4, 5, 5, 1], "its own wait as well"
    assert [note.partition("next try in ")[2].partition(" s")[0] for note in heard] == list("124551")


def test_several_429s_of_requests_that_were_granted_before_count_once(
    connect: Connect, provider: Provider, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = TellingLimiter(engine)
    client = connect(NoPatience(), limiter=limiter)

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(statuses=[{"status": 429, "count": 12}])
        send, together = Transport.send, asyncio.Barrier(4)

        async def send_together(*given: Any) -> Any:
            await together.wait()
            return await send(*given)

        monkeypatch.setattr(Transport, "send", send_together)
        batches = await asyncio.gather(*(client.generate_embeddings_batch([text]) for text in TEXTS[:4]))
        assert [batch.n_limited for batch in batches] == [3] * 4

    use(client, work)
    assert [pause_s for _, pause_s in limiter.pauses] == [1] * 4 + [2] * 4 + [4] * 4


@pytest.mark.parametrize("retry_after_s", [0.2, 30.0])
def test_a_429_that_names_a_time_pauses_all_for_that_long(
    connect: Connect, provider: Provider, engine: sa.Engine, retry_after_s: float
) -> None:
    provider.control(statuses=[{"status": 429, "count": 3, "after": 2, "retry_after_s": retry_after_s}])
    limiter = TellingLimiter(engine)
    client = connect(NoPatience(), limiter=limiter, seconds=100)
    assert_vectors(embed(client, TEXTS)[0])
    assert [pause_s for _, pause_s in limiter.pauses] == [retry_after_s] * 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("20", 20.0), ("0.5", 0.5), ("-1", 0.0), ("", None), ("soon", None), ("nan", None), ("1e9", 600.0)),
        ("Sun, 29 Nov 2026 12:00:20 GMT", 20.0),
        ("Sunday, 29-Nov-26 12:00:20 GMT", 20.0),
        ("Sun, 29 Nov 2026 11:59:00 GMT", 0.0),
        ("Sun, 29 Nov 2026 12:00:20", None),
    ],
)
def test_a_time_to_wait_is_a_number_or_a_date_by_the_servers_clock(value: str, seconds: float | None) -> None:
    assert parse_retry_after(value, "Sun, 29 Nov 2026 12:00:00 GMT") == seconds


def test_a_429_that_names_a_date_pauses_all_until_then(connect: Connect, provider: Provider, engine: sa.Engine) -> None:
    statuses = [{"status": 429, "count": 3, "after": 2, "retry_after_s": 90}]
    provider.control(statuses=statuses, retry_after_date=True)
    limiter = TellingLimiter(engine)
    client = connect(NoPatience(), limiter=limiter, seconds=200)
    assert_vectors(embed(client, TEXTS)[0])
    assert [60 < pause_s <= 90 for _, pause_s in limiter.pauses] == [True] * 3, limiter.pauses


def test_a_429_that_allows_the_next_try_at_once_is_not_answered_by_a_flood(
    connect: Connect, provider: Provider, engine: sa.Engine
) -> None:
    """Such a server would hear from each request as often as it answers."""
    provider.control(statuses=[{"status": 429, "count": 8, "after": 2, "retry_after_s": 0}])
    patience = NoPatience()
    embed(connect(patience, limiter=TellingLimiter(engine)), TEXTS)
    assert sum(wait_s > 0 for wait_s in patience.waits) >= 4


def test_a_provider_that_only_answers_429_ends_the_patience_and_not_the_database(
    connect: Connect, provider: Provider, engine: sa.Engine
) -> None:
    """Ten minutes of it are some 120 pauses of five seconds."""
    provider.control(statuses=[{"status": 429, "count": 120}])
    (batch,) = embed(connect(NoPatience(), limiter=TellingLimiter(engine)), TEXTS)
    assert_vectors(batch)


def test_other_trouble_than_a_429_does_not_slow_the_quota_down(
    connect: Connect, provider: Provider, engine: sa.Engine
) -> None:
    limiter = TellingLimiter(engine)
    provider.control(statuses=[{"status": status, "count": 1, "after": 2} for status in (500, 503, 408)], seed=1)
    (batch,) = embed(connect(limiter=limiter), TEXTS)
    assert (batch.n_retries, limiter.pauses) == (3, [])


def test_each_bad_answer_is_told_with_what_is_done_about_it(connect: Connect, provider: Provider) -> None:
    body = {"error": {"message": f"told words to {provider.api_key}"}}
    statuses = [
        {"status": 503, "count": 2, "after": 2, "body": body, "retry_after_s": 0.01},
        {"status": 429, "count": 1, "after": 2, "retry_after_s": 0.01},
    ]
    provider.control(statuses=statuses)
    heard: list[str] = []
    first, _ = embed(connect(on_trouble=heard.append), TEXTS, TEXTS)
    assert first.n_retries == len(heard) == 3
    assert all("answered 503: " in note and "told words to [key]" in note for note in heard[:2])
    assert "answered 429: " in heard[2]
    assert all(re.search(r"; next try in 0 s, for (1\d|20) s at most$", note) for note in heard)


@pytest.mark.parametrize(
    ("faults", "words"),
    [({"corrupt": "zero"}, "zero, null or not finite"), ({"truncate": 1.0}, ""), ({"reset": 1.0}, "")],
    ids=str,
)
def test_a_bad_answer_without_a_status_is_told_too(
    connect: Connect, provider: Provider, faults: dict[str, object], words: str
) -> None:
    provider.control(**faults)
    heard: list[str] = []
    with pytest.raises(ProviderUnavailableError):
        embed(connect(on_trouble=heard.append, seconds=0.1), TEXTS)
    assert heard
    assert all(words in note and not note.startswith(";") for note in heard)


def test_where_all_is_well_no_trouble_is_told(connect: Connect, provider: Provider) -> None:
    provider.control(poison=["POISON"])
    heard: list[str] = []
    embed_together(connect(on_trouble=heard.append), TEXTS, ["POISON"])
    assert heard == []


@pytest.mark.usefixtures("hasty")
def test_a_server_that_drips_is_hung_up_on_and_asked_again(connect: Connect) -> None:
    """A byte now and then ends no timeout of reading."""
    heard: list[str] = []

    async def run() -> None:
        async with dripping_server() as (base_url, seen):
            client = connect(url=base_url, seconds=0.7, on_trouble=heard.append)
            with pytest.raises(ProviderUnavailableError, match=r"last: no whole answer within"):
                await client.generate_embeddings_batch(TEXTS)
            await client.close()
            async with asyncio.timeout(10):
                while seen.count("hung up") < seen.count("asked"):
                    await asyncio.sleep(0.01)
            assert seen.count("asked") == len(heard) + 1 >= 2

    asyncio.run(run())


@pytest.mark.usefixtures("hasty")
def test_a_server_that_stalls_is_asked_again(connect: Connect, provider: Provider) -> None:
    client = connect()

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(stall=0.5, seed=2)
        batches = [await client.generate_embeddings_batch([text]) for text in TEXTS[:4]]
        assert sum(batch.n_retries for batch in batches) > 0
        for text, batch in zip(TEXTS, batches, strict=False):
            assert_vectors(batch, [text])

    use(client, work)


def test_a_larger_request_has_more_time(connect: Connect, hasty: list[float]) -> None:
    embed(connect(), ["x" * 40_000])
    [probe_s, large_s] = hasty
    assert probe_s == 600, "a server may load its model for the first request"
    assert large_s == pytest.approx(60 + 10_000 / 200, rel=0.1)


def test_every_try_counts_against_the_quota(connect: Connect, provider: Provider, engine: sa.Engine) -> None:
    provider.control(statuses=[{"status": 500, "count": 3, "after": 2}])
    limiter = TellingLimiter(engine)
    embed(connect(limiter=limiter), TEXTS)
    assert len(limiter.grants) == provider.ledger()["requests"] == 1 + 3 + 1
    assert len(set(limiter.grants)) == 5, "each a place of its own"
    assert len({grant.n_tokens for grant in limiter.grants[1:]}) == 1


def test_requests_keep_to_the_quota(connect: Connect, engine: sa.Engine) -> None:
    """A full bucket lets ten go at once; the others go as it fills."""
    limiter = RateLimiter(engine, uuid.uuid4().hex, requests_per_minute=500, tokens_per_minute=1e9)
    started = time.monotonic()
    batches = embed_together(connect(limiter=limiter), *([text] for text in TEXTS[:14]))
    assert {type(batch) for batch in batches} == {EmbeddingBatch}
    assert time.monotonic() - started > 4.9 * 60 / 490


def test_one_request_at_a_time_waits_for_the_quota(connect: Connect, provider: Provider, engine: sa.Engine) -> None:
    """Places are granted no further ahead, so that a pause reaches all the others."""
    limiter, stop = TellingLimiter(engine), StopSignal()
    client = connect(limiter=limiter, stop=stop)

    async def work() -> list[EmbeddingBatch | BaseException]:
        await client.generate_embeddings_batch(["first"])
        limiter.wait_s = 60
        answers = [asyncio.ensure_future(client.generate_embeddings_batch([text])) for text in TEXTS[:5]]
        while len(limiter.grants) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        stop.set()
        return await asyncio.gather(*answers, return_exceptions=True)

    assert {type(answer) for answer in use(client, work)} == {StoppedError}
    assert len(limiter.grants) == 2 + 1
    assert provider.ledger()["requests"] == 2


def test_requests_in_flight_do_not_keep_others_from_the_quota(
    connect: Connect, provider: Provider, limiter: RateLimiter
) -> None:
    client = connect()

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(hold_after=0)
        answers = [asyncio.ensure_future(client.generate_embeddings_batch([text])) for text in TEXTS[:4]]
        await asyncio.to_thread(wait_until, lambda: provider.count_in_flight() == 4)
        provider.control()
        await asyncio.gather(*answers)

    use(client, work)


def test_what_is_billed_corrects_the_grant(connect: Connect, provider: Provider, engine: sa.Engine) -> None:
    limiter = TellingLimiter(engine)
    _, batch = embed(connect(limiter=limiter), ["first"], ["海" * 40_000])
    granted = [grant.n_tokens for grant in limiter.grants]
    assert granted[2] > 2 * batch.n_tokens, "12 bytes a token here, 4 until that is known"
    assert [each for each, _ in limiter.settled] == granted
    assert sum(billed for _, billed in limiter.settled) == provider.ledger()["tokens_billed"]
    assert limiter.settled[2] == (granted[2], batch.n_tokens)


def test_the_bytes_of_a_request_are_made_once(
    connect: Connect, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[str]] = []

    def encode(model: str, texts: Sequence[str], *rest: object) -> bytes:
        made.append(texts)
        return encode_request(model, texts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(client_module, "encode_request", encode)
    provider.control(statuses=[{"status": 503, "count": 3, "after": 2}])
    (batch,) = embed(connect(), TEXTS)
    assert_vectors(batch)
    assert batch.n_retries == 3
    assert made == [["probe"], TEXTS]


@pytest.mark.parametrize(
    "fault", [{"reset": 0.5, "reset_when": "before"}, {"reset": 0.5, "reset_when": "after"}, {"truncate": 0.5}], ids=str
)
def test_a_broken_connection_is_tried_again(connect: Connect, provider: Provider, fault: dict[str, object]) -> None:
    provider.control(seed=1, **fault)
    batches = embed(connect(), *[TEXTS] * 4)
    for batch in batches:
        assert_vectors(batch)
    assert sum(batch.n_retries for batch in batches) > 0
    assert sum(batch.n_limited for batch in batches) == 0


@pytest.mark.parametrize("corruption", ["drop_item", "duplicate_index", "wrong_size", "bad_base64", "not_json"])
def test_a_corrupt_answer_is_tried_again_and_never_returned(
    connect: Connect, provider: Provider, corruption: str
) -> None:
    client = connect()

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(seed=3, corrupt=corruption, corrupt_share=0.5)
        batches = [await client.generate_embeddings_batch(TEXTS) for _ in range(4)]
        for batch in batches:
            assert_vectors(batch)
        assert sum(batch.n_retries for batch in batches) > 0

    use(client, work)


@pytest.mark.parametrize("corruption", ["nan", "zero"])
def test_a_text_that_gets_no_vector_is_named_and_its_neighbours_have_theirs(
    connect: Connect, provider: Provider, corruption: str
) -> None:
    client = connect()

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(seed=3, corrupt=corruption)
        batch = await client.generate_embeddings_batch(TEXTS)
        assert batch.n_retries == 0
        (bad,) = batch.bad
        assert np.isnan(batch.embeddings[bad]).all()
        good = [row for row in range(len(TEXTS)) if row != bad]
        expected = np.array([vector_of(TEXTS[row], DIMENSIONS) for row in good])
        np.testing.assert_allclose(batch.embeddings[good], expected, rtol=0, atol=1e-6)

    use(client, work)


def test_a_lone_vector_of_a_wrong_size_is_never_returned(connect: Connect, provider: Provider) -> None:
    client = connect()

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(corrupt="wrong_size")
        with pytest.raises(ProviderError):
            await client.generate_embeddings_batch(["alone"])

    use(client, work)


def test_the_waits_double_up_to_the_patience(
    connect: Connect, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 60.0)
    longest: list[float] = []

    def draw(low: float, high: float) -> float:
        assert low == 0
        longest.append(high)
        return high

    monkeypatch.setattr(random, "uniform", draw)
    provider.control(statuses=[{"status": 503}])
    with pytest.raises(ProviderUnavailableError):
        embed(connect(seconds=1.2), TEXTS)
    assert longest == [0.5, 1.0]
    assert provider.ledger()["requests"] == 2


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"statuses": [{"status": 503, "body": {"error": {"message": "told words"}}}]}, r"503.*told words"),
        ({"statuses": [{"status": 429, "retry_after_s": 0}]}, "429.*told to fail"),
        ({"corrupt": "nan"}, "finite"),
        ({"truncate": 1.0}, ""),
        ({"reset": 1.0}, ""),
    ],
    ids=str,
)
def test_patience_ends_with_what_was_heard_last(
    connect: Connect, provider: Provider, faults: dict[str, object], words: str
) -> None:
    provider.control(**faults)
    started = time.monotonic()
    with pytest.raises(ProviderUnavailableError, match=rf"for 0.5 s \(SONGVEC_PATIENCE_S\), last: .*{words}") as caught:
        embed(connect(seconds=0.5), TEXTS)
    assert not str(caught.value).partition("last: ")[2].startswith("."), "it names what was heard"
    assert time.monotonic() - started < 10
    assert provider.ledger()["requests"] > 1


def test_a_server_that_is_not_there_is_named_when_patience_ends(connect: Connect) -> None:
    base_url = f"http://127.0.0.1:{refused_port()}/v1"
    with pytest.raises(ProviderUnavailableError, match=base_url):
        embed(connect(url=base_url, seconds=0.2), TEXTS)


def test_a_retry_after_beyond_the_patience_is_not_waited_for(connect: Connect, provider: Provider) -> None:
    provider.control(statuses=[{"status": 503, "retry_after_s": 30}])
    started = time.monotonic()
    with pytest.raises(ProviderUnavailableError):
        embed(connect(seconds=20), TEXTS)
    assert time.monotonic() - started < 5


def test_the_patience_is_that_of_a_request_not_spent_again_by_each_that_waits(
    connect: Connect, provider: Provider
) -> None:
    provider.control(statuses=[{"status": 503}])
    started = time.monotonic()
    answers = embed_together(connect(seconds=0.6), *([text] for text in TEXTS[:8]))
    assert {type(answer) for answer in answers} == {ProviderUnavailableError}
    assert time.monotonic() - started < 3, "eight requests that begin together end together"


def test_a_provider_that_was_down_is_probed_again_by_a_later_request(connect: Connect, provider: Provider) -> None:
    client = connect(seconds=0.2)

    async def work() -> None:
        provider.control(statuses=[{"status": 503}])
        with pytest.raises(ProviderUnavailableError):
            await client.generate_embeddings_batch(TEXTS)
        provider.control()
        assert_vectors(await client.generate_embeddings_batch(TEXTS))

    use(client, work)


# Stopping


def test_the_stop_signal_ends_a_backoff_at_once(connect: Connect, provider: Provider) -> None:
    provider.control(statuses=[{"status": 503, "retry_after_s": 30}])
    stop = StopSignal()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        # within the backoff, however long the first try took
        embed(connect(stop=stop, seconds=600, on_trouble=lambda _: threading.Timer(0.3, stop.set).start()), TEXTS)
    assert time.monotonic() - started < 20, "the backoff is of 30 s"
    assert provider.ledger()["requests"] == 1


def test_the_stop_signal_ends_waiting_for_the_quota_at_once(
    connect: Connect, provider: Provider, engine: sa.Engine
) -> None:
    limiter = RateLimiter(engine, uuid.uuid4().hex, requests_per_minute=1, tokens_per_minute=1e9)
    limiter.reserve(1)
    stop = StopSignal()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    answers = embed_together(connect(stop=stop, limiter=limiter), *([text] for text in TEXTS[:5]))
    assert {type(answer) for answer in answers} == {StoppedError}
    assert time.monotonic() - started < 5
    assert provider.ledger()["requests"] == 0


def test_a_request_in_flight_is_left_to_end_and_no_further_one_goes(connect: Connect, provider: Provider) -> None:
    stop = StopSignal()
    client = connect(stop=stop)

    async def work() -> None:
        await client.generate_embeddings_batch(["first"])
        provider.control(hold_after=0)
        answer = asyncio.ensure_future(client.generate_embeddings_batch(TEXTS))
        await asyncio.to_thread(wait_until, lambda: provider.count_in_flight() == 1)
        stop.set()
        await asyncio.sleep(0.5)  # long enough to give it up, were the stop looked at
        provider.control()
        assert_vectors(await answer)
        with pytest.raises(StoppedError):
            await client.generate_embeddings_batch(["last"])

    use(client, work)
    assert set(provider.texts()) == {"probe", "first", *TEXTS}


# The key


def test_a_wrong_key_is_not_told(connect: Connect) -> None:
    with pytest.raises(ProviderError, match="FIREWORKS_API_KEY") as caught:
        embed(connect(key="fw_secret"), TEXTS)
    assert "fw_secret" not in told(caught.value)


def test_the_key_is_not_told_where_no_server_answers(connect: Connect) -> None:
    with pytest.raises(ProviderUnavailableError) as caught:
        embed(connect(key="fw_secret", url=f"http://127.0.0.1:{refused_port()}/v1", seconds=0.1), TEXTS)
    assert "fw_secret" not in told(caught.value)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_the_key_is_not_told_though_the_server_repeats_it(connect: Connect, provider: Provider, status: int) -> None:
    """A gateway in between may say which key it was given. Dagster keeps the whole chain of errors in its event log."""
    words = {"error": {"message": f"no: {provider.api_key} is not welcome"}}
    provider.control(statuses=[{"status": status, "after": 2, "body": words}])
    with pytest.raises(ProviderError, match="is not welcome") as caught:
        embed(connect(seconds=0.2), TEXTS)
    assert provider.api_key not in told(caught.value)
