"""What a look at a table and its index finds: bad vectors, what the planner does, recall."""

import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value, write_value
from songvec_assets.vectors.index.audit import (
    Comparison,
    IndexAudit,
    QualityChange,
    VectorAudit,
    audit_index,
    audit_recall,
    audit_vectors,
)
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import dispose, execute
from songvec_assets_tests.vectors.conftest import DIMENSIONS, SPEC, load, put
from songvec_assets_tests.vectors.indexes import build_index

HALF = TableSpec("model-a", DIMENSIONS, "halfvec")


class TestVectors:
    @pytest.mark.parametrize("spec", [SPEC, HALF])
    def test_good_vectors_pass_and_their_mean_length_is_told(
        self, database: Database, cache: ModelCache, spec: TableSpec
    ) -> None:
        put(cache, range(50))
        load(database, cache, spec)
        audit = audit_vectors(database, spec, 50)
        assert (audit.n_sampled, audit.bad_song_ids) == (50, [])
        assert audit.mean_norm == pytest.approx(1.0, abs=1e-3)

    def test_a_mean_length_other_than_one_shows(self, database: Database) -> None:
        VectorTable(database).ensure(SPEC)
        execute(
            database.adbc_uri, "INSERT INTO song_embeddings VALUES (1, '[3,4,0,0,0,0,0,0]'), (2, '[0,0,0,0,0,0,0,1]')"
        )
        assert audit_vectors(database, SPEC, 2) == VectorAudit(2, [], 3.0)

    @pytest.mark.parametrize("spec", [SPEC, HALF])
    def test_zero_vectors_are_named(self, database: Database, cache: ModelCache, spec: TableSpec) -> None:
        put(cache, range(50))
        load(database, cache, spec)
        zero = "UPDATE song_embeddings SET embedding = '[0,0,0,0,0,0,0,0]' WHERE song_id IN (7, 33)"
        execute(database.adbc_uri, zero)
        audit = audit_vectors(database, spec, 50)
        assert sorted(audit.bad_song_ids) == [7, 33]
        assert audit.mean_norm == pytest.approx(48 / 50, abs=1e-3)

    def test_a_table_of_another_size_is_all_bad(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(5))
        load(database, cache)
        audit = audit_vectors(database, TableSpec("model-a", 16), 5)
        assert sorted(audit.bad_song_ids) == [0, 1, 2, 3, 4]

    def test_a_sample_is_spread_over_the_whole_table(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(1000))
        load(database, cache)
        zero = "UPDATE song_embeddings SET embedding = '[0,0,0,0,0,0,0,0]'"
        execute(database.adbc_uri, zero)
        audit = audit_vectors(database, SPEC, 1000, n_sampled=100)
        assert 60 <= audit.n_sampled <= 150
        tenths = {song_id // 100 for song_id in audit.bad_song_ids}
        assert tenths == set(range(10))

    def test_without_a_table_or_rows_there_is_nothing_to_look_at(self, database: Database) -> None:
        assert audit_vectors(database, SPEC, 0) == VectorAudit(0, [], 0.0)
        VectorTable(database).ensure(SPEC)
        assert audit_vectors(database, SPEC, 0) == VectorAudit(0, [], 0.0)


class TestIndex:
    def test_without_an_index_it_says_what_to_run(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(100))
        load(database, cache)
        audit = audit_index(database, SPEC, 100)
        assert (audit.valid, audit.used, audit.n_rows) == (False, False, 100)
        assert "run `songvec index`" in audit.describe()

    def test_few_rows_are_rightly_scanned(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(50))
        load(database, cache)
        build_index(database, cache, SPEC)
        execute(database.adbc_uri, f"ALTER DATABASE {sa.make_url(database.url).database} SET enable_indexscan = off")
        dispose(database.url)  # sessions begin with what is set
        audit = audit_index(database, SPEC, 50)
        assert (audit.valid, audit.used, audit.should_be_used) == (True, False, False)
        assert audit.describe() == "50 rows are few: the planner scans them all, which is faster"

    @pytest.mark.parametrize("spec", [SPEC, HALF])
    def test_an_index_that_the_planner_takes_shows(
        self, database: Database, cache: ModelCache, spec: TableSpec
    ) -> None:
        put(cache, range(1000))
        load(database, cache, spec)
        build_index(database, cache, spec)
        execute(database.adbc_uri, f"ALTER DATABASE {sa.make_url(database.url).database} SET enable_seqscan = off")
        dispose(database.url)  # sessions begin with what is set
        audit = audit_index(database, spec, 1000)
        assert (audit.valid, audit.used) == (True, True)
        assert audit.describe() == "the planner uses the index for 1,000 rows"

    def test_an_index_that_is_not_valid_shows(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(100))
        load(database, cache)
        build_index(database, cache, SPEC)
        execute(
            database.adbc_uri,
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_ivfflat_idx'::regclass",
        )
        assert not audit_index(database, SPEC, 100).valid

    @pytest.mark.parametrize(("n_rows", "words"), [(49_999, "scans them all"), (50_000, "does not use the index")])
    def test_a_large_table_whose_index_is_passed_by_is_a_finding(self, n_rows: int, words: str) -> None:
        audit = IndexAudit(valid=True, used=False, n_rows=n_rows)
        assert audit.should_be_used == (n_rows >= 50_000)
        assert words in audit.describe()


class TestRecall:
    def test_without_an_index_there_is_nothing_to_measure(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(100))
        load(database, cache)
        assert audit_recall(VectorTable(database), cache, 0.95) is None

    def test_what_was_measured_after_the_build_is_compared_with_the_target_of_now(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(100))
        load(database, cache)
        report = build_index(database, cache, SPEC).recall
        assert audit_recall(VectorTable(database), cache, 0.95) == report, "to the last digit of its times"
        with database.get_connection() as connection:
            fact = read_value(connection, "recall")
            for point in fact["points"]:
                point["recall"] = 0.9
            write_value(connection, "recall", fact)
        for target, reached in ((0.95, False), (0.9, True)):
            found = audit_recall(VectorTable(database), cache, target)
            assert found is not None
            assert (found.target, found.reached) == (target, reached)

    def test_rows_that_changed_since_are_reason_to_measure_again(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(100))
        load(database, cache)
        report = build_index(database, cache, SPEC).recall
        put(cache, range(5), version=1)
        load(database, cache)
        found = audit_recall(VectorTable(database), cache, 0.95)
        assert found is not None
        assert report is not None
        assert found.chosen != report.chosen
        assert (found.reached, found.n_changed, len(found.points)) == (True, 5, 1)


@pytest.mark.parametrize(
    ("quality", "warning", "words"),
    [
        (QualityChange(40, 0.61, 0.52, -0.15, -0.02), "searches became worse: nDCG@10 of 40", "0.520, before: 0.610"),
        (QualityChange(40, 0.61, 0.58, -0.09, 0.02), "", "interval of the difference -0.090 to +0.020"),
        (QualityChange(trouble="no answer"), "the labelled queries could not be compared: no answer", "previous table"),
    ],
)
def test_only_a_significant_fall_is_a_warning(quality: QualityChange, warning: str, words: str) -> None:
    assert quality.warning.startswith(warning)
    assert bool(quality.warning) == bool(warning)
    described = Comparison(10, 10, 10, 1.0, "good", "good", quality).describe()
    assert words in described
    assert ("nDCG" in described) == (not quality.trouble)
