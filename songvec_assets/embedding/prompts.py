"""The prompts that models expect around queries and documents: defaults by the model's family. Pure.

A prompt is a text that contains `{query}`, or `{text}`, once. When to add here: a family whose model card asks for one.
Keep out: prompts from settings or from a store (`cache.texts.choose_prompts`).

Sources, as read in November 2026: the model cards of Qwen/Qwen3-Embedding-8B, intfloat/e5-large-v2,
intfloat/multilingual-e5-large-instruct, Alibaba-NLP/gte-Qwen2-7B-instruct (a space after `Query:`, unlike Qwen3),
BAAI/bge-large-en-v1.5, BAAI/bge-large-zh-v1.5 and nomic-ai/nomic-embed-text-v1.5. No prompt, by their cards:
BAAI/bge-m3, the other GTE models, MiniLM, and OpenAI's text-embedding-3 and -ada-002.
"""

import re
from dataclasses import dataclass

from songvec_assets.settings import LOCAL_MODELS

TASK = "Given a description of a theme, a mood or a story, retrieve songs whose lyrics match it"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a model.

    Attributes:
        query: contains `{query}` once; `{query}` alone sends the query unchanged.
        document: the same with `{text}`, a song's text.
    """

    query: str = "{query}"
    document: str = "{text}"


NO_PROMPTS = Prompts()

# the first match in the name counts; servers add an organisation before, and a tag or a format after it
_FAMILIES = {
    f"^({'|'.join(LOCAL_MODELS)})$": NO_PROMPTS,
    r"qwen3[-_ ]?embedding": Prompts(f"Instruct: {TASK}\nQuery:{{query}}"),
    r"\be5[-_].*instruct|gte[-_]qwen.*instruct": Prompts(f"Instruct: {TASK}\nQuery: {{query}}"),
    r"\be5[-_](small|base|large)": Prompts("query: {query}", "passage: {text}"),
    r"bge[-_](small|base|large)[-_]zh": Prompts("为这个句子生成表示以用于检索相关文章：{query}"),
    r"bge[-_](small|base|large)": Prompts("Represent this sentence for searching relevant passages: {query}"),
    r"nomic[-_]embed[-_]text": Prompts("search_query: {query}", "search_document: {text}"),
}


def default_prompts(*names: str) -> Prompts:
    """The prompts of a model's family, by the first of its names that shows one; no prompts for an unknown family."""
    found = (prompts for name in names for family, prompts in _FAMILIES.items() if re.search(family, name.lower()))
    return next(found, NO_PROMPTS)
