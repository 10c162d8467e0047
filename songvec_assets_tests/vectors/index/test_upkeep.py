"""When the index is built and why not, how many lists it visits, and what decay does."""

from dataclasses import replace

import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value, write_value
from songvec_assets.vectors.index import build
from songvec_assets.vectors.index.audit import audit_recall
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets.vectors.table import STAGING, TableSpec, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import SPEC, load
from songvec_assets_tests.vectors.indexes import (
    INDEX,
    build_index,
    change,
    definition,
    fill,
    put_clusters,
    read_identity,
    read_indexes,
)

UNMEASURED = "recall was not measured: the cache in"


@pytest.fixture
def table(database: Database) -> Database:
    """A database whose table has 400 rows, song_ids 1 to 400, that no cache knows."""
    VectorTable(database).ensure(SPEC)
    fill(database, 1, 400)
    return database


def bring(database: Database, cache: ModelCache, **wanted: object) -> IndexReport:
    """Bring the index of SPEC's table up to date."""
    return build_index(database, cache, SPEC, IndexSettings(**wanted))  # type: ignore[arg-type]


class TestBuild:
    def test_the_first_build_makes_the_index_that_the_design_names(self, table: Database, cache: ModelCache) -> None:
        assert VectorTable(table).index is None
        report = bring(table, cache)
        assert read_indexes(table) == {INDEX: (True, definition(20))}
        assert report.built
        assert report.reason.startswith(f"there is none; {UNMEASURED}")
        assert (report.index.lists, report.index.n_rows, report.index.probes) == (20, 400, 20)
        size = execute(table.adbc_uri, f"SELECT pg_relation_size('{INDEX}')")
        assert [(report.index.n_bytes,)] == size
        assert report.index == VectorTable(table).index
        assert report.seconds > 0
        assert report.estimate.lists == 20

    def test_a_second_build_is_skipped_and_says_why(self, table: Database, cache: ModelCache) -> None:
        bring(table, cache)
        before = read_identity(table)
        report = bring(table, cache)
        assert read_identity(table) == before
        assert (report.built, report.seconds) == (False, 0.0)
        assert report.reason.startswith("20 lists fit 400 rows, 0 rows changed since it was built; ")

    def test_a_fifth_of_changed_rows_builds_it_anew_and_begins_to_count_again(
        self, table: Database, cache: ModelCache
    ) -> None:
        bring(table, cache)
        before = read_identity(table)
        change(table, 80)
        assert not bring(table, cache).built
        change(table, 1)
        assert bring(table, cache).reason.startswith("81 rows changed since it was built, over a fifth of 400")
        assert read_identity(table) != before
        assert not bring(table, cache).built
        assert read_indexes(table) == {INDEX: (True, definition(20))}

    def test_more_rows_build_it_anew_with_the_lists_that_fit(self, table: Database, cache: ModelCache) -> None:
        bring(table, cache)
        fill(table, 401, 900)
        report = bring(table, cache)
        assert report.reason.startswith("900 rows want 30 lists, it has 20")
        assert (report.index.lists, report.index.n_rows) == (30, 900)
        assert read_indexes(table) == {INDEX: (True, definition(30))}

    def test_a_setting_of_lists_builds_it_anew_and_then_holds(self, table: Database, cache: ModelCache) -> None:
        bring(table, cache)
        assert bring(table, cache, lists=50).reason.startswith("400 rows want 50 lists, it has 20")
        assert not bring(table, cache, lists=50).built
        assert read_indexes(table) == {INDEX: (True, definition(50))}

    def test_halfvec_gets_its_own_operator_class(self, database: Database, cache: ModelCache) -> None:
        spec = TableSpec("model-a", 8, "halfvec")
        VectorTable(database).ensure(spec)
        fill(database, 1, 400, spec)
        build_index(database, cache, spec)
        assert read_indexes(database) == {INDEX: (True, definition(20, "halfvec_cosine_ops"))}

    @pytest.mark.parametrize("opclass", ["vector_l2_ops", "vector_cosine_ops"])
    def test_an_index_that_is_not_ours_or_not_valid_counts_as_none(
        self, table: Database, cache: ModelCache, opclass: str
    ) -> None:
        execute(
            table.adbc_uri,
            f"CREATE INDEX {INDEX} ON song_embeddings USING ivfflat (embedding {opclass}) WITH (lists = 20);"
            f"UPDATE pg_index SET indisvalid = {opclass == 'vector_l2_ops'} WHERE indexrelid = '{INDEX}'::regclass",
        )
        assert VectorTable(table).index is None
        assert bring(table, cache).reason.startswith("there is none")
        assert read_indexes(table) == {INDEX: (True, definition(20))}

    def test_the_table_beside_gets_an_index_and_records_of_its_own(self, table: Database, cache: ModelCache) -> None:
        serving = bring(table, cache)
        VectorTable(table, STAGING).ensure(SPEC)
        fill(table, 1, 900, table=STAGING)
        report = build_index(table, cache, SPEC, table=STAGING)
        index = "embeddings_ivfflat_idx_new"
        assert read_indexes(table, STAGING) == {index: (True, definition(30, index=index, table=STAGING))}
        assert (report.index.lists, report.index.n_rows) == (30, 900)
        assert VectorTable(table, STAGING).index == report.index
        assert VectorTable(table).index == serving.index
        assert read_indexes(table) == {INDEX: (True, definition(20))}
        assert not build_index(table, cache, SPEC, table=STAGING).built

    def test_without_a_table_or_rows_it_is_refused(self, database: Database, cache: ModelCache) -> None:
        with pytest.raises(TableMismatchError, match="load it first, with `songvec load`"):
            bring(database, cache)
        VectorTable(database).ensure(SPEC)
        with pytest.raises(TableMismatchError, match=r"empty: .* load it first"):
            bring(database, cache)
        assert read_indexes(database) == {}


