"""A table holds one model, size and type, and what is recorded about it may be of another version."""

from pathlib import Path

import numpy as np
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import (
    TableMismatchError,
)
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import write_value
from songvec_assets.settings import DEMO_MODEL, OFFLINE_MODEL
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.index.audit import audit_recall
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.vectors.table import TableSpec, VectorTable, describe_tables
from songvec_assets_tests.administration import execute
from songvec_assets_tests.vectors.conftest import (
    DIMENSIONS,
    FIRST,
    SECOND,
    SPEC,
    load,
    make_vector,
    put,
    read_vectors,
    vectors_of,
)
from songvec_assets_tests.vectors.indexes import build_index

HALF = TableSpec("model-a", DIMENSIONS, "halfvec")


class TestMismatch:
    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (TableSpec("model-b", DIMENSIONS), "SONGVEC_EMBEDDING_MODEL=model-a"),
            (TableSpec("model-a", 16), "SONGVEC_EMBEDDING_DIMENSIONS"),
            (TableSpec("model-a", DIMENSIONS, "halfvec"), "SONGVEC_VECTOR_TYPE"),
        ],
    )
    def test_another_model_size_or_type_is_refused_and_changes_nothing(
        self, database: Database, cache: ModelCache, tmp_path: Path, spec: TableSpec, words: str
    ) -> None:
        put(cache, [1, 2])
        load(database, cache)
        other = ModelCache(LocalStorage(tmp_path / "other"), spec.model, spec.dimensions)
        put(other, [1, 2, 3])
        for refuse in (lambda: VectorTable(database).check(spec), lambda: load(database, other, spec)):
            with pytest.raises(TableMismatchError, match=words):
                refuse()
        assert read_vectors(database) == vectors_of([1, 2])
        assert VectorTable(database).spec == SPEC
        VectorTable(database).check(SPEC)

    @pytest.mark.parametrize(
        "columns", ["song_id bigint, embedding vector(8)", "song_id integer, vec vector(8)", "id integer"]
    )
    def test_a_table_of_other_columns_is_refused_with_what_it_has(self, database: Database, columns: str) -> None:
        execute(database.adbc_uri, f"CREATE TABLE song_embeddings ({columns})")
        with pytest.raises(TableMismatchError, match=r"expected \{'song_id': 'integer', 'embedding': 'vector\(8\)'\}"):
            VectorTable(database).check(SPEC)

    def test_before_the_first_load_nothing_is_refused(self, database: Database) -> None:
        VectorTable(database).check(SPEC)
        assert VectorTable(database).spec is None

    def test_the_table_that_was_made_beforehand_is_taken_and_then_held_to_its_model(
        self, database: Database, cache: ModelCache
    ) -> None:
        execute(
            database.adbc_uri,
            f"""
            CREATE TABLE song_embeddings (song_id integer PRIMARY KEY, embedding vector({DIMENSIONS}) NOT NULL,
                                          created_at timestamp DEFAULT now())
            """,
        )
        put(cache, [1, 2])
        load(database, cache)
        assert read_vectors(database) == vectors_of([1, 2])
        assert VectorTable(database).spec == SPEC
        with pytest.raises(TableMismatchError, match="model-a"):
            VectorTable(database).check(TableSpec("model-b", DIMENSIONS))

    def test_a_table_into_which_nothing_was_loaded_takes_another_model_for_good(
        self, database: Database, tmp_path: Path
    ) -> None:
        VectorTable(database).ensure(SPEC)
        other = TableSpec("model-b", DIMENSIONS)
        cache = ModelCache(LocalStorage(tmp_path), other.model, other.dimensions)
        put(cache, [1, 2])
        load(database, cache, other)
        assert VectorTable(database).spec == other
        assert load(database, cache, other) == {FIRST.key: (2, 0, 0)}

    @pytest.mark.parametrize(
        ("local", "other"), [(OFFLINE_MODEL, "model-b"), (OFFLINE_MODEL, DEMO_MODEL), (DEMO_MODEL, "model-b")]
    )
    def test_a_local_models_table_in_the_embedded_database_is_replaced(
        self, database: Database, tmp_path: Path, local: str, other: str
    ) -> None:
        embedded, offline = Database(database.url, embedded=True), TableSpec(local, DIMENSIONS)
        cache = ModelCache(LocalStorage(tmp_path / "offline"), offline.model, offline.dimensions)
        put(cache, [1, 2])
        load(embedded, cache, offline)
        spec = TableSpec(other, 16, "halfvec")
        better = ModelCache(LocalStorage(tmp_path / "better"), spec.model, spec.dimensions)
        put(better, [1, 101])
        VectorTable(embedded).check(spec)
        with pytest.raises(TableMismatchError):
            VectorTable(database).check(spec)
        assert load(embedded, better, spec) == {FIRST.key: (1, 1, 0), SECOND.key: (1, 1, 0)}
        assert set(read_vectors(embedded)) == {1, 101}
        assert VectorTable(embedded).spec == spec

    def test_what_gives_way_to_another_type_of_the_same_model_is_loaded_again(
        self, database: Database, tmp_path: Path
    ) -> None:
        embedded, offline = Database(database.url, embedded=True), TableSpec(OFFLINE_MODEL, DIMENSIONS)
        cache = ModelCache(LocalStorage(tmp_path / "offline"), offline.model, offline.dimensions)
        put(cache, [1, 101])
        load(embedded, cache, TableSpec(OFFLINE_MODEL, DIMENSIONS, "halfvec"))
        assert load(embedded, cache, offline) == {FIRST.key: (1, 1, 0), SECOND.key: (1, 1, 0)}
        assert read_vectors(embedded) == vectors_of([1, 101])

    def test_a_table_that_was_paid_for_gives_way_nowhere(self, database: Database, cache: ModelCache) -> None:
        embedded = Database(database.url, embedded=True)
        put(cache, [1, 2])
        load(embedded, cache)
        for spec in (TableSpec(OFFLINE_MODEL, DIMENSIONS), TableSpec("model-b", DIMENSIONS), TableSpec("model-a", 16)):
            for refuse in (VectorTable(embedded).check, VectorTable(embedded).ensure):
                with pytest.raises(TableMismatchError):
                    refuse(spec)
        assert read_vectors(embedded) == vectors_of([1, 2])


