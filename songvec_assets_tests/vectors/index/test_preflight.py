"""What cannot be loaded or indexed is refused before the provider is asked, with the statement that helps."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import DatabaseError, SettingsError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.search.nearest import check_searchable, search_songs
from songvec_assets.search.query import Query
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.preflight import check_target
from songvec_assets.vectors.swap import WantedTable, bring_table_up_to_date, roll_back
from songvec_assets.vectors.table import STAGING, TableSpec, VectorTable
from songvec_assets_tests.administration import as_role, dispose, execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.vectors.conftest import (
    SPEC,
    TILING,
    load,
    make_vector,
    put,
    read_vectors,
    source_of,
    vectors_of,
)
from songvec_assets_tests.vectors.indexes import build_index

WIDE = TableSpec("model-a", 2000)
HALF = TableSpec(SPEC.model, SPEC.dimensions, "halfvec")


def run(pipeline: Pipeline) -> None:
    """Export, embed, load and index, as the jobs do."""
    pipeline.export()
    errors: list[Exception] = []
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda filled: errors.extend(filter(None, [filled.error])))
    if errors:
        raise errors[0]
    pipeline.load()
    pipeline.build_index()


def name_of(database: Database) -> str:
    return str(sa.make_url(database.url).database)


def helping_statement(words: str) -> str:
    """What a message says to run."""
    found = re.search(r"run (.+?)(?:; and|; or|, or|$)", words)
    assert found, words
    return found[1]


@contextlib.contextmanager
def scratch_tables(database: Database) -> Iterator[list[str]]:
    """Those that are made while the block runs."""
    made: list[str] = []

    def listen(*arguments: object) -> None:
        found = re.search(r"CREATE TABLE (songvec_preflight_\w+)", str(arguments[2]))
        if found:
            made.append(found[1])

    engine = database.get_engine()
    sa.event.listen(engine, "before_cursor_execute", listen)
    try:
        yield made
    finally:
        sa.event.remove(engine, "before_cursor_execute", listen)


def left_behind(database: Database) -> list[tuple]:
    return execute(database.adbc_uri, "SELECT relname FROM pg_class WHERE relname ~ 'preflight'")


class TestSearchPath:
    def test_an_extension_in_a_schema_that_is_not_searched_is_refused_before_payment_and_works_as_told(
        self, database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path
    ) -> None:
        songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in range(1, 31)))
        execute(database.adbc_uri, 'CREATE SCHEMA "Ext"; ALTER EXTENSION vector SET SCHEMA "Ext"')
        pipeline = make_pipeline(database, provider, tmp_path / "store")
        with pytest.raises(DatabaseError, match=r'in schema "Ext", which is not in this user') as refused:
            run(pipeline)
        assert provider.ledger()["requests"] == 0
        execute(database.adbc_uri, helping_statement(str(refused.value)))
        dispose(database.url)
        run(make_pipeline(database, provider, tmp_path / "store"))
        assert len(execute(database.adbc_uri, "SELECT song_id FROM song_embeddings")) == 30
        assert VectorTable(database).index is not None

    def test_a_load_alone_and_a_search_say_it_too(
        self, database: Database, cache: ModelCache, tmp_path: Path, songs: Callable[..., None],
        provider: Provider,
    ) -> None:  # fmt: skip
        songs((1, "Song", "Ann", "la"))
        put(cache, range(30))
        load(database, cache)
        execute(database.adbc_uri, "CREATE SCHEMA ext; ALTER EXTENSION vector SET SCHEMA ext")
        dispose(database.url)
        put(cache, range(40))
        with pytest.raises(DatabaseError, match="SET search_path ="):
            bring_table_up_to_date(database, source_of(cache), WantedTable(SPEC))
        with pytest.raises(DatabaseError, match=r"ALTER ROLE .+ SET search_path = .+, ext;"):
            check_searchable(database, SPEC)
        source = make_pipeline(database, provider, tmp_path / "store").source
        assert [hit.song_id for hit in search_songs(database, source, Query(make_vector(1)))] == [1]

    def test_a_schema_that_the_user_may_not_use(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE SCHEMA ext; ALTER EXTENSION vector SET SCHEMA ext")
        execute(database.adbc_uri, f"ALTER DATABASE {name_of(database)} SET search_path = public, ext")
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            execute(database.adbc_uri, f"GRANT CREATE ON SCHEMA public TO {role}; {RIGHTS.format(role=role)}")
            with pytest.raises(DatabaseError, match="which this user may not use") as refused:
                VectorTable(seen).ensure(SPEC)
            execute(database.adbc_uri, helping_statement(str(refused.value)))
            VectorTable(seen).ensure(SPEC)

    def test_a_table_that_is_built_is_made_where_the_serving_one_is(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(150))
        load(database, cache)
        execute(
            database.adbc_uri, f"CREATE SCHEMA mine; ALTER DATABASE {name_of(database)} SET search_path = mine, public"
        )
        dispose(database.url)
        bring_table_up_to_date(database, source_of(cache), WantedTable(HALF, may_swap=True))
        places = "SELECT tablename, schemaname FROM pg_tables WHERE tablename ~ '^song_emb'"
        assert sorted(execute(database.adbc_uri, places)) == [
            ("song_embeddings", "public"),
            ("song_embeddings_old", "public"),
        ]
        roll_back(database)
        assert read_vectors(database) == vectors_of(range(150))


RIGHTS = """
    GRANT USAGE ON SCHEMA songvec TO {role};
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA songvec TO {role};
"""
CREATE = """
    CREATE TABLE song_embeddings (
        song_id integer PRIMARY KEY, embedding vector(8) NOT NULL, created_at timestamp NOT NULL DEFAULT now()
    )
