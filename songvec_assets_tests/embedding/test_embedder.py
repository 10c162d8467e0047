"""The interface of an embedder, and the values that a client is made of."""

import asyncio

import pytest

from songvec_assets.embedding.embedder import NO_HOOKS, Endpoint, Patience
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.errors import StoppedError, VectorSizeError
from songvec_assets.progress import StopSignal

QWEN = "fireworks/qwen3-embedding-8b"


def endpoint(model: str = QWEN, dimensions: int = 2000, truncate: bool | None = None) -> Endpoint:
    return Endpoint("http://127.0.0.1:9/v1", "fw_key", model, dimensions, truncate)


@pytest.mark.parametrize(
    ("made", "n_values"),
    [
        (endpoint(), 2000),
        (endpoint(), 4096),
        (endpoint("some/model", truncate=True), 4096),
        (endpoint("some/model"), 2000),
    ],
)
def test_vectors_of_the_size_and_longer_ones_that_may_be_cut_are_taken(made: Endpoint, n_values: int) -> None:
    made.check_size(n_values)


@pytest.mark.parametrize(
    ("made", "n_values", "words", "not_said"),
    [
        (endpoint("some/model"), 2048, "is not known to be trained for truncation", "DIMENSIONS=2001"),
        (endpoint("some/model"), 2048, "SONGVEC_EMBEDDING_DIMENSIONS=2048 and SONGVEC_VECTOR_TYPE=halfvec", "nothing"),
        (endpoint("some/model"), 4096, "SONGVEC_TRUNCATE=yes", "SONGVEC_EMBEDDING_DIMENSIONS"),
        (endpoint(truncate=False), 4096, "is not to be truncated", "not known"),
        (endpoint(), 1024, "set SONGVEC_EMBEDDING_DIMENSIONS=1024", "SONGVEC_TRUNCATE"),
    ],
)
def test_other_sizes_are_refused_with_what_can_be_set(made: Endpoint, n_values: int, words: str, not_said: str) -> None:
    with pytest.raises(VectorSizeError, match=f"gives {n_values}") as refused:
        made.check_size(n_values)
    assert words in str(refused.value)
    assert not_said not in str(refused.value)


def test_the_key_is_in_no_words_of_the_server() -> None:
    assert endpoint().redact("fw_key is wrong: fw_key") == "[key] is wrong: [key]"
    assert Endpoint("http://127.0.0.1:9/v1", None, QWEN, 64).redact("None") == "None"


def test_a_sleep_ends_when_the_run_is_stopped() -> None:
    stop = StopSignal()
    patience = Patience(stop=stop)

    async def sleep() -> None:
        sleeping = asyncio.create_task(patience.sleep(3600))
        await asyncio.sleep(0)
        stop.set()
        with pytest.raises(StoppedError):
            await sleeping
        with pytest.raises(StoppedError):
            await patience.sleep(0)

    asyncio.run(sleep())


def test_a_local_model_has_no_quota_no_probe_and_always_answers() -> None:
    embedder = OfflineEmbedder(64)
    assert (embedder.quota_used, embedder.n_probe_tokens, embedder.take_probe_tokens()) == (None, 0, 0)

    async def ask() -> bool:
        await embedder.close()
        return await embedder.answers_well(0.0)

    assert asyncio.run(ask())


def test_hooks_that_nobody_gave_do_nothing() -> None:
    async def call() -> None:
        await NO_HOOKS.before_try()
        await NO_HOOKS.before_send()

    asyncio.run(call())
    NO_HOOKS.check_size()
    NO_HOOKS.count_unusable(7)
    assert not NO_HOOKS.is_part
