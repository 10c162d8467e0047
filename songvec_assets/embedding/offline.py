"""Embedders that run in this process and cost nothing: their base class, and one that hashes words, for tests.

The second one maps words, their prefixes and (in scripts without spaces) pairs of characters to a few signed dimensions
each, as feature hashing does (Weinberger et al. 2009). It knows spelling, not meaning: its vectors are always labelled
`offline-v1`.
When to add here: what all local models have in common. Keep out: the demo's model (`demo`).
"""

import asyncio
import functools
import itertools
import math
import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from songvec_assets.embedding.embedder import NO_HOOKS, Embedder, RequestHooks
from songvec_assets.embedding.wire import EmbeddingBatch, Float32Matrix

_WORD = re.compile(r"\w+")
_FIRST_UNSPACED = 0x0E00  # from Thai on, scripts put few spaces between words
STOP_WORDS = frozenset(
    "a about all an and are as at be been but by for from had has have he her him his i if in into is it its just me "
    "my no not of on or our out she so some song songs that the their them then there they this to too up us was we "
    "were what when where which who will with you your "
    "der die das und im am den dem la le les el los las un una de du et y en".split()
)


class LocalEmbedder(Embedder):
    """An embedder without a provider. One request is computed at a time, in a thread."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._turn = asyncio.Lock()

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Float32Matrix:
        """Unit vectors, float32, (n texts, dimensions)."""

    async def generate_embeddings_batch(self, texts: Sequence[str], hooks: RequestHooks = NO_HOOKS) -> EmbeddingBatch:
        """Embed texts.

        Returns:
            Unit vectors, float32, (n texts, dimensions); no tokens, since nothing is billed.
        """
        await hooks.before_try()
        await hooks.before_send()
        async with self._turn:
            return EmbeddingBatch(await asyncio.to_thread(self.embed, texts), n_tokens=0)


class OfflineEmbedder(LocalEmbedder):
    """Embeds texts by hashing their words; the same text gives the same vector everywhere."""

    def embed(self, texts: Sequence[str]) -> Float32Matrix:
        """Unit vectors, float32, (n texts, dimensions)."""
        return np.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Float32Matrix:
        places: list[int] = []
        weights: list[float] = []
        for feature, count in Counter(find_features(text)).items():
            weight = weigh(feature) * (1.0 + math.log(count))
            for place in _places(feature):
                places.append((place >> 1) % self.dimensions)
                weights.append(weight if place & 1 else -weight)
        vector = np.bincount(places, weights, minlength=self.dimensions) if places else np.zeros(self.dimensions)
        norm = float(np.linalg.norm(vector))
        if norm == 0:  # there are no words, only punctuation; or opposite signs cancel
            vector[xxhash.xxh3_64_intdigest(text.encode()) % self.dimensions] = norm = 1.0
        return (vector / norm).astype(np.float32)


@functools.lru_cache(maxsize=100_000)
def _places(feature: str) -> tuple[int, ...]:
    """The dimensions of a feature, with its sign in the lowest bit."""
    return tuple(np.frombuffer(xxhash.xxh3_128_digest(feature.encode()), dtype="<u4").tolist())


def fold(text: str) -> str:
    """A text without case, accents and compatibility forms."""
    folded = text.casefold()
    if folded.isascii():
        return folded
    return "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))


def weigh(feature: str) -> float:
    """What a feature counts, compared with a word."""
    return 0.1 if feature in STOP_WORDS else 0.5 if feature.endswith("~") else 1.0


def find_features(text: str) -> Iterator[str]:
    """The folded words of a text; and of those that say something, their beginnings with a `~`.

    In scripts without spaces, characters and pairs of them instead of beginnings.
    """
    for word in _WORD.findall(fold(text)):
        yield word.removesuffix("s") if len(word) > 3 else word
        if word in STOP_WORDS:
            continue
        if ord(max(word)) >= _FIRST_UNSPACED:
            yield from word
            yield from map("".join, itertools.pairwise(word))
        else:
            # dog and dogs; sail, sailing and sailor
            yield f"{word[: 3 if len(word) <= 4 else 4]}~"