"""


class TestRights:
    @pytest.mark.parametrize(
        ("before", "words"),
        [
            ("REVOKE INSERT ON songvec.loaded_ranges FROM {role}", "may not read and write songvec.loaded_ranges"),
            ("REVOKE CREATE ON SCHEMA public FROM {role}", "may not create tables and indexes in schema public"),
            (CREATE, "may not read and write song_embeddings"),
            (f"{CREATE}; GRANT ALL ON song_embeddings TO {{role}}", "only its owner may index"),
            (f"{CREATE}; ALTER TABLE song_embeddings OWNER TO {{role}}; ALTER TABLE song_embeddings "
             "ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY", "row security of table"),
        ],
    )  # fmt: skip
    def test_each_that_is_missing_is_named_and_what_is_said_helps(
        self, database: Database, before: str, words: str
    ) -> None:
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            execute(database.adbc_uri, f"GRANT CREATE ON SCHEMA public TO {role}; {RIGHTS.format(role=role)}")
            check_target(VectorTable(seen), SPEC, IndexSettings(), 100)
            execute(database.adbc_uri, before.format(role=role))
            with pytest.raises(DatabaseError, match=words) as refused:
                check_target(VectorTable(seen), SPEC, IndexSettings(), 100)
            execute(database.adbc_uri, helping_statement(str(refused.value)))
            with contextlib.suppress(DatabaseError):
                check_target(VectorTable(seen), SPEC, IndexSettings(), 100)
                return
            # a table that may be written belongs to somebody else still
            with pytest.raises(DatabaseError, match="only its owner") as refused:
                check_target(VectorTable(seen), SPEC, IndexSettings(), 100)
            execute(database.adbc_uri, str(refused.value).partition(", or ")[2])
            check_target(VectorTable(seen), SPEC, IndexSettings(), 100)

    def test_a_user_that_may_only_read_pays_for_nothing(
        self, database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path
    ) -> None:
        songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in range(1, 31)))
        make_pipeline(database, provider, tmp_path / "store").export()
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            execute(
                database.adbc_uri,
                f"GRANT USAGE ON SCHEMA songvec TO {role}; GRANT SELECT ON songs TO {role};"
                f"GRANT SELECT ON ALL TABLES IN SCHEMA songvec TO {role}",
            )
            with pytest.raises(DatabaseError, match="lacks a right"):
                run(make_pipeline(seen, provider, tmp_path / "store"))
        assert provider.ledger()["requests"] == 0

    def test_who_only_loads_a_few_rows_need_not_own_the_table(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(150))
        load(database, cache)
        build_index(database, cache, SPEC)
        put(cache, range(10), version=1)
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            execute(database.adbc_uri, f"{RIGHTS.format(role=role)}; GRANT ALL ON song_embeddings TO {role}")
            bring_table_up_to_date(seen, source_of(cache), WantedTable(SPEC))
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(10), 1))


class TestScratchTable:
    def test_nothing_is_left_and_two_at_once_do_not_meet(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(30))
        load(database, cache)
        rows = read_vectors(database)
        with scratch_tables(database) as made:
            threads = [
                threading.Thread(target=check_target, args=(VectorTable(database), SPEC, IndexSettings(), 30))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(set(made)) == len(made) == 4
        assert left_behind(database) == []
        assert read_vectors(database) == rows

    @pytest.mark.parametrize(
        "spec", [SPEC, HALF, WIDE, TableSpec("wide", 4000, "halfvec")], ids=lambda spec: spec.column_type
    )
    def test_what_can_be_indexed_passes(self, database: Database, spec: TableSpec) -> None:
        check_target(VectorTable(database), spec, IndexSettings(), 1_000)
        assert left_behind(database) == []

    def test_what_pgvector_cannot_index_is_said_with_the_servers_words(self, database: Database) -> None:
        with pytest.raises(DatabaseError, match=r"a table of vector\(8192\) cannot be made and indexed.*2000"):
            check_target(VectorTable(database), TableSpec("model-a", 8192), IndexSettings(), 1_000)
        assert left_behind(database) == []

    def test_an_event_trigger_that_forbids_indexes_is_found(self, database: Database) -> None:
        execute(
            database.adbc_uri,
            """
            CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'ask Ann first'; END $$;
            CREATE EVENT TRIGGER no_indexes ON ddl_command_start WHEN tag IN ('CREATE INDEX') EXECUTE FUNCTION forbid();
            """,
        )
        try:
            with pytest.raises(DatabaseError, match=r"nothing was sent or loaded.*ask Ann first"):
                check_target(VectorTable(database), SPEC, IndexSettings(), 1_000)
        finally:
            execute(database.adbc_uri, "DROP EVENT TRIGGER no_indexes; DROP FUNCTION forbid()")

    def test_through_a_pooler(self, database: Database) -> None:
        with running_pgbouncer(database.url) as url:
            check_target(VectorTable(Database(url)), SPEC, IndexSettings(), 1_000)
            dispose(url)
        assert left_behind(database) == []

    def test_one_a_run_that_pays_or_loads_and_none_where_nothing_is_to_be_done(
        self, database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path
    ) -> None:
        songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in range(1, 250)))
        pipeline = make_pipeline(database, provider, tmp_path / "store")
        with scratch_tables(database) as made:
            pipeline.export()
            pipeline.filler().fill_ranges(list(TILING), lambda _: None)
            assert len(made) == 1
            pipeline.load()
            pipeline.build_index()
            assert len(made) == 2
            run(pipeline)
            assert len(made) == 2


class TestRoom:
    def test_memory_for_not_even_one_list_is_wanting_before_payment(
        self, database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path
    ) -> None:
        songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in range(1, 31)))
        with pytest.raises(DatabaseError, match="raise SONGVEC_INDEX_MEMORY_MB"):
            run(make_pipeline(database, provider, tmp_path / "store", index_memory_mb=64, embedding_dimensions=2000))
        assert provider.ledger()["requests"] == 0

    def test_lists_that_do_not_fit(self, database: Database) -> None:
        with pytest.raises(SettingsError, match="SONGVEC_LISTS"):
            check_target(VectorTable(database), WIDE, IndexSettings(lists=10_000, memory_bytes=2**30), 1_000_000)

    def test_a_disk_that_is_too_small_for_rows_and_index(self, database: Database) -> None:
        settings = IndexSettings(memory_bytes=2**50)
        check_target(VectorTable(database), WIDE, settings, 1_000)
        with pytest.raises(DatabaseError, match=r"the build needs .* for the rows to come, .* are free"):
            check_target(VectorTable(database), WIDE, settings, 10**9)

    def test_a_limit_of_temporary_files(self, database: Database) -> None:
        execute(database.adbc_uri, f"ALTER DATABASE {name_of(database)} SET temp_file_limit = '1MB'")
        dispose(database.url)
        with pytest.raises(DatabaseError, match="temp_file_limit is 1 MiB"):
            check_target(VectorTable(database), WIDE, IndexSettings(), 1_000_000)

    def test_where_nothing_is_to_be_built_no_room_is_needed(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(150))
        load(database, cache)
        build_index(database, cache, SPEC)
        execute(database.adbc_uri, f"ALTER DATABASE {name_of(database)} SET temp_file_limit = '1kB'")
        dispose(database.url)
        with scratch_tables(database) as made:
            check_target(VectorTable(database), SPEC, IndexSettings(), 160)
        assert made == []
        with pytest.raises(DatabaseError, match="temp_file_limit"):
            check_target(VectorTable(database, STAGING), WIDE, IndexSettings(), 1_000_000)
