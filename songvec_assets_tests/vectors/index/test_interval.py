"""Intervals of recall: by hand, and how often they hold the truth over the searches of a real index."""

from dataclasses import replace

import numpy as np
import pytest

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.text import hash_text
from songvec_assets.vectors.index.interval import estimate_share
from songvec_assets.vectors.index.neighbors import ExactNeighbors
from songvec_assets.vectors.index.recall_searches import RecallSearches
from songvec_assets.vectors.table import VectorTable
from songvec_assets_tests.vectors.conftest import DIMENSIONS, upload
from songvec_assets_tests.vectors.indexes import build_index


@pytest.mark.parametrize(
    ("hits", "low", "high"),
    [
        ([10] * 20, 0.82, 1.0),  # as if each query were one trial
        ([10] * 100, 0.96, 1.0),
        ([9] * 100, 0.88, 0.92),  # never more than as many trials as there are
        ([10] * 90 + [0] * 10, 0.82, 0.95),  # all or nothing: again one trial per query
        ([0] * 20, 0.0, 0.18),
    ],
)
def test_it_is_as_wide_as_the_queries_differ(hits: list[int], low: float, high: float) -> None:
    found = estimate_share(np.array(hits), np.full(len(hits), 10))
    assert (found.share, found.low, found.high) == pytest.approx((sum(hits) / len(hits) / 10, low, high), abs=0.006)


def test_without_a_trial_nothing_is_known() -> None:
    found = estimate_share(np.zeros(3, dtype=int), np.zeros(3, dtype=int))
    assert (found.low, found.high) == (0, 1)


@pytest.fixture
def wide(database: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> RecallSearches:
    """Five hundred queries of each kind for a table of 8,000 clustered rows and 90 lists."""
    tiling = Tiling(8_000, 8_000)
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((300, DIMENSIONS))[draw.integers(300, size=8_000)]
    vectors = (vectors + 0.6 * draw.standard_normal(vectors.shape)).astype(np.float32)
    cached, _ = load_embeddings_from_cache(cache, tiling.range_of(0))
    write_embeddings_to_file(cached, list(range(8_000)), [hash_text(str(each)) for each in range(8_000)], vectors)
    upload(database, cache, tiling=tiling)
    build_index(database, cache)
    monkeypatch.setattr("songvec_assets.vectors.index.neighbors._MOST_QUERIES", 1000)
    monkeypatch.setattr("songvec_assets.vectors.index.neighbors._MOST_QUERIES_OF_SAMPLE", 1000)
    searches = RecallSearches.over(VectorTable(database), cache)
    searches.limit_s = float("inf")
    return searches


def sample_of(exact: ExactNeighbors, share: float, draw: np.random.Generator) -> ExactNeighbors:
    """The same, had only some rows been read; fewer of the fifty nearest are left then."""
    if share == 1:
        return exact
    is_read = draw.random(exact.n_rows) < share
    is_kept = is_read[exact.song_ids]
    similarities, song_ids = np.where(is_kept, exact.similarities, -np.inf), np.where(is_kept, exact.song_ids, -1)
    return replace(exact, song_ids=song_ids, similarities=similarities, n_read=int(is_read.sum()))


@pytest.mark.slow
def test_recall_against_a_sample_is_that_against_all_rows(wide: RecallSearches) -> None:
    whole = {probes: wide.measure(probes, 1000).recall_of_synthetic for probes in (4, 6, 8, 32)}
    everything, draw, of_samples = wide.exact, np.random.default_rng(1), []
    for _ in range(60):  # one is off by 0.013, as its standard deviation: the mean is what must not be
        wide.exact = sample_of(everything, 0.1, draw)
        of_samples.append([wide.judge(probes).recall_of_synthetic for probes in whole])
    np.testing.assert_allclose(np.mean(of_samples, axis=0), list(whole.values()), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_the_interval_covers_the_recall_of_all_queries_as_often_as_it_says(wide: RecallSearches, share: float) -> None:
    wide.measure(32, 1000)
    everything, draw = wide.exact, np.random.default_rng(2)
    for probes in (3, 6, 8):
        truth, n_covered = wide.measure(probes, 1000).recall_of_rows, 0
        found, widest = (wide._found[wide._key(each)] for each in (probes, 32))
        for _ in range(100):
            # which rows are read is drawn, too: one sample may be an odd one
            sampled = sample_of(everything, share, draw)
            judged = np.array([sampled.judge(query, found[query], widest[query]) for query in range(0, 1000, 2)])
            for _ in range(4):
                drawn = judged[draw.choice(len(judged), 100, replace=True)]
                estimate = estimate_share(drawn[:, 0], drawn[:, 1])
                n_covered += estimate.low <= truth <= estimate.high
        assert n_covered / 400 > 0.9, f"{probes} probes, recall {truth:.3f}"
