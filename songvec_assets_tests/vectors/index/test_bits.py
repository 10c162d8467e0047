"""The functions that make bits of a vector: what they give, when they are made, and when they are dropped."""

import json
from collections.abc import Callable

import numpy as np
import psycopg2
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index import bits
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import DIMENSIONS, SPEC, load, make_vector, put
from songvec_assets_tests.vectors.indexes import build_index, fill

BITS = IndexSettings(kind="ivfflat_bit")
MADE = "SELECT proname FROM pg_proc WHERE pronamespace = 'songvec'::regnamespace AND proname LIKE 'bits%' ORDER BY 1"


@pytest.fixture(params=["vector", "halfvec"])
def loaded(database: Database, cache: ModelCache, request: pytest.FixtureRequest) -> Database:
    """A database with a hundred rows."""
    put(cache, range(100))
    load(database, cache, TableSpec(SPEC.model, DIMENSIONS, request.param))
    return database


def read_mean(database: Database) -> np.ndarray:
    with database.get_connection() as connection:
        return np.array(json.loads(str(bits.read_mean(connection, "song_embeddings"))))


def test_a_bit_says_whether_a_value_is_above_the_mean_whatever_the_vectors_length(loaded: Database) -> None:
    mean = np.mean([make_vector(song_id) for song_id in range(100)], axis=0)
    np.testing.assert_allclose(read_mean(loaded), mean, atol=1e-3)
    with loaded.get_connection() as connection:
        name = bits.create_function(connection, str(bits.read_mean(connection, "song_embeddings")))
    for length in (1, 7):
        [(found,)] = execute(loaded.adbc_uri, f"SELECT songvec.{name}(%s)", (str((length * make_vector(3)).tolist()),))
        assert found == "".join(str(int(value)) for value in make_vector(3) > read_mean(loaded))


def test_a_table_without_rows_has_no_mean(database: Database) -> None:
    VectorTable(database).ensure(SPEC)
    with database.get_connection() as connection:
        assert bits.read_mean(connection, "song_embeddings") is None


def test_of_a_large_table_a_sample_is_read(loaded: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(loaded, 1000, 9000, VectorTable(loaded).spec or SPEC)
    of_all = read_mean(loaded)
    monkeypatch.setattr(bits, "SAMPLE_ROWS", 900)
    of_some = read_mean(loaded)
    assert (of_some != of_all).any()
    np.testing.assert_allclose(of_some, of_all, atol=0.1)
    assert (read_mean(loaded) == of_some).all(), "the same rows give the same mean"


def test_another_mean_is_another_function_and_the_first_stays_as_it_is(loaded: Database) -> None:
    with loaded.get_connection() as connection:
        first, again, second = [
            bits.create_function(connection, str([value] * DIMENSIONS)) for value in (0.1, 0.1, 0.2)
        ]
    assert first == again != second
    assert {name for (name,) in execute(loaded.adbc_uri, MADE)} == {first, second}


class TestDropping:
    def test_functions_that_an_index_or_a_build_under_way_needs_stay(self, loaded: Database, cache: ModelCache) -> None:
        build_index(loaded, cache, VectorTable(loaded).spec, BITS)
        used = execute(loaded.adbc_uri, MADE)
        assert len(used) == 1
        with loaded.get_connection() as connection:
            begun, left = [bits.create_function(connection, str([value] * DIMENSIONS)) for value in (0.1, 0.2)]
            VectorTable(loaded, "song_embeddings_new").write(
                connection, "building", {"n_changed": 1, "function": begun}
            )
        with loaded.get_connection() as connection:
            bits.drop_unused(connection)
        assert {name for (name,) in execute(loaded.adbc_uri, MADE)} == {used[0][0], begun}
        with pytest.raises(psycopg2.errors.DependentObjectsStillExist):
            execute(loaded.adbc_uri, f"DROP FUNCTION songvec.{used[0][0]}")
        assert left not in {name for (name,) in execute(loaded.adbc_uri, MADE)}

    @pytest.mark.parametrize("kind", ["ivfflat", "hnsw_bit"])
    def test_an_index_of_another_mean_or_kind_takes_the_last_ones_with_it(
        self, loaded: Database, cache: ModelCache, kind: str
    ) -> None:
        build_index(loaded, cache, VectorTable(loaded).spec, BITS)
        before = execute(loaded.adbc_uri, MADE)
        execute(loaded.adbc_uri, "DELETE FROM song_embeddings WHERE song_id % 3 = 0")
        build_index(loaded, cache, VectorTable(loaded).spec, IndexSettings(kind=kind))
        after = execute(loaded.adbc_uri, MADE)
        assert len(after) == (kind != "ivfflat")
        assert not {*before} & {*after}


class TestDrift:
    def test_it_is_the_distance_of_the_means_relative_to_the_spread(self, loaded: Database, cache: ModelCache) -> None:
        def read() -> float | None:
            with loaded.get_connection() as connection:
                return bits.read_drift(connection, VectorTable(loaded))

        assert read() is None, "there is no index"
        build_index(loaded, cache, VectorTable(loaded).spec)
        assert read() is None, "it is none by bits"
        build_index(loaded, cache, VectorTable(loaded).spec, BITS)
        assert read() == pytest.approx(0, abs=1e-6)
        before = read_mean(loaded)
        spread = (1 - np.linalg.norm(before) ** 2) ** 0.5
        execute(loaded.adbc_uri, "DELETE FROM song_embeddings WHERE song_id % 2 = 0")
        after = read_mean(loaded)
        assert read() == pytest.approx(np.linalg.norm(after - before) / spread, rel=1e-3)

    def test_it_is_measured_with_recall_checked_and_a_reason_to_build(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(200))
        load(database, cache)
        first = build_index(database, cache, SPEC, BITS)
        assert first.recall is not None
        assert first.recall.drift == pytest.approx(0, abs=1e-6)
        _replace(database, cache, range(30), np.abs)
        # under a fifth of the rows: only their mean can tell
        report = build_index(database, cache, SPEC, BITS)
        assert report.built
        assert "the mean of the vectors has moved by " in report.reason
        assert report.recall is not None
        assert report.recall.drift == pytest.approx(0, abs=1e-6)
        assert not build_index(database, cache, SPEC, BITS).built


def _replace(
    database: Database, cache: ModelCache, song_ids: range, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Give songs other vectors, in the cache and the table."""
    from songvec_assets_tests.vectors import conftest

    make = conftest.make_vector
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conftest, "make_vector", lambda *given: change(make(*given)).astype(np.float32))
        put(cache, song_ids, version=1)
    load(database, cache)
