"""A deterministic embedder without a provider, for demos and tests: similar words give similar vectors.

Words, their beginnings and (where words are not spaced) pairs of characters are hashed to a few signed dimensions
each, as in feature hashing (Weinberger et al. 2009). It knows spelling, not meaning: its vectors carry the model
name `offline-v1` wherever they go, and cost nothing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from songvec_assets.embedding.wire import EmbeddingBatch, Float32Matrix

_WORD = re.compile(r"\w+")
_PLACES_A_FEATURE = 4
_STOP_WORDS = frozenset(
    "a about all an and are as at be been but by for from had has have he her him his i if in into is it its just me my "
    "no not of on or our out she so some song songs that the their them then there they this to too up us was we were "
    "what when where which who will with you your".split()
)


class OfflineEmbedder:
    """Embeds texts by hashing their words; the same text gives the same vector everywhere."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    async def generate_embeddings_batch(self, texts: Sequence[str]) -> EmbeddingBatch:
        """Embed texts.

        Returns:
            Unit vectors, float32, (n texts, dimensions); no tokens, since nothing is billed.
        """
        return EmbeddingBatch(np.stack([self._embed(text) for text in texts]), n_tokens=0)

    async def close(self) -> None:
        """Nothing to close."""

    def _embed(self, text: str) -> Float32Matrix:
        vector = np.zeros(self.dimensions, dtype=np.float32)
        for feature, weight in _weigh_features(text):
            digest = xxhash.xxh3_128_digest(feature.encode())
            for place in np.frombuffer(digest, dtype="<u4")[:_PLACES_A_FEATURE].tolist():
                vector[(place >> 1) % self.dimensions] += weight if place & 1 else -weight
        norm = float(np.linalg.norm(vector))
        if norm == 0:  # no word at all: punctuation still is a text, and opposite signs may meet
            vector[xxhash.xxh3_64_intdigest(text.encode()) % self.dimensions] = norm = 1.0
        return vector / np.float32(norm)


def _weigh_features(text: str) -> Iterator[tuple[str, float]]:
    counts = Counter(_features(text))
    for feature, count in counts.items():
        yield feature, (1.0 + float(np.log(count))) * (0.1 if feature in _STOP_WORDS else 1.0)


def _features(text: str) -> Iterator[str]:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    for word in _WORD.findall(plain):
        yield word
        if any(ord(c) >= 0x0E00 for c in word):  # Thai, Chinese, Japanese, Korean: few spaces between words
            yield from (f"{a}{b}" for a, b in zip(word, word[1:], strict=False))
        elif len(word) > 4 and word not in _STOP_WORDS:
            yield f"{word[:4]}~"  # sail, sailing, sailor
