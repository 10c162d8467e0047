"""Which line of its lyrics shows best why a song was found.

A line is chosen in this process and nothing is sent for it: a provider would be paid for each line. By words, the best
line is the one that shares most with the query; if none shares any, the first one. By meaning, which needs a local
model, it is the one whose vector is nearest to the query's. When to add here: another way to score lines. Keep out:
which songs are found (`nearest`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.embedder import Embedder
from songvec_assets.embedding.offline import STOP_WORDS, LocalEmbedder, find_features, fold, weigh
from songvec_assets.search.nearest import Hit

Score = Callable[[Sequence[str]], Sequence[float]]

N_BY_MEANING = 3
"""Songs whose lines are embedded, nearest first; further songs' lines are chosen by words."""


def add_best_lines(
    hits: Sequence[Hit], query: str, vector: NDArray[np.float32] | None, embedder: Embedder | None
) -> list[Hit]:
    """The hits with their best lines; of lines that score the same, the first one. Songs without lyrics have none.

    Args:
        hits: nearest first.
        query: its words; empty if the search was for a song or a vector: each line scores the same.
        vector: of the query, (dimensions,).
        embedder: that made it; only a local one is asked for the lines' vectors.
    """
    near: list[Hit] = []
    if vector is not None and isinstance(embedder, LocalEmbedder):
        near = _choose(hits[:N_BY_MEANING], lambda lines: (embedder.embed(lines) @ vector).tolist())
    return near + _choose(hits[len(near) :], by_words(query))


def by_words(query: str) -> Score:
    """Lines score for the query's words and beginnings of words, except those that nearly every line has."""
    wanted = {feature for feature in find_features(query) if feature not in STOP_WORDS}
    # most lines share nothing with the query: one search for all beginnings is a quick way to see it
    beginnings = re.compile("|".join(re.escape(each.removesuffix("~")) for each in wanted) or "(?!)")

    def score(line: str) -> float:
        return sum(map(weigh, wanted & {*find_features(line)})) if beginnings.search(fold(line)) else 0.0

    return lambda lines: [*map(score, lines)]


def _choose(hits: Sequence[Hit], score: Score) -> list[Hit]:
    lines = [[line for line in map(str.strip, (hit.lyrics or "").splitlines()) if line] for hit in hits]
    distinct = [*dict.fromkeys(chain.from_iterable(lines))]
    scores = dict(zip(distinct, score(distinct) if distinct else [], strict=True))
    return [
        replace(hit, best_line=max(each, key=scores.__getitem__, default=None))
        for hit, each in zip(hits, lines, strict=True)
    ]
