"""Measures of a ranking, compared with values worked out by hand."""

import math

import numpy as np
import pytest

from songvec_assets.search.measures import (
    N_RESAMPLES,
    estimate_means,
    measure_ndcg,
    measure_recall,
    measure_reciprocal_rank,
)

PAIR = 3 + 1 / math.log2(3)
"""The gain of a song of grade 2 before one of grade 1."""


@pytest.mark.parametrize(
    ("found", "wanted", "recall", "rank", "ndcg"),
    [
        ([2, 1], [1, 2], 1.0, 1.0, 1.0),
        ([1, 2], [2, 1], 1.0, 1.0, (1 + 3 / math.log2(3)) / PAIR),
        ([0, 0, 2], [2, 1], 0.5, 1 / 3, 3 / 2 / PAIR),
        ([], [1], 0.0, 0.0, 0.0),
        ([0] * 10, [4], 0.0, 0.0, 0.0),
        # the eleventh hit does not count
        ([0] * 10 + [1], [1], 0.0, 0.0, 0.0),
        # of twelve relevant songs ten can be found, and that is the best order
        ([1] * 10, [1] * 12, 10 / 12, 1.0, 1.0),
    ],
)
def test_values_worked_out_by_hand(
    found: list[int], wanted: list[int], recall: float, rank: float, ndcg: float
) -> None:
    measured = measure_recall(found, wanted), measure_reciprocal_rank(found), measure_ndcg(found, wanted)
    assert measured == pytest.approx((recall, rank, ndcg))


def test_an_interval_is_that_of_the_mean_and_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, (400, 1))
    [interval] = estimate_means(values)
    error = 1.96 * values.std() / math.sqrt(400)
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (values.mean(), values.mean() - error, values.mean() + error), abs=0.003
    )
    assert estimate_means(values) == [interval]


def test_columns_are_paired() -> None:
    """A small difference that all queries have is a sure one, though both means are uncertain."""
    values = np.random.default_rng(2).uniform(0, 1, 50)
    first, second, difference = estimate_means(np.stack([values, values - 0.01, values - (values - 0.01)], axis=1))
    assert first.low < second.high
    assert difference.low == pytest.approx(0.01) == difference.high
    assert estimate_means(np.zeros((5, 1)))[0] == estimate_means(np.zeros((5, 1)))[0]
    assert estimate_means(np.zeros((5, 1)))[0].high == 0


def test_many_queries_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("songvec_assets.search.measures._MOST_DRAWN", 7 * 30)
    [interval] = estimate_means(np.arange(30.0)[:, None])
    assert N_RESAMPLES % 7
    assert 10 < interval.low < 14.5 < interval.high < 19
