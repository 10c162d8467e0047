"""The interval of a measured recall: which values are plausible after a few queries.

The ten neighbors of a query are not ten independent trials. Those of a query at the border of a list are missed
together, those of another are all found. What is drawn is the query, and its neighbors are a cluster; hits out of
queries x 10 would promise too narrow an interval. As for other cluster samples, Wilson's interval is taken with the
effective number of trials: all trials over the design effect, the measured variance between queries relative to that
of independent trials; and with Student's t, as that variance is estimated too. Franco, Little, Louis and Slud compare
such intervals (J. Surv. Stat. Methodol. 7, 2019, PMC6690503, read 2026-11), and advise Wilson's. ann-benchmarks reports
mean and deviation over 10,000 queries, and no interval (`plotting/metrics.py`, read 2026-11).
When to add here: another statistic of hits. Keep out: searches, and what follows from an interval.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_NORMAL = 1.96


class ShareInterval(NamedTuple):
    """A share, and its interval of 95 %."""

    share: float
    low: float
    high: float


def estimate_share(hits: NDArray[np.int64], trials: NDArray[np.int64]) -> ShareInterval:
    """The share of trials that are hits, and its interval; both are given per query, (n,).

    Trials of different queries are independent, those of one query need not be. If all or none are hits, the variance
    between queries is not known, and each query counts as one trial, the worst case.
    """
    n, n_trials = len(trials), int(trials.sum())
    if not n_trials:
        return ShareInterval(0.0, 0.0, 1.0)
    share = float(hits.sum() / n_trials)
    between = float(((hits - share * trials) ** 2).sum()) / n_trials**2 * n / max(1, n - 1)
    independent = share * (1 - share) / n_trials
    design_effect = max(1.0, between / independent) if independent else math.inf
    effective = max(n_trials / design_effect, min(n, n_trials))
    # the first term of Student's t in terms of the normal distribution (Abramowitz and Stegun, 26.7.5)
    square = (_NORMAL + (_NORMAL**3 + _NORMAL) / (4 * max(1, n - 1))) ** 2 / effective
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    low, high = ((share + square / 2 + side * half) / (1 + square) for side in (-1, 1))
    return ShareInterval(share, min(share, low), max(share, high))  # at 0 and 1 they differ by rounding
