"""Searches at several probes: what they find, how often they are made, and when they end."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import DatabaseError, StoppedError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, RunContext, StopSignal
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.neighbors import LoadedRows, find_exact_neighbors, prepare, sample_queries
from songvec_assets.vectors.index.recall import measure_recall
from songvec_assets.vectors.index.recall_searches import RecallSearches
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import DIMENSIONS, SPEC, TILING, load, make_vector
from songvec_assets_tests.vectors.indexes import build_index, put_clusters, put_vectors

HALF = TableSpec("model-a", DIMENSIONS, "halfvec")


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
        point = RecallSearches.over(VectorTable(indexed), cache).measure(20)
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
        assert RecallSearches.over(VectorTable(database), cache).measure(2).recall == 1

    def test_it_is_what_searches_find(self, indexed: Database, cache: ModelCache) -> None:
        point = RecallSearches.over(VectorTable(indexed), cache).measure(2, 200)
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
        assert RecallSearches.over(VectorTable(indexed), cache).measure(1).recall < 1

    def test_without_an_index_it_says_what_to_do(self, indexed: Database, cache: ModelCache) -> None:
        execute(indexed.adbc_uri, "DROP INDEX embeddings_ivfflat_idx")
        with pytest.raises(DatabaseError, match="run `songvec index`"):
            RecallSearches.over(VectorTable(indexed), cache).measure(1)

    def test_neighbors_that_were_prepared_are_used_unless_other_rows_were_loaded_since(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        table, reported = VectorTable(indexed), list[Progress]()
        ahead = prepare(table, cache, RunContext())
        used = RecallSearches.over(table, cache, RunContext(reported.append), ahead)
        assert (used.exact, reported) == (ahead.result().exact, []), "nothing is sought again"
        assert "literals" in vars(used.exact)
        assert used.measure(20).recall == 1
        put_clusters(cache, 0, 100, n_clusters=20, seed=1)
        load(indexed, cache)
        again = RecallSearches.over(table, cache, ahead=ahead)
        assert again.exact is not ahead.result().exact
        assert again.measure(20).recall == 1

    def test_rows_that_the_cache_does_not_hold_are_no_ground_for_figures(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        shutil.rmtree(cache.storage.root / TILING.range_of(0).key)
        with pytest.raises(StoreError, match=r"holds 300 of the 400 rows .* fill the cache"):
            RecallSearches.over(VectorTable(indexed), cache).measure(1)

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


class TestTimeLimit:
    """Time is fake: a search takes as long as the test says."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Seconds; each search adds one."""
        seconds = [0.0]
        searched = RecallSearches._search

        def search(self: RecallSearches, *arguments: object) -> object:
            seconds[0] += 1.0
            return searched(self, *arguments)

        monkeypatch.setattr(RecallSearches, "_search", search)
        fake = SimpleNamespace(monotonic=lambda: seconds[0], perf_counter=time.perf_counter)
        for module in ("recall_searches", "neighbors"):
            monkeypatch.setattr(f"songvec_assets.vectors.index.{module}.time", fake)
        return seconds

    def test_no_search_starts_when_it_is_up_and_the_report_says_so(
        self, indexed: Database, cache: ModelCache, clock: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("songvec_assets.vectors.index.recall.SMALL_TABLE_ROWS", 0)
        for before, probes, n_queries in ((1, 1, 14), (3, 3, 2)):  # no fewer than searches visited before
            clock[0] = 0
            with indexed.get_connection() as connection:
                VectorTable(indexed).write(connection, "probes", before)
            report = measure_recall(VectorTable(indexed), cache)
            assert clock[0] <= 16
            assert (report.probes, report.chosen.n_queries, report.is_cut_short) == (probes, n_queries, True)
            assert "measuring ended at its time limit, after 1" in report.describe()

    def test_a_long_build_leaves_a_fifth_of_its_time(
        self, indexed: Database, cache: ModelCache, clock: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("songvec_assets.vectors.index.recall.SMALL_TABLE_ROWS", 0)
        with indexed.get_connection() as connection:
            VectorTable(indexed).write(connection, "index", {"n_rows": 400, "seconds": 300.0})
        report = measure_recall(VectorTable(indexed), cache)
        assert 15 < clock[0] <= 60
        # which probes were measured last depends on the centers, which k-means draws by chance
        assert (report.is_cut_short, max(each.n_queries for each in report.points) > 2) == (True, True)

    def test_a_query_whose_neighbors_fewer_probes_all_found_is_not_searched_again(
        self, indexed: Database, cache: ModelCache
    ) -> None:
        searches = RecallSearches.over(VectorTable(indexed), cache)
        few, n_done = searches.measure(4, 200), searches.n_done
        more = searches.measure(8, 200)
        assert 200 + 20 <= searches.n_done < n_done + 200
        anew = RecallSearches.over(VectorTable(indexed), cache).measure(8, 200)
        assert few.recall < more.recall == anew.recall
        assert (more.low, more.high, more.n_queries) == (anew.low, anew.high, 200)

    def test_what_was_read_by_then_is_a_sample(self, indexed: Database, cache: ModelCache) -> None:
        rows = LoadedRows.of(VectorTable(indexed), cache)
        exact = find_exact_neighbors(rows, sample_queries(rows), ends_at=time.monotonic())
        assert (exact.n_read, exact.n_rows, exact.share) == (100, 400, 0.25)


class TestSample:
    """A table of which only some rows are compared, by searches of a real index."""

    def test_its_size_is_bounded_and_it_is_spread_over_all_ranges(
        self, indexed: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = LoadedRows.of(VectorTable(indexed), cache)
        assert rows.share == 1
        monkeypatch.setattr("songvec_assets.vectors.index.neighbors._MOST_ROWS", 100)
        monkeypatch.setattr("songvec_assets.vectors.index.neighbors.PIECE_ROWS", 4)
        exact = find_exact_neighbors(rows, sample_queries(rows))
        assert (exact.n_read, rows.share) == (pytest.approx(100, abs=16), 0.25)
        assert {song_id // 100 for song_id in exact.song_ids.ravel().tolist()} >= {0, 1, 2, 3}
        report = measure_recall(VectorTable(indexed), cache)
        assert (report.n_read, report.n_rows) == (exact.n_read, 400)


def test_vectors_reach_the_server_as_they_are(indexed: Database, cache: ModelCache) -> None:
    searches = RecallSearches.over(VectorTable(indexed), cache)
    sent = searches._parameters(0, (0, 1))["vector"]
    [(text,)] = execute(indexed.adbc_uri, f"SELECT '{sent}'::vector::text")
    np.testing.assert_array_equal(np.array(text[1:-1].split(","), dtype=np.float32), searches.exact.queries[0])
