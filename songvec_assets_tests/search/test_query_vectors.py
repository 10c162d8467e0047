"""Many queries are embedded with few requests, in their order, within the prompt."""

import numpy as np
import pytest

from songvec_assets.errors import ProviderError
from songvec_assets.pipeline import Pipeline
from songvec_assets.search.query_vectors import embed_queries
from songvec_assets_tests.provider import Provider


def test_queries_share_requests_and_keep_their_order(pipeline: Pipeline, songs_provider: Provider) -> None:
    queries = [f"query {n}" for n in range(70)]
    one = embed_queries(pipeline.embedder(), queries[41:42], "find {query}")
    before = songs_provider.ledger()["requests"]
    vectors = embed_queries(pipeline.embedder(), queries, "find {query}")
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
