"""Recall, measured: against neighbours that the test works out itself, ties and rows that are not loaded included."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.errors import DatabaseError, StoppedError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, RunContext, StopSignal
from songvec_assets.songs.text import hash_text
from songvec_assets.vectors.index.neighbors import LoadedRows, find_exact_neighbors, sample_queries
from songvec_assets.vectors.index.recall import RecallReport, measure_recall, read_recall, write_recall
from songvec_assets.vectors.index.searches import RecallPoint, Searches, to_literal
from songvec_assets.vectors.index.upkeep import IndexReport, IndexSettings
from songvec_assets.vectors.table import SERVING, TableSpec, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import DIMENSIONS, SPEC, TILING, forget, load, make_vector, put, reject
from songvec_assets_tests.vectors.indexes import build_index, fill, put_clusters

HALF = TableSpec("model-a", DIMENSIONS, "halfvec")


def put_vectors(cache: ModelCache, vectors: NDArray[np.float32]) -> None:
    """Store songs with these vectors; song_ids count from 0."""
    for song_range in sorted({TILING.range_of(song_id) for song_id in range(len(vectors))}):
        here = [song_id for song_id in range(len(vectors)) if song_id in song_range]
        cached, _ = load_embeddings_from_cache(cache, song_range)
        write_embeddings_to_file(cached, here, [hash_text("made up")] * len(here), vectors[here])


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
        assert queries.shape == (60, DIMENSIONS)
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

    @pytest.mark.parametrize(("n_songs", "n_rows"), [(1, 1), (9, 9), (60, 10), (300, 30)])
    def test_small_tables_are_asked_less(
        self, database: Database, cache: ModelCache, n_songs: int, n_rows: int
    ) -> None:
        put(cache, range(n_songs))
        load(database, cache)
        assert len(sample_queries(LoadedRows.of(VectorTable(database), cache))) == 2 * n_rows


@pytest.fixture
def indexed(database: Database, cache: ModelCache) -> Database:
    """A database with an index of 20 lists over 400 clustered rows."""
    put_clusters(cache, 0, 400, n_clusters=20)
    load(database, cache)
    bring(database, cache)
    return database


def bring(database: Database, cache: ModelCache, spec: TableSpec = SPEC) -> IndexReport:
    """Bring the index up to date."""
    return build_index(database, cache, spec)


class TestMeasurement:
    def test_visiting_all_lists_finds_everything(self, indexed: Database, cache: ModelCache) -> None:
        point = Searches.over(VectorTable(indexed), cache).measure(20)
        assert (point.recall, point.recall_of_rows, point.recall_of_synthetic) == (1, 1, 1)
        assert (point.low, point.high, point.n_queries) == (1, 1, 20), "nothing can be missed"
        assert 0 < point.ms_median <= point.ms_p99

    def test_recall_grows_with_probes_and_is_the_lower_of_both_kinds(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        report = measure_recall(VectorTable(indexed), cache)
        assert [point.probes for point in report.points][:3] == [1, 2, 4]
        recalls = [point.recall for point in report.points]
        assert recalls == sorted(recalls)
        assert recalls[0] < 1
        assert all(point.recall == min(point.recall_of_rows, point.recall_of_synthetic) for point in report.points)
        assert all(point.low <= point.recall <= point.high for point in report.points)
        assert (report.n_rows, report.n_read, report.is_cut_short) == (400, 400, False)

    def test_duplicates_of_one_vector_do_not_count_against_the_index(
        self, database: Database, cache: ModelCache
    ) -> None:
        put_vectors(cache, np.concatenate([np.tile(make_vector(1), (120, 1)), np.tile(make_vector(2), (120, 1))]))
        load(database, cache)
        build_index(database, cache, wanted=IndexSettings(lists=2))
        # any ten of the hundred and twenty are as near as any other
        assert Searches.over(VectorTable(database), cache).measure(2).recall == 1

    def test_it_is_what_searches_find(self, indexed: Database, cache: ModelCache) -> None:
        point = Searches.over(VectorTable(indexed), cache).measure(2, 80)
        rows = LoadedRows.of(VectorTable(indexed), cache)
        queries = sample_queries(rows)
        exact = find_exact_neighbors(rows, queries)
        hits = []
        for query, vector in list(enumerate(queries))[::2]:
            found = execute(
                indexed.adbc_uri,
                "SET enable_seqscan = off; SET ivfflat.probes = 2; SELECT song_id FROM song_embeddings "
                "ORDER BY embedding <=> %s LIMIT 10",
                (json.dumps([float(value) for value in vector]),),
            )
            hits.append(len({song_id for (song_id,) in found} & set(exact.song_ids[query][:10].tolist())) / 10)
        assert point.recall_of_rows == pytest.approx(np.mean(hits))

    def test_what_halfvec_loses_shows(self, database: Database, cache: ModelCache) -> None:
        # songs that differ by less than a half precision float can tell
        vector = make_vector(1)
        differences = np.stack([make_vector(song_id, version=2) for song_id in range(200)])
        put_vectors(cache, vector + np.float32(2e-5) * differences)
        load(database, cache, HALF)
        report = bring(database, cache, HALF)
        assert report.recall is not None
        assert report.recall.probes == report.index.lists
        assert report.recall.recall < 0.9
        assert not report.recall.reached
        assert "under the target of 95%" in report.reason

    def test_probes_that_still_reach_the_target_are_kept(
        self, indexed: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("songvec_assets.vectors.index.recall.SMALL_TABLE_ROWS", 0)
        smallest = measure_recall(VectorTable(indexed), cache).probes
        assert measure_recall(VectorTable(indexed), cache, kept=smallest + 3).probes == smallest + 3
        assert measure_recall(VectorTable(indexed), cache, kept=99).probes == 20
        with_less = measure_recall(VectorTable(indexed), cache, target=0.999, kept=1)
        assert with_less.probes > 1
        assert with_less.recall >= 0.999

    def test_it_takes_the_index_whatever_the_planner_would_rather(self, indexed: Database, cache: ModelCache) -> None:
        name = sa.make_url(indexed.url).database
        execute(indexed.adbc_uri, f"ALTER DATABASE {name} SET enable_indexscan = off")
        assert Searches.over(VectorTable(indexed), cache).measure(1).recall < 1

    def test_without_an_index_it_says_what_to_do(self, indexed: Database, cache: ModelCache) -> None:
        execute(indexed.adbc_uri, "DROP INDEX embeddings_ivfflat_idx")
        with pytest.raises(DatabaseError, match="materialize ivfflat_index"):
            Searches.over(VectorTable(indexed), cache).measure(1)

    def test_rows_that_the_cache_does_not_hold_are_no_ground_for_figures(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        shutil.rmtree(cache.storage.root / TILING.range_of(0).key)
        with pytest.raises(StoreError, match=r"holds 300 of the 400 rows .* fill the cache"):
            Searches.over(VectorTable(indexed), cache).measure(1)

    def test_a_few_of_them_are_left_out(self, indexed: Database, cache: ModelCache) -> None:
        execute(
            indexed.adbc_uri,
            "UPDATE songvec.loaded_ranges SET checksums = overlay(checksums placing decode(repeat('ab', 8), 'hex') "
            "FROM 1) WHERE range_start = 100",
        )
        assert measure_recall(VectorTable(indexed), cache).n_rows == 399

    def test_searches_are_told_and_can_be_stopped(self, indexed: Database, cache: ModelCache) -> None:
        stop = StopSignal()
        reported: list[Progress] = []

        def report(progress: Progress) -> None:
            reported.append(progress)
            if progress.step == "measure recall":
                stop.set()

        with pytest.raises(StoppedError):
            measure_recall(VectorTable(indexed), cache, run=RunContext(report, stop))
        assert (reported[-1].step, reported[-1].done, reported[-1].unit, reported[-1].note) == (
            "measure recall", 1, "searches", "1 probes")  # fmt: skip
        assert execute(indexed.adbc_uri, "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == [(0,)]


class TestReport:
    POINTS = tuple(
        RecallPoint(probes, recall, recall - 0.02, recall + 0.01, 80, recall, recall, 1.0, 2.0)
        for probes, recall in ((1, 0.5), (2, 0.96))
    )
    REPORT = RecallReport(400, 400, 0.95, POINTS, 2, 7, 1.5, is_cut_short=False)
    WORDS = "recall 96.0% at 2 probes (95% interval 94.0% to 97.0%, 80 queries)"

    def test_it_comes_back_from_the_settings_as_it_was(self, database: Database) -> None:
        report = self.REPORT
        with database.get_connection() as connection:
            write_recall(connection, VectorTable(database), report)
            assert read_recall(connection, VectorTable(database)) == report
            assert VectorTable(database).read_probes(connection) == 2
        assert (report.recall, report.reached) == (0.96, True)

    def test_what_is_in_doubt_is_said(self) -> None:
        for change, words in (
            ({"target": 0.94}, self.WORDS),
            ({}, f"{self.WORDS}, it may be as low as 94.0%, under the target of 95%"),
            ({"target": 0.99}, f"{self.WORDS}, under the target of 99%"),
            ({"n_read": 40, "target": 0.94}, f"{self.WORDS[:-1]} against a sample of 40 rows)"),
            (
                {"target": 0.94, "is_cut_short": True, "seconds": 15.2},
                f"{self.WORDS}, measuring ended at its time limit, after 15 s",
            ),
        ):
            assert replace(self.REPORT, **change).describe() == words

    @pytest.mark.parametrize(("n_changed", "holds"), [(7, True), (11, True), (12, False)])
    def test_it_holds_until_over_a_hundredth_of_the_rows_changed(self, n_changed: int, holds: bool) -> None:
        assert self.REPORT.holds(n_changed) is holds


def test_vectors_reach_the_server_as_they_are(database: Database) -> None:
    vector = make_vector(3)
    [(text,)] = execute(database.adbc_uri, f"SELECT '{to_literal(vector)}'::vector::text")
    np.testing.assert_array_equal(np.array(text[1:-1].split(","), dtype=np.float32), vector)


def test_rows_put_past_the_cache_are_not_measured(database: Database, cache: ModelCache) -> None:
    put(cache, range(10))
    load(database, cache)
    execute(database.adbc_uri, "DELETE FROM songvec.loaded_ranges")
    fill(database, 100, 200)
    report = bring(database, cache)
    assert report.built
    assert report.recall is None
    assert f"holds 0 of the 0 rows that the ledger of table {SERVING} names" in report.reason
