"""The demo understands: graded queries find the songs that are about them, far better than by spelling."""

import numpy as np
import pytest

from benchmarks import demo_quality
from songvec_assets.cli.commands import DEMO_QUERIES
from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.settings import DEFAULT_DIMENSIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spelling() -> demo_quality.Result:
    return demo_quality.measure("offline-v1", OfflineEmbedder(DEFAULT_DIMENSIONS))


@pytest.fixture(scope="module")
def meaning() -> demo_quality.Result:
    return demo_quality.measure("demo-v2", DemoEmbedder())


def test_scores_are_those_worked_out_by_hand() -> None:
    grades = np.array([[2, 1, 0, 0], [0, 0, 0, 1]])
    order = np.array([[0, 1, 2, 3], [0, 3, 1, 2]])
    found = demo_quality.score_orders(
        np.pad(order, ((0, 0), (0, 6)), constant_values=2), np.pad(grades, ((0, 0), (0, 6)))
    )
    np.testing.assert_allclose(found, [1.0, 1 / np.log2(3)])


def test_the_demo_finds_by_meaning_what_spelling_does_not(
    spelling: demo_quality.Result, meaning: demo_quality.Result
) -> None:
    ratio = demo_quality.resample(meaning.ndcg) / demo_quality.resample(spelling.ndcg)
    assert np.percentile(ratio, 2.5) > 1.4
    assert meaning.ndcg.mean() > 0.5
    others = np.array(demo_quality.read_queries()[1]) != "themes"
    assert meaning.ndcg[others].mean() > 0.5
    table = demo_quality.render([spelling, meaning])
    assert "| demo-v2 | 0.5" in table


@pytest.mark.parametrize("query", DEMO_QUERIES)
def test_each_search_of_the_demo_shows_three_songs_about_it(query: str, meaning: demo_quality.Result) -> None:
    queries, _, grades = demo_quality.read_queries()
    number = queries.index(query)
    assert grades[number, meaning.order[number, :3]].tolist() == [2, 2, 2]
    assert f"{query}: " in demo_quality.render_queries(meaning)
