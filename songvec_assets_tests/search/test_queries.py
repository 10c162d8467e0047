"""A query's vector: its text, its price, and errors of the server that is asked."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import BudgetExceededError, ProviderError, SettingsError, TableMismatchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.search import queries
from songvec_assets.search.queries import embed_queries
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider, running_provider
from songvec_assets_tests.vectors.conftest import DIMENSIONS


class RecordingEmbedder:
    """Keeps the texts that it was given; the only fake here, in the place of a provider."""

    def __init__(self, error: Exception | None = None) -> None:
        self.texts: list[str] = []
        self.closed = False
        self._error = error

    async def generate_embeddings_batch(self, texts: Sequence[str]) -> EmbeddingBatch:
        """One vector of ones for each text."""
        await asyncio.sleep(0)
        self.texts += texts
        if self._error:
            raise self._error
        return EmbeddingBatch(np.ones((len(texts), DIMENSIONS), dtype=np.float32), n_tokens=1)

    async def close(self) -> None:
        """Note that it was closed."""
        self.closed = True


def test_a_query_is_asked_within_its_prompt() -> None:
    embedder = RecordingEmbedder()
    vectors = embed_queries(embedder, ["{query} at sea"], "Q: {query}?")
    assert embedder.texts == ["Q: {query} at sea?"]
    assert (vectors.shape, vectors.dtype, embedder.closed) == ((1, DIMENSIONS), np.float32, True)


def test_without_a_prompt_a_query_is_its_words_alone() -> None:
    offline = OfflineEmbedder(64)
    expected = asyncio.run(offline.generate_embeddings_batch(["a storm at sea"])).embeddings
    np.testing.assert_array_equal(embed_queries(offline, ["a storm at sea"], None), expected)


def test_an_embedder_that_fails_is_closed_too() -> None:
    embedder = RecordingEmbedder(ProviderError("the key is wrong"))
    with pytest.raises(ProviderError, match="the key is wrong"):
        embed_queries(embedder, ["a storm at sea"], None)
    assert embedder.closed


@pytest.fixture
def begin(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> Callable[..., Pipeline]:
    """Begins a search, with some settings, of a table of three songs by the provider's model."""
    songs(*((song_id, f"Tune {song_id}", "Ann", "la") for song_id in range(1, 4)))
    pipeline = make_pipeline(database, provider, tmp_path / "store")
    pipeline.export()
    pipeline.filler().fill_ranges(pipeline.held_ranges(), lambda _: None)
    pipeline.load()
    return lambda server=provider, **settings: make_pipeline(database, server, tmp_path / "store", **settings)


TABLE_MODEL = "fireworks/qwen3-embedding-8b"
MINILM = "all-minilm"


def test_another_server_for_which_the_settings_are_right_is_named_with_the_tables_model(
    begin: Callable[..., Pipeline],
) -> None:
    with running_provider(model=MINILM, native_dimensions=384) as other:
        searching = begin(other, embedding_model=MINILM, embedding_dimensions=384)
        with pytest.raises(TableMismatchError) as refusal:
            searching.embed_query("waves")
    for words in (
        f"vector(64) by '{TABLE_MODEL}'",
        other.base_url,
        f"'{MINILM}' (384)",
        "songvec swap",
        "answered 404",
    ):
        assert words in str(refusal.value)


def test_another_server_that_answers_for_any_model_in_its_own_size_is_not_a_reason_to_change_the_dimensions(
    begin: Callable[..., Pipeline], provider: Provider
) -> None:
    provider.control(ignore_dimensions=True, native_dimensions=32)
    with pytest.raises(TableMismatchError) as refusal:
        begin().embed_query("waves")
    for words in (f"vector(64) by '{TABLE_MODEL}'", provider.base_url, "vectors of another size than 64"):
        assert words in str(refusal.value)
    assert "SONGVEC_EMBEDDING_DIMENSIONS=32" not in str(refusal.value)


def test_a_wrong_key_is_a_wrong_key(begin: Callable[..., Pipeline]) -> None:
    for settings in ({}, {"vector_type": "halfvec"}):
        with pytest.raises(ProviderError, match="FIREWORKS_API_KEY"):
            begin(fireworks_api_key="wrong", **settings).embed_query("waves")


