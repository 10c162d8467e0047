"""The short form of `make bench-index`: no figures of time, only what must hold."""

from pathlib import Path

import pytest

from benchmarks import index
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.administration import execute

pytestmark = pytest.mark.slow


def test_stock_and_ours_are_built_over_the_same_rows_and_find_the_same(database: Database, tmp_path: Path) -> None:
    cache = ModelCache(LocalStorage(tmp_path / "cache"), "made-up", 32)
    result = index.measure(database, cache, 600, n_rounds=2, writers_go_on=True)
    assert {name: len(builds) for name, builds in result.builds.items()} == {
        "stock": 2,
        "ours": 2,
        "ours, halfvec": 2,
        "ours, while writers go on": 1,
    }
    for builds in result.builds.values():
        assert all(build.seconds > 0 and build.index_bytes > 600 * 32 * 2 for build in builds)
    assert result.builds["ours, halfvec"][0].table_bytes < 0.9 * result.builds["ours"][0].table_bytes
    assert len(result.faster("ours")) == 2
    assert result.default_error == "", "so few dimensions fit into the default memory"
    for report in result.recalls.values():
        assert report.n_rows == 600
        assert report.points[-1].probes == result.lists
        assert report.points[-1].recall > 0.99
    assert "| 600 | 24 | ours, halfvec |" in index.render([result])
    assert execute(database.adbc_uri, "SELECT relname FROM pg_class WHERE relname LIKE 'song_embeddings%'") == []
