"""What searches find equals the cache, whether rows went in under the index or a staging table was swapped."""

import contextlib
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, read_embeddings_from_file
from songvec_assets.cache.parts import CachedRows
from songvec_assets.cli import app, base
from songvec_assets.errors import DamagedCacheError, DatabaseError, StoppedError, TableMismatchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres import short_lock
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import lock_key
from songvec_assets.postgres.short_lock import run_with_short_lock
from songvec_assets.progress import Progress, ReportProgress, RunContext, StopSignal, ignore_progress
from songvec_assets.songs.content import SNAPSHOT_SCHEMA
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors import swap
from songvec_assets.vectors.index.audit import Comparison
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.load import store_embeddings_batch, store_embeddings_copy_bulk
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.swap import (
    LOCK,
    LoadReport,
    WantedTable,
    bring_table_up_to_date,
    check_loadable,
    drop_others,
    find_attachments,
    put_in_place,
    roll_back,
)
from songvec_assets.vectors.table import PREVIOUS, SERVING, STAGING, TableSpec, VectorTable
from songvec_assets_tests.administration import as_role, dispose, execute, wait_until
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.vectors.conftest import (
    DIMENSIONS,
    FIRST,
    SECOND,
    SPEC,
    TILING,
    CallingStop,
    assert_ledger_fits_table,
    complete,
    files_of,
    forget,
    put,
    read_vectors,
    reject,
    vectors_of,
)
from songvec_assets_tests.vectors.indexes import build_index, running

OTHER = TableSpec("model-b", 16)
HALF = TableSpec(SPEC.model, DIMENSIONS, "halfvec")


@pytest.fixture
def songs_folder(tmp_path: Path) -> Path:
    """Snapshots; none yet."""
    folder = tmp_path / "songs"
    folder.mkdir()
    return folder


@pytest.fixture
def other_cache(tmp_path: Path) -> ModelCache:
    """An empty cache of OTHER's model."""
    return ModelCache(LocalStorage(tmp_path / "other"), OTHER.model, OTHER.dimensions)


def load_table(
    database: Database,
    cache: ModelCache,
    songs_folder: Path,
    spec: TableSpec = SPEC,
    tiling: Tiling = TILING,
    *,
    swap: bool = False,
    staged_from_rows: int = 20,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
) -> LoadReport:
    """Load and index as the graph does; tables are staged from 20 changed rows on."""
    wanted = WantedTable(spec, IndexSettings(), swap, staged_from_rows)
    run = RunContext(progress, stop or StopSignal())
    report = bring_table_up_to_date(
        database, LoadSource(cache, tiling, Snapshots(LocalStorage(songs_folder))), wanted, run
    )
    build_index(database, cache, spec)
    return report


def relations(database: Database) -> set[str]:
    """Our tables and their indexes."""
    statement = "SELECT relname FROM pg_class WHERE relname ~ '^(song_embeddings|embeddings_ivfflat)'"
    return {name for (name,) in execute(database.adbc_uri, statement)}


ALONE = {"song_embeddings", "song_embeddings_pkey", "embeddings_ivfflat_idx"}
BOTH = ALONE | {"song_embeddings_old", "song_embeddings_old_pkey", "embeddings_ivfflat_idx_old"}


def oid_of(database: Database, table: str = SERVING) -> int:
    """What distinguishes a table from another that took its name."""
    return int(execute(database.adbc_uri, f"SELECT '{table}'::regclass::oid")[0][0])


class TestPlace:
    def test_the_first_load_goes_into_the_table_itself(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        report = load_table(database, cache, songs_folder)
        assert report.target.table.name == SERVING
        assert read_vectors(database) == vectors_of(range(150))
        assert relations(database) == ALONE

    def test_a_small_change_goes_in_under_the_index(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        before = oid_of(database)
        put(cache, range(10), version=1)
        report = load_table(database, cache, songs_folder)
        assert report.target.table.name == SERVING
        assert "10 of 150 rows changed" in report.target.reason
        assert oid_of(database) == before
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(10), 1))

    def test_a_large_change_is_staged_and_swapped_in_with_index_and_records(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        before = oid_of(database)
        put(cache, range(80), version=1)
        report = load_table(database, cache, songs_folder)
        assert (report.target.table.name, report.target.keep) == (STAGING, False)
        assert oid_of(database) != before
        assert relations(database) == ALONE
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))
        assert_ledger_fits_table(database)
        index = VectorTable(database).index
        assert index is not None
        assert index.n_rows == 150
        with database.get_connection() as connection:
            assert VectorTable(database).read_changes(connection) == 0
            assert VectorTable(database).read_probes(connection) == index.probes
        keys = execute(database.adbc_uri, "SELECT key FROM songvec.settings WHERE key LIKE 'song_embeddings%'")
        assert keys == []
        assert load_table(database, cache, songs_folder).loads == [*report.loads[:0], *loads_of_rerun(report)]

    def test_what_people_hung_on_the_table_keeps_it_in_its_place(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        execute(database.adbc_uri, 'CREATE VIEW "Hot: 100%" AS SELECT song_id FROM song_embeddings')
        put(cache, range(80), version=1)
        report = load_table(database, cache, songs_folder)
        assert report.target.table.name == SERVING
        assert "Hot: 100%" in report.target.reason
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))


