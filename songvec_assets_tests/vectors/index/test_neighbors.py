"""Exact neighbors, against those that the test works out itself: ties and rows that are not loaded included."""

import numpy as np
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import StoppedError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import RunContext, StopSignal
from songvec_assets.vectors.index import neighbors
from songvec_assets.vectors.index.neighbors import (
    ExactNeighbors,
    LoadedRows,
    find_exact_neighbors,
    sample_queries,
    sample_rows,
)
from songvec_assets.vectors.table import VectorTable
from songvec_assets_tests.vectors.conftest import DIMENSIONS, forget, load, make_vector, put, reject
from songvec_assets_tests.vectors.indexes import put_clusters, put_vectors


class TestExactNeighbours:
    def test_they_are_what_arithmetic_in_float64_finds(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(250))
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        queries = sample_queries(rows)
        exact = find_exact_neighbors(rows, queries)
        everything = np.stack([make_vector(song_id) for song_id in range(250)]).astype(np.float64)
        similarities = queries.astype(np.float64) @ everything.T
        assert exact.n_read == exact.n_rows == 250
        np.testing.assert_array_equal(exact.song_ids, np.argsort(-similarities, axis=1)[:, :50])
        np.testing.assert_allclose(exact.similarities, -np.sort(-similarities, axis=1)[:, :50], atol=1e-6)

    def test_of_many_ranges_some_are_drawn_from(
        self, database: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(neighbors, "_SAMPLED_RANGES", 2)
        put(cache, range(350))
        load(database, cache)
        rows, drawn = LoadedRows.of(VectorTable(database), cache), set[int]()
        for seed in range(12):
            song_ids, vectors = sample_rows(rows, 40, np.random.default_rng(seed))
            numbers = {song_id // 100 for song_id in song_ids}
            assert (len({*song_ids}), len(vectors), len(numbers)) == (40, 40, 2)
            drawn |= numbers
        assert drawn == {0, 1, 2, 3}

    def test_lengths_other_than_one_do_not_count(self, database: Database, cache: ModelCache) -> None:
        put_clusters(cache, 0, 300, n_clusters=5)
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        exact = find_exact_neighbors(rows, sample_queries(rows))
        assert float(exact.similarities.max()) == pytest.approx(1, abs=1e-6)

    def test_only_rows_that_are_loaded_count(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(120))
        load(database, cache)
        put(cache, range(90, 200), version=1)  # newer vectors and songs wait for a load
        rows = LoadedRows.of(VectorTable(database), cache)
        exact = find_exact_neighbors(rows, np.stack([make_vector(song_id) for song_id in range(120)]))
        assert exact.n_read == 120
        assert exact.song_ids[:, 0].tolist() == list(range(120))
        assert set(exact.song_ids.ravel().tolist()) <= set(range(120))

    def test_songs_that_are_gone_or_set_aside_do_not(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(50))
        forget(cache, [7])
        reject(cache, [8], "refused")
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        exact = find_exact_neighbors(rows, np.stack([make_vector(song_id) for song_id in (7, 8)]))
        assert exact.n_read == 48
        assert not {7, 8}.intersection(exact.song_ids.ravel().tolist())

    def test_a_table_of_fewer_than_ten_rows_has_that_many(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(3))
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        exact = find_exact_neighbors(rows, sample_queries(rows))
        found = [(0, 1, 2), (0, 2, 99), ()]
        assert [exact.judge(0, dict.fromkeys(ids, 0.5), {}) for ids in found] == [(3, 3), (2, 3), (0, 3)]

    def test_ties_count_whichever_of_them_a_search_finds(self, database: Database, cache: ModelCache) -> None:
        same = make_vector(1)
        put_vectors(cache, np.tile(same, (180, 1)))
        put(cache, range(200, 260))
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        exact = find_exact_neighbors(rows, np.stack([same, make_vector(200)]))
        nearest = exact.song_ids[1, :10].tolist()
        equal, others = dict.fromkeys(range(180), 0.0), dict.fromkeys(range(200, 205), 0.7)
        assert exact.judge(0, dict(list(equal.items())[:10]), {}) == (10, 10)
        assert exact.judge(0, dict(list(equal.items())[170:]), {}) == (10, 10), "more tie than are kept"
        assert exact.judge(0, dict(list(equal.items())[175:]) | others, {}) == (5, 10)
        assert exact.judge(1, dict.fromkeys(nearest[:4], 0.1), {}) == (4, 10)
        assert exact.judge(1, dict.fromkeys([*nearest[:9], 999], 0.1), {}) == (9, 10)

    def test_an_unseen_row_of_a_sample_stands_for_those_left_out(self) -> None:
        ids, similarities = np.full((1, 50), -1, np.int32), np.full((1, 50), -np.inf, np.float32)
        ids[0, :4], similarities[0, :4] = [1, 2, 3, 10], [0.9, 0.8, 0.7, 0.6]
        exact = ExactNeighbors(np.ones((1, 1), np.float32), 1000, ids, similarities, n_read=100)
        found = {song_id: 0.3 + song_id / 100 for song_id in range(10, 20)}
        assert exact.judge(0, found, {}) == (0, 1), "ten rows are as near as the first"
        assert exact.judge(0, found, {1: 0.1, 2: 0.2}) == (0, 3), "these two are known to be nearest"
        assert exact.judge(0, found, {1: 0.1, 2: 0.2, 3: 0.3}) == (1, 4)
        assert exact.judge(0, found | {3: 0.3}, {1: 0.1, 2: 0.2}) == (2, 4)

    def test_it_is_told_how_far_it_is_and_can_be_stopped(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(250))
        load(database, cache)
        rows, reported, stop = LoadedRows.of(VectorTable(database), cache), [], StopSignal()
        queries = sample_queries(rows)
        find_exact_neighbors(rows, queries, RunContext(reported.append))
        assert [(each.total, each.unit) for each in reported] == [(250, "rows")] * 3
        assert reported[-1].done == 250
        stop.set()
        with pytest.raises(StoppedError):
            find_exact_neighbors(rows, queries, RunContext(stop=stop))


class TestQueries:
    def test_half_are_rows_and_half_are_like_none(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(300))
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        queries = sample_queries(rows)
        assert queries.shape == (200, DIMENSIONS)
        np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
        nearest = find_exact_neighbors(rows, queries).similarities[:, 0]
        assert (nearest[::2] > 1 - 1e-5).all()
        assert (nearest[1::2] < 1 - 1e-4).all()

    def test_they_are_the_same_each_time_and_spread_over_all_ranges(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(1_500))
        load(database, cache)
        rows = LoadedRows.of(VectorTable(database), cache)
        queries = sample_queries(rows)
        np.testing.assert_array_equal(queries, sample_queries(rows))
        assert len(queries) == 200
        drawn = find_exact_neighbors(rows, queries[::2]).song_ids[:, 0]
        assert len(set(drawn.tolist())) == 100
        assert {song_id // 100 for song_id in drawn.tolist()} >= set(range(10))
        assert len({song_id // 100 for song_id in drawn[:10].tolist()}) > 3, "the first ones too"

    @pytest.mark.parametrize(("n_songs", "n_rows"), [(1, 1), (9, 9), (300, 100)])
    def test_a_table_of_fewer_rows_is_asked_for_each(
        self, database: Database, cache: ModelCache, n_songs: int, n_rows: int
    ) -> None:
        put(cache, range(n_songs))
        load(database, cache)
        assert len(sample_queries(LoadedRows.of(VectorTable(database), cache))) == 2 * n_rows
