"""The prompts of each family of models, under the names that servers give them."""

import pytest

from songvec_assets.embedding.prompts import NO_PROMPTS, TASK, Prompts, default_prompts
from songvec_assets.settings import DEMO_MODEL, FIREWORKS_MODEL, OFFLINE_MODEL

E5 = Prompts("query: {query}", "passage: {text}")
NOMIC = Prompts("search_query: {query}", "search_document: {text}")
BGE = Prompts("Represent this sentence for searching relevant passages: {query}")
QWEN3 = Prompts(f"Instruct: {TASK}\nQuery:{{query}}")
WITH_TASK = Prompts(f"Instruct: {TASK}\nQuery: {{query}}")


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        (FIREWORKS_MODEL, QWEN3),
        ("Qwen/Qwen3-Embedding-0.6B", QWEN3),
        ("qwen3-embedding:8b", QWEN3),
        ("text-embedding-qwen3-embedding-4b", QWEN3),
        ("intfloat/multilingual-e5-small", E5),
        ("e5-base-v2", E5),
        ("intfloat/multilingual-e5-large-instruct", WITH_TASK),
        ("intfloat/e5-mistral-7b-instruct", WITH_TASK),
        ("Alibaba-NLP/gte-Qwen2-1.5B-instruct", WITH_TASK),
        ("BAAI/bge-small-en-v1.5", BGE),
        ("bge-large", BGE),
        ("nomic-embed-text:latest", NOMIC),
        ("text-embedding-nomic-embed-text-v1.5", NOMIC),
        ("BAAI/bge-m3", NO_PROMPTS),
        ("thenlper/gte-large", NO_PROMPTS),
        ("text-embedding-3-small", NO_PROMPTS),
        ("sentence-transformers/all-MiniLM-L6-v2", NO_PROMPTS),
        ("all-minilm", NO_PROMPTS),
        ("code5-large", NO_PROMPTS),
        ("our-own-model", NO_PROMPTS),
        (OFFLINE_MODEL, NO_PROMPTS),
    ],
)
def test_a_models_name_shows_its_familys_prompts(model: str, prompts: Prompts) -> None:
    assert default_prompts(model) == prompts
    assert default_prompts(model.upper()) == prompts


def test_the_first_name_that_shows_a_family_counts() -> None:
    assert default_prompts("qwen3-embedding", "e5-base") == default_prompts("qwen3-embedding")
    assert default_prompts("our-own-model", "e5-base") == default_prompts("e5-base")
    assert default_prompts(DEMO_MODEL, "e5-base") == NO_PROMPTS, "it is made here, whatever the provider's name is"


def test_chinese_bge_is_asked_in_chinese() -> None:
    prompts = default_prompts("BAAI/bge-base-zh-v1.5")
    assert prompts.query.endswith("：{query}")
    assert prompts.document == NO_PROMPTS.document


def test_each_prompt_has_its_place_once() -> None:
    for model in ("qwen3-embedding", "e5-base", "nomic-embed-text", "bge-base", "unknown"):
        prompts = default_prompts(model)
        assert (prompts.query.count("{query}"), prompts.document.count("{text}")) == (1, 1)