@pytest.fixture
def clustered(database: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A database whose table has 600 clustered rows, loaded from the cache, and counts as no small one."""
    monkeypatch.setattr("songvec_assets.vectors.index.recall.SMALL_TABLE_ROWS", 500)
    monkeypatch.setattr("songvec_assets.vectors.index.catalog.SMALL_TABLE_ROWS", 500)
    put_clusters(cache, 0, 600, n_clusters=24)
    load(database, cache)
    return database


def put_aside(database: Database, key: str, value: object) -> None:
    """Write a fact past the package."""
    with database.get_connection() as connection:
        write_value(connection, key, value)


def read(database: Database, key: str) -> object:
    """Read a fact past the package."""
    with database.get_connection() as connection:
        return read_value(connection, key)


def reaches_target(database: Database, cache: ModelCache) -> bool:
    """Whether the check of recall passes."""
    found = audit_recall(VectorTable(database), cache, 0.95)
    return found is not None and found.reached


class TestRecall:
    def test_a_build_stores_the_smallest_probes_that_reach_the_target(
        self, clustered: Database, cache: ModelCache
    ) -> None:
        report = bring(clustered, cache)
        assert report.recall is not None
        by_probes = {point.probes: point.recall for point in report.recall.points}
        assert 1 <= report.recall.probes < report.index.lists == 24
        assert report.recall.recall >= 0.95
        below = [recall for probes, recall in by_probes.items() if probes < report.recall.probes]
        assert all(recall < 0.95 for recall in below)
        assert report.recall.probes - 1 in {0, *by_probes}, "the next smaller was tried"
        assert report.index.probes == read(clustered, "probes") == report.recall.probes
        with clustered.get_connection() as connection:
            assert read_recall(connection, VectorTable(clustered)) == report.recall
        assert report.reason == f"there is none; {report.recall.describe()}"

    def test_a_rerun_with_nothing_changed_searches_nothing(
        self, clustered: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = bring(clustered, cache)
        put_clusters(cache, 600, 606, n_clusters=24)
        load(clustered, cache)  # a hundredth: too few to move it

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError

        monkeypatch.setattr("songvec_assets.vectors.index.recall.measure_recall", refuse)
        again = bring(clustered, cache)
        assert (again.built, again.recall) == (False, first.recall)
        assert again.reason.startswith("24 lists fit 606 rows, 6 rows changed since it was built; recall ")

    def test_a_higher_target_takes_more_probes_of_the_same_index(self, clustered: Database, cache: ModelCache) -> None:
        low = bring(clustered, cache, target_recall=0.1)
        before = read_identity(clustered)
        high = bring(clustered, cache, target_recall=0.999)
        assert read_identity(clustered) == before
        assert low.recall is not None
        assert high.recall is not None
        assert high.recall.probes > low.recall.probes
        assert not high.built
        assert high.recall.recall >= 0.999
        recorded = {"n_rows": 600, "target": 0.999, "probes": high.recall.probes, "seconds": low.seconds}
        assert read(clustered, "index") == pytest.approx(recorded, abs=1)

    @pytest.mark.slow
    def test_an_index_built_over_few_rows_and_filled_later_fails_the_check_and_is_built_anew(
        self, clustered: Database, cache: ModelCache
    ) -> None:
        good = bring(clustered, cache)
        assert good.recall is not None
        assert reaches_target(clustered, cache)
        identity = read_identity(clustered)
        # the worst that can be: its centres know 12 rows, all of another kind
        execute(clustered.adbc_uri, f"DROP INDEX {INDEX}; CREATE TABLE kept AS TABLE song_embeddings; "
                "DELETE FROM song_embeddings WHERE song_id >= 12; "
                f"CREATE INDEX {INDEX} ON song_embeddings USING ivfflat (embedding vector_cosine_ops) "
                "WITH (lists = 24); INSERT INTO song_embeddings SELECT * FROM kept WHERE song_id >= 12; "
                "DROP TABLE kept")  # fmt: skip
        change(clustered, 100)  # under a fifth: only recall can tell
        put_aside(clustered, "probes", 1)
        found = audit_recall(VectorTable(clustered), cache, 0.95)
        assert found is not None
        assert (found.reached, found.probes) == (False, 1)
        put_aside(clustered, "index", {"n_rows": 600, "target": 0.95, "probes": 1})
        report = bring(clustered, cache)
        assert report.built
        assert report.reason.startswith("a recall of 95% takes ")
        assert "1 when it was built; 100 rows changed since; recall " in report.reason
        assert read_identity(clustered) != identity
        assert reaches_target(clustered, cache)
        assert not bring(clustered, cache).built

    @pytest.mark.parametrize("is_cut_short", [True, False])
    def test_more_probes_are_a_reason_to_build_unless_there_was_no_time_to_try_fewer(
        self, clustered: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch, is_cut_short: bool
    ) -> None:
        first = bring(clustered, cache).recall
        assert first is not None
        # made up: how many probes a real index takes depends on the centers that k-means draws
        many = replace(first.chosen, probes=9)
        changed = replace(first, points=(many,), probes=9, is_cut_short=is_cut_short, n_changed=100)
        monkeypatch.setattr("songvec_assets.vectors.index.recall.measure_recall", lambda *_: changed)
        put_aside(clustered, "index", {"n_rows": 600, "target": 0.95, "probes": 1})
        put_aside(clustered, "recall", None)
        change(clustered, 100)
        assert bring(clustered, cache).built is not is_cut_short

    def test_a_measurement_that_there_was_no_time_for_is_made_again_and_nothing_is_compared_with_it(
        self, clustered: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = bring(clustered, cache).recall
        assert first is not None
        hasty = replace(first, points=(replace(first.chosen, n_queries=6),), is_cut_short=True)
        put_aside(clustered, "index", {"n_rows": 600})
        put_aside(clustered, "recall", None)
        with monkeypatch.context() as patched:
            patched.setattr("songvec_assets.vectors.index.recall.measure_recall", lambda *_: hasty)
            assert bring(clustered, cache).recall == hasty
        built = read(clustered, "index")
        assert isinstance(built, dict)
        assert built.get("target") is None
        again = bring(clustered, cache)
        assert not again.built
        assert again.recall is not None
        assert again.recall.chosen.n_queries > hasty.chosen.n_queries

    def test_rows_that_changed_while_it_was_built_stay_counted(
        self, clustered: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create_index = build.create_index

        def build_while_rows_change(*arguments: object) -> str:
            note = create_index(*arguments)
            change(clustered, 7)
            return note

        monkeypatch.setattr(build, "create_index", build_while_rows_change)
        bring(clustered, cache)
        with clustered.get_connection() as connection:
            assert VectorTable(clustered).read_changes(connection) == 7

    def test_a_small_table_visits_all_lists_and_records_what_fewer_would_find(
        self, database: Database, cache: ModelCache
    ) -> None:
        put_clusters(cache, 0, 200, n_clusters=14)
        load(database, cache)
        report = bring(database, cache)
        assert report.recall is not None
        assert report.index.probes == report.recall.probes == report.index.lists == 14
        assert report.recall.recall == 1.0
        assert report.recall.points[0].probes == 1
        assert report.recall.points[0].recall < 1.0