def test_bytes_that_are_no_text_are_refused_before_anything_is_sent() -> None:
    embedder = RecordingEmbedder()
    with pytest.raises(SettingsError, match="not valid UTF-8"):
        embed_queries(embedder, ["caf\udce9"], None)
    assert (embedder.texts, embedder.closed) == ([], True)


DOLLAR_A_TOKEN = {"usd_per_million_tokens": 1e6}
SPENT = "SELECT split_part(name, ' ', 1), usd::float, reserved_usd::float FROM songvec.budgets ORDER BY name"


class TestTheBill:
    """Searches count in the month, and in a budget of their own, from whichever door."""

    def test_is_what_the_provider_billed(self, begin: Callable[..., Pipeline], provider: Provider) -> None:
        searching = begin(**DOLLAR_A_TOKEN)
        execute(searching.database.adbc_uri, "DELETE FROM songvec.budgets")
        provider.reset_ledger()
        searching.search("waves at sea")
        billed = provider.ledger()["tokens_billed"]
        assert billed > 0
        assert execute(searching.database.adbc_uri, SPENT) == [("month", billed, 0), ("searches", billed, 0)]
        searching.search("Tune 1", mode="text")
        searching.search(1)
        assert execute(searching.database.adbc_uri, SPENT)[0] == ("month", billed, 0)

    @pytest.mark.parametrize("limit", ["max_search_usd_a_month", "max_usd_a_month"])
    def test_stays_within_each_limit(self, begin: Callable[..., Pipeline], provider: Provider, limit: str) -> None:
        searching = begin(**DOLLAR_A_TOKEN, **{limit: 0.5})
        execute(searching.database.adbc_uri, "DELETE FROM songvec.budgets")
        provider.reset_ledger()
        with pytest.raises(BudgetExceededError, match=f"raise SONGVEC_{limit.upper()} or wait for the next month"):
            searching.search("waves at sea")
        assert provider.ledger()["requests"] == 0
        assert len(searching.search("Tune 1", mode="text")) == 1

    def test_holds_what_was_sent_for_a_query_that_fails_or_is_given_up(
        self, begin: Callable[..., Pipeline], provider: Provider
    ) -> None:
        searching = begin(**DOLLAR_A_TOKEN, patience_s=0)
        execute(searching.database.adbc_uri, "DELETE FROM songvec.budgets")

        provider.reset_ledger()
        billed: list[int] = []

        async def give_up() -> None:
            embedder = searching.embedder()
            try:
                await queries.embed(embedder, ["first"], "{query}", searching.search_budget())
                billed.append(provider.ledger()["tokens_billed"])
                provider.control(latency_s=30.0)
                async with asyncio.timeout(0.5):
                    await queries.embed(embedder, ["waves at sea"], "{query}", searching.search_budget())
            finally:
                await embedder.close()

        with pytest.raises(TimeoutError):
            asyncio.run(give_up())
        [(_, usd, reserved), _] = execute(searching.database.adbc_uri, SPENT)
        # the probe, the first query, and the estimate of the one that was sent: twelve bytes
        assert (usd, reserved) == (billed[0] + 3, 0)


def test_queries_share_requests_and_keep_their_order(pipeline: Pipeline, songs_provider: Provider) -> None:
    asked = [f"query {n}" for n in range(70)]
    one = embed_queries(pipeline.embedder(), asked[41:42], "find {query}")
    before = songs_provider.ledger()["requests"]
    vectors = embed_queries(pipeline.embedder(), asked, "find {query}")
    # one of them is the probe
    assert songs_provider.ledger()["requests"] - before == 1 + 7
    assert vectors.shape == (70, 64)
    np.testing.assert_array_equal(vectors[41], one[0])
    long = ["x" * 4000] * 9
    before = songs_provider.ledger()["requests"]
    embed_queries(pipeline.embedder(), long, "{query}")
    assert songs_provider.ledger()["requests"] - before == 1 + 2


def test_a_query_without_a_vector_is_named(pipeline: Pipeline, songs_provider: Provider) -> None:
    songs_provider.control(nan=["bad"])
    with pytest.raises(ProviderError, match="for the query 'bad words'"):
        embed_queries(pipeline.embedder(), ["good words", "bad words"], "{query}")
