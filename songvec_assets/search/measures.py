"""How good a ranking is, and how sure a mean over queries is. Pure.

`found` are the grades of a query's first hits, in their order, 0 for a song that is not relevant; `wanted` are the
grades of all its relevant songs, from 1 on. Measures look at the first N_FIRST hits. When to add here: another measure
of a ranking. Keep out: searches (`evaluate`), and shares of exact neighbors (`vectors/index/interval`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_FIRST = 10
N_RESAMPLES = 5000
_MOST_DRAWN = 2_000_000
"""Numbers that are drawn at a time: 16 MB."""


@dataclass(frozen=True)
class Interval:
    """A mean over queries, and its 95 % interval: the means that other queries of the same kind may well have."""

    mean: float
    low: float
    high: float


def measure_recall(found: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of the relevant songs that are among the first hits."""
    return sum(grade > 0 for grade in found[:N_FIRST]) / len(wanted)


def measure_reciprocal_rank(found: Sequence[int]) -> float:
    """1 / the rank of the first relevant hit; 0 if none is relevant. Its mean is MRR."""
    return next((1 / rank for rank, grade in enumerate(found[:N_FIRST], 1) if grade), 0.0)


def measure_ndcg(found: Sequence[int], wanted: Sequence[int]) -> float:
    """nDCG: gains of 2^grade - 1, discounted by log2(1 + rank), relative to the best possible order."""
    return _discount(found) / _discount(sorted(wanted, reverse=True))


def _discount(grades: Sequence[int]) -> float:
    return math.fsum((2**grade - 1) / math.log2(1 + rank) for rank, grade in enumerate(grades[:N_FIRST], 1))


def estimate_means(values: NDArray[np.float64]) -> list[Interval]:
    """The mean of each column, with its interval: the percentile bootstrap over queries.

    The same queries are drawn for all columns, and in each call. So the interval of a column of differences is that of
    the paired bootstrap.

    Args:
        values: (n queries, n columns); a row at least.
    """
    n_queries = len(values)
    generator = np.random.default_rng(0)
    shares = np.full(n_queries, 1 / n_queries)
    means = []
    n_left = N_RESAMPLES
    while n_left:
        n_drawn = min(n_left, max(1, _MOST_DRAWN // n_queries))
        # how often each query is drawn
        means.append(generator.multinomial(n_queries, shares, n_drawn) @ values / n_queries)
        n_left -= n_drawn
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return [Interval(*map(float, each)) for each in zip(values.mean(axis=0), low, high, strict=True)]