def loads_of_rerun(report: LoadReport) -> list[object]:
    """The loads of a rerun that has nothing to do."""
    return [type(each)(each.range, each.n_rows) for each in report.loads]


ATTACHMENTS = {
    "view seen": ("CREATE VIEW seen AS SELECT * FROM song_embeddings", "DROP VIEW seen"),
    "index by_time": ("CREATE INDEX by_time ON song_embeddings (created_at)", "DROP INDEX by_time"),
    "column note": (
        "ALTER TABLE song_embeddings ADD COLUMN note text",
        "ALTER TABLE song_embeddings DROP COLUMN note",
    ),
    "foreign key liked_song_id_fkey": (
        "CREATE TABLE liked (song_id integer REFERENCES song_embeddings)",
        "DROP TABLE liked",
    ),
    "row security": (
        "ALTER TABLE song_embeddings ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE song_embeddings DISABLE ROW LEVEL SECURITY",
    ),
    "row security of its owner": (
        "ALTER TABLE song_embeddings FORCE ROW LEVEL SECURITY",
        "ALTER TABLE song_embeddings NO FORCE ROW LEVEL SECURITY",
    ),
    "policy secret on table song_embeddings": (
        "CREATE POLICY secret ON song_embeddings USING (song_id < 10)",
        "DROP POLICY secret ON song_embeddings",
    ),
    "trigger noted": (
        """
        CREATE TRIGGER noted AFTER UPDATE ON song_embeddings EXECUTE FUNCTION suppress_redundant_updates_trigger();
        ALTER TABLE song_embeddings DISABLE TRIGGER noted
        """,
        "DROP TRIGGER noted ON song_embeddings",
    ),
    "rule quiet": (
        "CREATE RULE quiet AS ON DELETE TO song_embeddings WHERE old.song_id < 0 DO ALSO NOTHING",
        "DROP RULE quiet ON song_embeddings",
    ),
    "constraint even": (
        "ALTER TABLE song_embeddings ADD CONSTRAINT even CHECK (song_id >= 0) NOT VALID",
        "ALTER TABLE song_embeddings DROP CONSTRAINT even",
    ),
    "index embeddings_ivfflat_idx_of_ann": (
        "CREATE INDEX embeddings_ivfflat_idx_of_ann ON song_embeddings (created_at)",
        "DROP INDEX embeddings_ivfflat_idx_of_ann",
    ),
    "default of column created_at": (
        "ALTER TABLE song_embeddings ALTER created_at SET DEFAULT now() AT TIME ZONE 'utc'",
        "ALTER TABLE song_embeddings ALTER created_at SET DEFAULT now()",
    ),
    "replica identity": (
        "ALTER TABLE song_embeddings REPLICA IDENTITY FULL",
        "ALTER TABLE song_embeddings REPLICA IDENTITY DEFAULT",
    ),
    "publication feed": (
        "CREATE PUBLICATION feed FOR TABLE song_embeddings",
        "DROP PUBLICATION feed",
    ),
    "table child": ("CREATE TABLE child () INHERITS (song_embeddings)", "DROP TABLE child"),
    "parent parent": (
        "CREATE TABLE parent (song_id integer NOT NULL); ALTER TABLE song_embeddings INHERIT parent",
        "ALTER TABLE song_embeddings NO INHERIT parent; DROP TABLE parent",
    ),
    "view kept": (
        "CREATE MATERIALIZED VIEW kept AS SELECT song_id FROM song_embeddings",
        "DROP MATERIALIZED VIEW kept",
    ),
    "function n_songs()": (
        "CREATE FUNCTION n_songs() RETURNS bigint RETURN (SELECT count(*) FROM song_embeddings)",
        "DROP FUNCTION n_songs()",
    ),
    "column row of table copies": ("CREATE TABLE copies (row song_embeddings)", "DROP TABLE copies"),
    "sequence numbers": (
        "CREATE SEQUENCE numbers OWNED BY song_embeddings.song_id",
        "DROP SEQUENCE numbers",
    ),
}
"""What people hang on a table, by the words that name it: how it comes, and how it goes."""