class TestRecords:
    """What another version recorded with other fields counts as not recorded, and stops nothing."""

    @pytest.mark.parametrize("value", [{}, {"model": 7}, {"of": "another version"}, [1, 2], "text", True])
    def test_none_of_them_stops_a_look_a_load_or_a_build(
        self, database: Database, cache: ModelCache, value: object
    ) -> None:
        put(cache, range(60))
        load(database, cache)
        build_index(database, cache)
        names = ("table", "rows_changed_since_index", "index", "building", "probes", "candidates", "recall")
        with database.get_connection() as connection:
            for name in names:
                write_value(connection, name, value)
        table = VectorTable(database)
        assert table.spec is None
        assert describe_tables(database) == {"song_embeddings": "nothing that was loaded"}
        assert table.index is not None
        with database.get_connection() as connection:
            assert read_recall(connection, table) is None
        measured = audit_recall(table, cache, 0.95)
        assert measured is not None
        assert measured.reached
        put(cache, [1, 2], version=1)
        assert load(database, cache) == {FIRST.key: (60, 2, 2)}
        assert table.spec == SPEC
        assert build_index(database, cache).recall is not None
        with database.get_connection() as connection:
            assert table.read_changes(connection) == 2

    def test_the_ledger_still_keeps_another_model_out(self, database: Database, cache: ModelCache) -> None:
        put(cache, [1, 2])
        load(database, cache)
        with database.get_connection() as connection:
            write_value(connection, "table", {"of": "another version"})
        with pytest.raises(TableMismatchError, match="'model-a', the configured model is 'model-b'"):
            VectorTable(database).check(TableSpec("model-b", DIMENSIONS))


class TestColumn:
    def test_the_column_has_the_configured_size_and_stays_in_its_row(self, database: Database) -> None:
        VectorTable(database).ensure(TableSpec("model-a", 2000))
        column = """
            SELECT format_type(atttypid, atttypmod), attstorage, attnotnull FROM pg_attribute
            WHERE attrelid = 'song_embeddings'::regclass AND attname = 'embedding'
        """
        assert execute(database.adbc_uri, column) == [("vector(2000)", "p", True)]
        insert = "INSERT INTO song_embeddings VALUES (1, array_fill(0.5, ARRAY[2000])::vector)"
        execute(database.adbc_uri, insert)
        pages = "SELECT pg_relation_size('song_embeddings'), pg_column_size(embedding) FROM song_embeddings"
        assert execute(database.adbc_uri, pages) == [(8192, 8008)]

    def test_other_columns_are_what_the_design_says(self, database: Database) -> None:
        VectorTable(database).ensure(SPEC)
        columns = """
            SELECT column_name, data_type, is_nullable, column_default FROM information_schema.columns
            WHERE table_name = 'song_embeddings' AND column_name <> 'embedding' ORDER BY ordinal_position
        """
        assert execute(database.adbc_uri, columns) == [
            ("song_id", "integer", "NO", None),
            ("created_at", "timestamp without time zone", "NO", "now()"),
        ]
        keys = "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'p'"
        assert ("song_embeddings_pkey", "PRIMARY KEY (song_id)") in execute(database.adbc_uri, keys)

    def test_halfvec_holds_the_nearest_half_precision_values(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(30))
        assert load(database, cache, HALF) == {FIRST.key: (30, 30, 0)}
        expected = {song_id: make_vector(song_id).astype(np.float16) for song_id in range(30)}
        rows = execute(database.adbc_uri, "SELECT song_id, embedding::vector::real[] FROM song_embeddings")
        assert {song_id: np.float16(values).tolist() for song_id, values in rows} == {
            song_id: values.tolist() for song_id, values in expected.items()
        }
        kind = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'embedding' AND attnum = 2"
        assert ("halfvec(8)",) in execute(database.adbc_uri, kind)
        assert load(database, cache, HALF) == {FIRST.key: (30, 0, 0)}
