"""The short form of `make bench-search`: no figures of time, only what must hold."""

import numpy as np
import pytest

from benchmarks import search
from benchmarks.lifelike import make_rows, share_by_bits
from songvec_assets.vectors.index.kinds import KINDS

pytestmark = pytest.mark.slow


def test_made_up_rows_are_unit_vectors_about_a_common_mean_and_bits_tell_some_of_them_apart() -> None:
    rows = np.concatenate([vectors for _, vectors in make_rows(3_000, 256)])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    # the common mean has 0.4; the few large clusters of so few rows add their own
    assert 0.35 < np.linalg.norm(rows.mean(axis=0)) ** 2 < 0.65
    assert 0.2 < share_by_bits(rows) < 0.8


def test_each_kind_is_built_searched_and_extrapolated() -> None:
    results = [search.measure(n_rows, 128) for n_rows in (300, 600)]
    for of_size in results:
        assert [each.kind for each in of_size] == [*KINDS]
        for each in of_size:
            assert each.report.recall >= search.TARGET
            assert each.pages > 0
            assert [*each.by_callers] == [1, 16]
    assert "| 600 | ivfflat_bit |" in search.render_measured(results)
    assert "| hnsw_bit |" in search.render_extrapolated(results)
    smaller, faster, _ = search.compare(results, "ivfflat_halfvec")
    assert 1.3 < smaller < 2.2
    assert faster > 0