@pytest.mark.slow
class TestAttachments:
    def test_each_is_found_and_stops_a_swap_before_anything_is_paid_for(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(30))
        load_table(database, cache, songs_folder)
        for named, (statement, undo) in ATTACHMENTS.items():
            with database.get_connection() as connection:
                assert find_attachments(connection, VectorTable(database)) == []
            execute(database.adbc_uri, statement)
            with database.get_connection() as connection:
                assert find_attachments(connection, VectorTable(database)) == [named]
            with pytest.raises(TableMismatchError, match=re.escape(named)):
                check_loadable(database, WantedTable(OTHER, may_swap=True))
            execute(database.adbc_uri, undo)

    @pytest.mark.parametrize("named", ["policy secret on table song_embeddings", "trigger noted", "function n_songs()"])
    def test_what_comes_during_a_build_stops_the_swap_and_the_next_run_goes_on_from_there(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path, named: str
    ) -> None:
        put(cache, range(150))
        put(other_cache, range(150))
        load_table(database, cache, songs_folder)
        serving = oid_of(database)
        statement, undo = ATTACHMENTS[named]
        at_build = once(lambda: execute(database.adbc_uri, statement))

        def listen(progress: Progress) -> None:
            if progress.step == "build index":
                at_build()

        with pytest.raises(TableMismatchError, match=re.escape(named)):
            load_table(database, other_cache, songs_folder, OTHER, swap=True, progress=listen)
        assert (oid_of(database), VectorTable(database).spec) == (serving, SPEC)
        with database.get_connection() as connection:
            assert find_attachments(connection, VectorTable(database)) == [named]
        built = oid_of(database, STAGING)
        execute(database.adbc_uri, undo)
        report = load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert (oid_of(database), VectorTable(database).spec) == (built, OTHER)
        assert report.index is not None
        assert not report.index.built

    def test_a_large_change_is_stopped_too_and_nothing_of_it_is_lost(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        put(cache, range(80), version=1)
        statement, undo = ATTACHMENTS["row security"]
        at_build = once(lambda: execute(database.adbc_uri, statement))

        def listen(progress: Progress) -> None:
            if progress.step == "build index":
                at_build()

        with pytest.raises(TableMismatchError, match="row security"):
            load_table(database, cache, songs_folder, progress=listen)
        assert read_vectors(database) == vectors_of(range(150))
        execute(database.adbc_uri, undo)
        built = oid_of(database, STAGING)
        load_table(database, cache, songs_folder)
        assert oid_of(database) == built
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))

    def test_the_way_back_does_not_leave_them_behind_either(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(30))
        load_table(database, cache, songs_folder)
        load_table(database, cache, songs_folder, HALF, swap=True)
        for named in ("view seen", "row security", "trigger noted"):
            statement, undo = ATTACHMENTS[named]
            execute(database.adbc_uri, statement)
            with pytest.raises(TableMismatchError, match=named):
                roll_back(database)
            assert VectorTable(database).spec == HALF
            execute(database.adbc_uri, undo)
        assert roll_back(database) == SPEC

    def test_rows_that_somebody_else_put_there_keep_the_table_in_its_place(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        execute(
            database.adbc_uri,
            "INSERT INTO song_embeddings (song_id, embedding) SELECT 700, embedding FROM song_embeddings LIMIT 1",
        )
        put(cache, range(80), version=1)
        report = load_table(database, cache, songs_folder)
        assert report.target.table.name == SERVING
        assert "1 rows that somebody else wrote there" in report.target.reason
        assert 700 in read_vectors(database)


def once(act: Callable[[], object]) -> Callable[[], None]:
    """Does it at the first call only."""
    acts = [act]

    def call() -> None:
        if acts:
            acts.pop()()

    return call


_PROPERTIES = {
    "table grants": "SELECT grantee, privilege_type, is_grantable FROM information_schema.role_table_grants "
    "WHERE table_name = 'song_embeddings' ORDER BY 1, 2",
    "column grants": "SELECT attname, attacl FROM pg_attribute "
    "WHERE attrelid = 'song_embeddings'::regclass AND attacl IS NOT NULL",
    "owner": "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'song_embeddings'::regclass",
    "options": "SELECT reloptions FROM pg_class WHERE oid = 'song_embeddings'::regclass",
    "columns": "SELECT attname, attstattarget, attoptions, col_description(attrelid, attnum) FROM pg_attribute "
    "WHERE attrelid = 'song_embeddings'::regclass AND attnum > 0 ORDER BY attnum",
    "comment": "SELECT obj_description('song_embeddings'::regclass, 'pg_class')",
    "extended statistics": "SELECT stxname, stxkeys::text FROM pg_statistic_ext "
    "WHERE stxrelid = 'song_embeddings'::regclass",
}


class TestProperties:
    """What belongs to the name, not to the table of a day: it goes to the table that takes the name."""

    @staticmethod
    def read(database: Database) -> dict[str, list[tuple]]:
        return {name: execute(database.adbc_uri, statement) for name, statement in _PROPERTIES.items()}

    @pytest.mark.parametrize("keep", [False, True])
    def test_all_go_with_the_name_and_come_back_with_it(
        self, database: Database, cache: ModelCache, songs_folder: Path, keep: bool
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        with as_role(database) as reader, as_role(database) as owner:
            roles = {"reader": sa.make_url(reader.url).username, "owner": sa.make_url(owner.url).username}
            execute(
                database.adbc_uri,
                """
                GRANT CREATE ON SCHEMA public TO {owner};
                ALTER TABLE song_embeddings OWNER TO {owner};
                GRANT SELECT (song_id, created_at) ON song_embeddings TO {reader};
                GRANT UPDATE (created_at) ON song_embeddings TO {reader} WITH GRANT OPTION;
                ALTER TABLE song_embeddings SET (fillfactor = 71, autovacuum_enabled = false);
                ALTER TABLE song_embeddings ALTER song_id SET STATISTICS 17, ALTER created_at SET (n_distinct = -0.5);
                COMMENT ON TABLE song_embeddings IS 'It''s 100% ours: see :wiki';
                COMMENT ON COLUMN song_embeddings.embedding IS 'of {{lyrics}}';
                ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT INSERT ON TABLES TO {owner}, {reader};
                CREATE STATISTICS by_day (ndistinct) ON song_id, created_at FROM song_embeddings;
                """.format(**roles),
            )
            before, serving = self.read(database), oid_of(database)
            if keep:
                load_table(database, cache, songs_folder, HALF, swap=True)
            else:
                put(cache, range(80), version=1)
                load_table(database, cache, songs_folder)
            assert oid_of(database) != serving
            assert self.read(database) == before
            assert execute(reader.adbc_uri, "SELECT count(song_id) FROM song_embeddings") == [(150,)]
            assert execute(owner.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(150,)]
            if keep:
                execute(database.adbc_uri, "REVOKE SELECT (song_id) ON song_embeddings FROM {reader}".format(**roles))
                execute(database.adbc_uri, "GRANT DELETE ON song_embeddings TO {reader}".format(**roles))
                changed = self.read(database)
                roll_back(database)
                assert oid_of(database) == serving
                assert self.read(database) == changed

    def test_a_right_that_was_revoked_does_not_come_back_by_default_privileges(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        with as_role(database) as reader:
            role = sa.make_url(reader.url).username
            execute(database.adbc_uri, f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {role}")
            put(cache, range(150))
            load_table(database, cache, songs_folder)
            execute(database.adbc_uri, f"REVOKE SELECT ON song_embeddings FROM {role}")
            put(cache, range(80), version=1)
            assert load_table(database, cache, songs_folder).target.table.name == STAGING
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                execute(reader.adbc_uri, "SELECT count(*) FROM song_embeddings")


class TestLock:
    """A run whose lock is lost changes nothing that another may be changing now."""

    @staticmethod
    def end_holder(database: Database) -> None:
        execute(
            database.adbc_uri,
            """
            SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory' AND granted
            AND ((classid::bigint << 32) | objid::bigint) = %s
            """,
            (lock_key(LOCK),),
        )

    def test_no_table_is_swapped_in_when_the_lock_was_lost_during_the_build(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        put(cache, range(80), version=1)
        serving, at_build = oid_of(database), once(lambda: self.end_holder(database))

        def listen(progress: Progress) -> None:
            if progress.step == "build index":
                at_build()

        with pytest.raises(DatabaseError):
            load_table(database, cache, songs_folder, progress=listen)
        assert oid_of(database) == serving
        assert read_vectors(database) == vectors_of(range(150))
        load_table(database, cache, songs_folder)
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))

    def test_nothing_is_built_when_the_lock_was_lost_before(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        put(cache, range(80), version=1)
        lose = CallingStop(once(lambda: self.end_holder(database)))
        with pytest.raises(DatabaseError):
            load_table(database, cache, songs_folder, stop=lose)
        assert relations(database) == ALONE

    def test_guards_are_checked_before_the_build_after_it_and_in_the_swap(
        self, database: Database, cache: ModelCache, songs_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locked = """
            SELECT count(*) FROM pg_locks
            WHERE mode = 'AccessExclusiveLock' AND relation = to_regclass('song_embeddings')
        """
        asked: list[tuple[str, bool, bool]] = []

        def noting(name: str) -> Callable[..., Any]:
            check = getattr(swap, name)

            def note(*given: Any) -> Any:
                asked.append((name, STAGING in relations(database), execute(database.adbc_uri, locked) == [(1,)]))
                return check(*given)

            return note

        put(cache, range(150))
        load_table(database, cache, songs_folder)
        put(cache, range(80), version=1)
        for name in ("find_attachments", "check_missing", "check_attachments"):
            monkeypatch.setattr(swap, name, noting(name))
        load_table(database, cache, songs_folder)
        assert asked == [
            ("find_attachments", False, False),
            ("check_missing", False, False),
            ("check_missing", True, False),
            ("check_attachments", True, True),
        ]

    @pytest.mark.parametrize("undo", [roll_back, drop_others])
    def test_neither_the_way_back_nor_a_drop_is_committed_when_it_was_lost(
        self, database: Database, cache: ModelCache, songs_folder: Path, undo: Callable[..., object]
    ) -> None:
        put(cache, range(30))
        load_table(database, cache, songs_folder)
        load_table(database, cache, songs_folder, HALF, swap=True)
        lose = CallingStop(once(lambda: self.end_holder(database)))
        with pytest.raises(DatabaseError):
            undo(database, RunContext(stop=lose))
        assert relations(database) == BOTH
        assert VectorTable(database).spec == HALF

    @pytest.mark.parametrize("option", ["--rollback", "--drop-old"])
    def test_the_command_asks_too(
        self, database: Database, cache: ModelCache, songs_folder: Path, provider: Provider, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, option: str,
    ) -> None:  # fmt: skip
        put(cache, range(30))
        load_table(database, cache, songs_folder)
        load_table(database, cache, songs_folder, HALF, swap=True)
        pipeline = make_pipeline(database, provider, tmp_path / "store")
        monkeypatch.setattr(base, "make_pipeline", lambda **_: pipeline)
        ended = once(lambda: self.end_holder(database))
        pipeline.stop = CallingStop(ended)
        with pytest.raises(DatabaseError):
            app(["swap", option], standalone_mode=False)
        assert relations(database) == BOTH
        assert VectorTable(database).spec == HALF


class TestMissing:
    """Which songs a table that is replaced may lose: those deleted or rejected, by their ids, and no others."""

    RAISED = Tiling(width=100, stop=2_000)

    def test_a_raised_stop_does_not_keep_another_model_out(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, [*range(50), *range(1_000, 1_010), *range(1_950, 1_960)])
        load_table(database, cache, songs_folder)
        put(other_cache, [*range(50), *range(1_000, 1_010), *range(1_950, 1_959)], tiling=self.RAISED)
        with pytest.raises(TableMismatchError, match=r"lacks 1 songs .*song_id 1959, …; range 000001900-000002000"):
            load_table(database, other_cache, songs_folder, OTHER, self.RAISED, swap=True)
        put(other_cache, [1_959], tiling=self.RAISED)
        load_table(database, other_cache, songs_folder, OTHER, self.RAISED, swap=True)
        assert VectorTable(database).spec == OTHER
        assert_ledger_fits_table(database)

    def test_a_raised_stop_does_not_stop_a_large_change(
        self, database: Database, cache: ModelCache, songs_folder: Path, tmp_path: Path
    ) -> None:
        put(cache, [*range(50), *range(1_000, 1_050)])
        load_table(database, cache, songs_folder)
        # as the store leaves it once the tail was divided
        divided = ModelCache(LocalStorage(tmp_path / "divided"), SPEC.model, SPEC.dimensions)
        song_ids = [*range(50), *range(1_000, 1_050), *range(1_100, 1_200)]
        put(divided, song_ids, tiling=self.RAISED)
        report = load_table(database, divided, songs_folder, tiling=self.RAISED)
        assert report.target.table.name == STAGING
        assert read_vectors(database) == vectors_of(song_ids)

    def test_what_the_cache_lacks_is_said_before_anything_is_built(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(130))
        load_table(database, cache, songs_folder)
        put(other_cache, range(100))
        with pytest.raises(TableMismatchError, match=r"the cache lacks 30 songs .*range 000000100-000000200"):
            load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert relations(database) == ALONE

    def test_a_damaged_range_is_reported_as_damaged_not_as_lacking_songs(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        put(cache, range(80), version=1)
        complete(cache, SECOND)
        (path,) = files_of(cache, SECOND)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DamagedCacheError):
            load_table(database, cache, songs_folder)
        assert read_vectors(database) == vectors_of(range(150))

    def test_what_was_compared_must_be_what_is_swapped_in(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        put(cache, range(30))
        put(other_cache, range(30))
        load_table(database, cache, songs_folder)
        compare = swap.compare_tables

        def compare_and_lose(database: Database, *judge: object) -> Comparison:
            compared = compare(database, *judge)
            execute(
                database.adbc_uri,
                "DELETE FROM songvec.loaded_ranges WHERE table_name = %s",
                (STAGING,),
            )
            return compared

        monkeypatch.setattr(swap, "compare_tables", compare_and_lose)
        with pytest.raises(TableMismatchError, match="by another run meanwhile"):
            load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert VectorTable(database).spec == SPEC

    @pytest.mark.parametrize("stop", [1_000, 2_000])
    def test_songs_deleted_from_the_source_are_not_missing(
        self, database: Database, songs: Callable[..., None], provider: Provider, tmp_path: Path, stop: int
    ) -> None:
        # the last of a range, and of the tail, so that no snapshot of theirs would be left
        song_ids = [*range(1, 90), *range(200, 205), *range(1_000, 1_004)]
        songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in song_ids))
        run(make_pipeline(database, provider, tmp_path / "store"))
        execute(database.adbc_uri, "DELETE FROM songs WHERE id >= 1000 OR id BETWEEN 200 AND 210 OR id < 4")
        other = make_pipeline(
            database, provider, tmp_path / "store", embedding_dimensions=32, swap=True, song_id_stop=stop
        )
        run(other)
        assert VectorTable(database).spec == other.table_spec
        assert sorted(read_vectors(database)) == list(range(4, 90))


def run(pipeline: Pipeline) -> None:
    """Export, embed, load and index, as the jobs do."""
    pipeline.export()
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    pipeline.load()
    pipeline.build_index()


class TestSwap:
    def test_another_model_is_refused_unless_a_swap_is_asked_for(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(30))
        put(other_cache, range(30))
        load_table(database, cache, songs_folder)
        with pytest.raises(TableMismatchError, match="songvec swap"):
            check_loadable(database, WantedTable(OTHER))
        with pytest.raises(TableMismatchError, match="songvec swap"):
            load_table(database, other_cache, songs_folder, OTHER)
        check_loadable(database, WantedTable(OTHER, may_swap=True))
        assert read_vectors(database) == vectors_of(range(30))

    def test_another_model_takes_the_tables_place_and_can_be_undone_and_redone(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(130))
        put(other_cache, range(130))
        load_table(database, cache, songs_folder)
        report = load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert VectorTable(database).spec == OTHER
        assert report.comparison is not None
        assert (report.comparison.n_serving, report.comparison.n_staged) == (130, 130)
        assert relations(database) == BOTH
        assert len(read_vectors(database)[0]) == OTHER.dimensions
        with pytest.raises(TableMismatchError, match="--drop-old"):
            check_loadable(database, WantedTable(SPEC, may_swap=True))

        assert roll_back(database) == SPEC
        assert VectorTable(database).spec == SPEC
        assert read_vectors(database) == vectors_of(range(130))
        assert_ledger_fits_table(database)
        assert load_table(database, cache, songs_folder).target.table.name == SERVING
        with pytest.raises(TableMismatchError, match="nothing was swapped"):
            roll_back(database)

        again = load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert [each.n_written for each in again.loads] == [0, 0]
        assert VectorTable(database).spec == OTHER
        assert drop_others(database) == [PREVIOUS]
        assert relations(database) == ALONE

    def test_halfvec_is_a_swap_from_the_same_cache(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(120))
        load_table(database, cache, songs_folder)
        report = load_table(database, cache, songs_folder, HALF, swap=True)
        assert VectorTable(database).spec == HALF
        assert report.comparison is not None
        assert report.comparison.describe() == (
            "120 rows, 120 before; recall 99.9% at 11 probes (95% interval 99.4% to 100.0%, 200 queries), "
            "before: recall 100.0% at 11 probes (exact: all lists are visited); "
            "50 songs share 100% of their ten nearest with the previous table"
        )
        rows = execute(database.adbc_uri, "SELECT song_id, embedding::vector::real[] FROM song_embeddings")
        assert {song_id: np.float16(values).tolist() for song_id, values in rows} == {
            song_id: np.float16(values).tolist() for song_id, values in vectors_of(range(120)).items()
        }

    def test_more_dimensions_than_a_vector_can_index_are_loaded_indexed_and_found_as_halfvec(
        self, database: Database, tmp_path: Path, songs_folder: Path
    ) -> None:
        wide = TableSpec("wide", 4_000, "halfvec")
        cache = ModelCache(LocalStorage(tmp_path / "wide"), wide.model, wide.dimensions)
        put(cache, range(40))
        load_table(database, cache, songs_folder, wide)
        assert VectorTable(database).index is not None
        nearest = """
            SELECT song_id FROM song_embeddings
            ORDER BY embedding <=> (SELECT embedding FROM song_embeddings WHERE song_id = 7) LIMIT 1
        """
        with database.get_connection() as connection:
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
            assert connection.scalar(sa.text(nearest)) == 7

    def test_songs_that_the_new_table_lacks_stop_it_and_those_gone_or_set_aside_do_not(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(30))
        load_table(database, cache, songs_folder)
        put(other_cache, range(27))
        with pytest.raises(TableMismatchError, match=r"lacks 3 songs .*27, 28, 29"):
            load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert VectorTable(database).spec == SPEC
        reject(other_cache, [27], "the provider refused it")
        write_snapshot(songs_folder, [*range(28), 29], set_aside=[29])
        load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert VectorTable(database).spec == OTHER

    def test_rights_that_others_were_given_go_with_the_name(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        load_table(database, cache, songs_folder)
        with as_role(database) as reader:
            role = sa.make_url(reader.url).username
            execute(database.adbc_uri, f"GRANT SELECT ON song_embeddings TO {role} WITH GRANT OPTION")
            put(cache, range(80), version=1)
            assert load_table(database, cache, songs_folder).target.table.name == STAGING
            assert execute(reader.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(150,)]
            grants = "SELECT privilege_type, is_grantable FROM information_schema.role_table_grants WHERE grantee = %s"
            assert execute(database.adbc_uri, grants, (role,)) == [("SELECT", "YES")]

    def test_a_lock_that_another_session_holds_is_waited_for_in_short_tries(
        self, database: Database, cache: ModelCache, songs_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(short_lock, "_PAUSE_S", 0.05)
        put(cache, range(30))
        load_table(database, cache, songs_folder)
        load_table(database, cache, songs_folder, HALF, swap=True)
        tries: list[int] = []
        with database.get_connection() as holder:
            holder.execute(sa.text("SELECT 1 FROM song_embeddings LIMIT 1"))

            def look() -> None:
                tries.append(1)
                # a search is never stopped by the one who waits
                assert execute(database.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(30,)]
                if len(tries) == 3:
                    holder.rollback()

            assert roll_back(database, RunContext(stop=CallingStop(look))) == SPEC
        assert len(tries) >= 3

    def test_a_lock_that_is_never_let_go_is_an_error_that_changes_nothing(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE TABLE held (id integer)")
        with database.get_connection() as holder:
            holder.execute(sa.text("LOCK TABLE held"))

            def rename(connection: sa.Connection) -> None:
                connection.execute(sa.text("ALTER TABLE held RENAME TO gone"))

            with pytest.raises(DatabaseError, match="another session holds a lock"):
                run_with_short_lock(database, rename, patience_s=0)


_LOADER = """
import os, signal, sys
from pathlib import Path
from songvec_assets.storage.local import LocalStorage
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import RunContext
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.swap import WantedTable, bring_table_up_to_date
from songvec_assets.vectors.table import TableSpec
url, cache, songs, step = sys.argv[1:]
def listen(progress):
    if progress.step == step and progress.done:
        os.kill(os.getpid(), signal.SIGKILL)
snapshots = Snapshots(LocalStorage(Path(songs)))
source = LoadSource(ModelCache(LocalStorage(Path(cache)), "model-b", 16), Tiling(100, 1_000), snapshots)
bring_table_up_to_date(
    Database(url), source, WantedTable(TableSpec("model-b", 16), may_swap=True), RunContext(listen)
)
"""


def loader(
    database: Database, cache: ModelCache, songs_folder: Path, step: str
) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    """A process that swaps OTHER in, and kills itself when a step reports that it has begun."""
    return running(_LOADER, database.url, str(cache.storage), str(songs_folder), step)


@pytest.mark.slow
class TestInterrupted:
    def stop_at(self, step: str) -> tuple[StopSignal, Callable[[Progress], None]]:
        """A signal that is set when a step reports its first progress."""
        stop = StopSignal()

        def listen(progress: Progress) -> None:
            if progress.step == step:
                stop.set()

        return stop, listen

    @staticmethod
    @contextlib.contextmanager
    def serving_all_the_while(
        database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> Iterator[None]:
        """A table that serves, of which nothing may change in the block; the next run then swaps the other in."""
        put(cache, range(230))
        put(other_cache, range(230))
        load_table(database, cache, songs_folder)
        yield
        assert VectorTable(database).spec == SPEC
        assert read_vectors(database) == vectors_of(range(230))
        load_table(database, other_cache, songs_folder, OTHER, swap=True)
        assert VectorTable(database).spec == OTHER
        assert relations(database) == BOTH

    @pytest.mark.parametrize("step", ["load rows", "build index", "measure recall"])
    def test_a_swap_that_is_stopped_in_a_step_goes_on_with_the_next_run(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path, step: str
    ) -> None:
        with self.serving_all_the_while(database, cache, other_cache, songs_folder):
            stop, listen = self.stop_at(step)
            with pytest.raises(StoppedError):
                load_table(database, other_cache, songs_folder, OTHER, swap=True, stop=stop, progress=listen)

    @pytest.mark.parametrize("step", ["load rows", "build index", "measure recall"])
    def test_a_swap_that_is_killed_in_a_step_goes_on_with_the_next_run(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path, step: str
    ) -> None:
        with (
            self.serving_all_the_while(database, cache, other_cache, songs_folder),
            loader(database, other_cache, songs_folder, step) as process,
        ):
            assert process.wait(60) == -signal.SIGKILL

    def test_a_swap_that_is_killed_while_it_renames_goes_on_with_the_next_run(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'song_embeddings'::regclass"
        with (
            self.serving_all_the_while(database, cache, other_cache, songs_folder),
            database.get_connection() as holder,
        ):
            holder.execute(sa.text("LOCK TABLE song_embeddings IN ACCESS SHARE MODE"))
            with loader(database, other_cache, songs_folder, "no step") as process:
                wait_until(lambda: execute(database.adbc_uri, waiting) == [(1,)], seconds=60)
                process.send_signal(signal.SIGKILL)
                process.wait()

    def test_a_table_half_built_beside_is_removed_when_little_is_left_to_change(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(230))
        load_table(database, cache, songs_folder)
        put(cache, range(120), version=1)
        stop, listen = self.stop_at("build index")
        with pytest.raises(StoppedError):
            load_table(database, cache, songs_folder, stop=stop, progress=listen)
        assert STAGING in relations(database)
        assert load_table(database, cache, songs_folder, staged_from_rows=1000).target.table.name == SERVING
        assert relations(database) == ALONE
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(230), 0) | dict.fromkeys(range(120), 1))

    def test_another_models_half_built_table_stays_while_the_serving_one_is_refreshed(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(130))
        put(other_cache, range(130))
        load_table(database, cache, songs_folder)
        stop, listen = self.stop_at("build index")
        with pytest.raises(StoppedError):
            load_table(database, other_cache, songs_folder, OTHER, swap=True, stop=stop, progress=listen)
        put(cache, range(130), version=1)
        report = load_table(database, cache, songs_folder)
        assert report.target.table.name == SERVING
        assert "songvec swap" in report.target.reason
        assert STAGING in relations(database)
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(130), 1))


@pytest.mark.slow
class TestSearchesMeanwhile:
    def test_every_song_is_found_at_every_moment_of_a_swap_and_its_rollback(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(230))
        load_table(database, cache, songs_folder)
        with searching(database) as counts:
            put(cache, range(230), version=1)
            assert load_table(database, cache, songs_folder).target.table.name == STAGING
            load_table(database, cache, songs_folder, HALF, swap=True)
            roll_back(database)
        assert set(counts) == {230}

    def test_a_range_is_never_half_there(self, database: Database, cache: ModelCache, songs_folder: Path) -> None:
        put(cache, range(230))
        load_table(database, cache, songs_folder)
        with searching(database) as counts:
            for version in (1, 2, 3):
                put(cache, range(40), version=version)
                forget(cache, [50 + version])
                load_table(database, cache, songs_folder, staged_from_rows=1000)
        assert set(counts) <= {230, 229, 228, 227}
        assert sorted(counts, reverse=True) == counts


def searching(database: Database) -> "Searcher":
    """Counts the table's rows over and over while the block runs."""
    return Searcher(database)


class Searcher:
    """One connection that asks as searches do, without a lock beyond its own statement."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ended = threading.Event()
        self._counts: list[int] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> list[int]:
        self._thread.start()
        return self._counts

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for _ in self._until_the_end():
                with self._database.get_connection("web") as connection:
                    self._counts.append(
                        connection.execute(sa.text("SELECT count(*) FROM song_embeddings")).scalar_one()
                    )
        except BaseException as error:  # noqa: BLE001 - it is raised again in the test's thread
            self._error = error

    def _until_the_end(self) -> Iterator[None]:
        while not self._ended.is_set():
            yield


def test_put_in_place_without_a_table_beside_changes_nothing(
    database: Database, cache: ModelCache, songs_folder: Path
) -> None:
    put(cache, range(30))
    load_table(database, cache, songs_folder)
    with pytest.raises(DatabaseError, match="song_embeddings_new"):
        put_in_place(database, False, [], lambda: None, RunContext())
    assert read_vectors(database) == vectors_of(range(30))


def write_snapshot(folder: Path, song_ids: list[int], set_aside: list[int]) -> None:
    """A snapshot of the first range."""
    rows = {
        "song_id": song_ids,
        "name": ["n"] * len(song_ids),
        "artist": ["a"] * len(song_ids),
        "lyrics": [""] * len(song_ids),
        "rejected": ["the song has no name" if song_id in set_aside else None for song_id in song_ids],
    }
    pq.write_table(pa.table(rows, SNAPSHOT_SCHEMA), folder / f"{FIRST.key}.parquet")


@pytest.mark.slow
class TestThroughAPooler:
    """PgBouncer in transaction mode: the same tables, by COPY or by row batches, with or without a way past it."""

    @pytest.mark.parametrize("past", [False, True])
    def test_loads_builds_and_swaps_leave_the_same_tables(
        self, database: Database, cache: ModelCache, songs_folder: Path, past: bool
    ) -> None:
        with running_pgbouncer(database.url, pool_size=6) as url:
            pooled = Database(url, direct_url=database.url if past else None)
            try:
                put(cache, range(150))
                assert load_table(pooled, cache, songs_folder).target.table.name == SERVING
                rows = execute(database.adbc_uri, "SELECT reltuples FROM pg_class WHERE relname = 'song_embeddings'")
                assert rows == [(150,)], "the planner knows the table, whether it was vacuumed or only analyzed"
                put(cache, range(80), version=1)
                assert load_table(pooled, cache, songs_folder).target.table.name == STAGING
                load_table(pooled, cache, songs_folder, HALF, swap=True)
                roll_back(pooled)
                assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))
                assert_ledger_fits_table(database)
                assert VectorTable(database).index is not None
                assert execute(database.adbc_uri, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
            finally:
                dispose(url)

    @pytest.mark.parametrize("pooled", [False, True])
    def test_row_batches_and_copy_store_the_same_rows(
        self, database: Database, cache: ModelCache, pooled: bool
    ) -> None:
        put(cache, range(90))
        cached, live = load_embeddings_from_cache(cache, FIRST)
        VectorTable(database).ensure(SPEC)
        with running_pgbouncer(database.url) if pooled else contextlib.nullcontext(database.url) as url:
            stored = []
            for store in (store_embeddings_copy_bulk, store_each_batch):
                with Database(url).get_connection() as connection:
                    store(connection, read_embeddings_from_file(cached, live["row"]), SPEC)
                stored.append(read_vectors(database))
                execute(database.adbc_uri, "TRUNCATE song_embeddings")
            dispose(url)
        assert stored == [vectors_of(range(90))] * 2


def store_each_batch(connection: sa.Connection, batches: Iterator[CachedRows], spec: TableSpec) -> None:
    """What happens where COPY is not allowed."""
    for rows in batches:
        store_embeddings_batch(connection, rows.song_ids, rows.embeddings, spec)
