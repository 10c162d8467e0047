"""What searches find equals the cache, whether rows went in under the index or a table was built beside and swapped."""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from songvec_assets.cache.shards import ModelCache, ShardRows, load_embeddings_from_cache, read_embeddings_from_file
from songvec_assets.errors import DatabaseError, StoppedError, TableMismatchError
from songvec_assets.postgres import brief
from songvec_assets.postgres.brief import run_briefly
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, StopSignal
from songvec_assets.songs.snapshots import SNAPSHOT_SCHEMA, snapshot_path
from songvec_assets.vectors.ivfflat import IndexSettings, bring_index_up_to_date, find_index, read_probes
from songvec_assets.vectors.publish import PublishReport, check_publishable, publish_embeddings
from songvec_assets.vectors.swap import drop_others, find_attachments, put_in_place, roll_back
from songvec_assets.vectors.table import BESIDE, KEPT, TABLE, TableSpec, ensure_table, loaded_spec, read_changes
from songvec_assets.vectors.write import store_embeddings_batch, store_embeddings_copy_bulk
from songvec_assets_tests.administration import as_role, dispose, execute, wait_until
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.vectors.conftest import (
    DIMENSIONS,
    FIRST,
    SPEC,
    TILING,
    assert_ledger_fits_table,
    forget,
    put,
    read_vectors,
    vectors_of,
)
from songvec_assets_tests.vectors.indexes import running

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
    return ModelCache(tmp_path / "other", OTHER.model, OTHER.dimensions)


def publish(
    database: Database, cache: ModelCache, songs_folder: Path, spec: TableSpec = SPEC, **given: object
) -> PublishReport:
    """Publish and index as the graph does; tables are built beside from 20 changed rows on."""
    index = IndexSettings()
    given = {"beside_from_rows": 20} | given
    report = publish_embeddings(database, cache, spec, TILING, songs_folder, index, **given)  # type: ignore[arg-type]
    bring_index_up_to_date(database, cache, spec, index)
    return report


def relations(database: Database) -> set[str]:
    """Our tables and their indexes."""
    statement = "SELECT relname FROM pg_class WHERE relname ~ '^(song_embeddings|embeddings_ivfflat)'"
    return {name for (name,) in execute(database.adbc_uri, statement)}


SERVING = {"song_embeddings", "song_embeddings_pkey", "embeddings_ivfflat_idx"}
BOTH = SERVING | {"song_embeddings_old", "song_embeddings_old_pkey", "embeddings_ivfflat_idx_old"}


def oid_of(database: Database, table: str = TABLE) -> int:
    """What tells a table from another that took its name."""
    return int(execute(database.adbc_uri, f"SELECT '{table}'::regclass::oid")[0][0])


class TestPlace:
    def test_the_first_load_goes_into_the_table_itself(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        report = publish(database, cache, songs_folder)
        assert report.place.table == TABLE
        assert read_vectors(database) == vectors_of(range(150))
        assert relations(database) == SERVING

    def test_a_small_change_goes_in_under_the_index(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        publish(database, cache, songs_folder)
        before = oid_of(database)
        put(cache, range(10), version=1)
        report = publish(database, cache, songs_folder)
        assert report.place.table == TABLE
        assert "10 of 150 rows changed" in report.place.reason
        assert oid_of(database) == before
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(10), 1))

    def test_a_large_change_is_built_beside_and_swapped_in_with_index_and_records(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        publish(database, cache, songs_folder)
        before = oid_of(database)
        put(cache, range(80), version=1)
        report = publish(database, cache, songs_folder)
        assert (report.place.table, report.place.keep) == (BESIDE, False)
        assert oid_of(database) != before
        assert relations(database) == SERVING
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))
        assert_ledger_fits_table(database)
        index = find_index(database)
        assert index is not None
        assert index.n_rows == 150
        with database.get_connection() as connection:
            assert read_changes(connection) == 0
            assert read_probes(connection) == index.probes
        keys = execute(database.adbc_uri, "SELECT key FROM songvec.settings WHERE key LIKE 'song_embeddings%'")
        assert keys == []
        assert publish(database, cache, songs_folder).loads == [*report.loads[:0], *publish_again(report)]

    def test_what_people_hung_on_the_table_keeps_it_in_its_place(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        publish(database, cache, songs_folder)
        execute(database.adbc_uri, 'CREATE VIEW "Hot: 100%" AS SELECT song_id FROM song_embeddings')
        put(cache, range(80), version=1)
        report = publish(database, cache, songs_folder)
        assert report.place.table == TABLE
        assert "Hot: 100%" in report.place.reason
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))


def publish_again(report: PublishReport) -> list[object]:
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
    "trigger noted": (
        "CREATE TRIGGER noted AFTER UPDATE ON song_embeddings EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "DROP TRIGGER noted ON song_embeddings",
    ),
}
"""What people hang on a table, by the words that name it: how it comes, and how it goes."""


class TestAttachments:
    def test_each_is_found_and_stops_a_swap_before_anything_is_paid_for(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(30))
        publish(database, cache, songs_folder)
        for named, (statement, undo) in ATTACHMENTS.items():
            with database.get_connection() as connection:
                assert find_attachments(connection) == []
            execute(database.adbc_uri, statement)
            with database.get_connection() as connection:
                assert find_attachments(connection) == [named]
            with pytest.raises(TableMismatchError, match=named):
                check_publishable(database, OTHER, swap=True)
            execute(database.adbc_uri, undo)


class TestSwap:
    def test_another_model_is_refused_unless_a_swap_is_asked_for(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(30))
        put(other_cache, range(30))
        publish(database, cache, songs_folder)
        with pytest.raises(TableMismatchError, match="songvec swap"):
            check_publishable(database, OTHER, swap=False)
        with pytest.raises(TableMismatchError, match="songvec swap"):
            publish(database, other_cache, songs_folder, OTHER)
        check_publishable(database, OTHER, swap=True)
        assert read_vectors(database) == vectors_of(range(30))

    def test_another_model_takes_the_tables_place_and_can_be_undone_and_redone(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(130))
        put(other_cache, range(130))
        publish(database, cache, songs_folder)
        report = publish(database, other_cache, songs_folder, OTHER, swap=True)
        assert loaded_spec(database) == OTHER
        assert report.comparison is not None
        assert (report.comparison.n_serving, report.comparison.n_beside, report.comparison.n_missing) == (130, 130, 0)
        assert relations(database) == BOTH
        assert len(read_vectors(database)[0]) == OTHER.dimensions
        with pytest.raises(TableMismatchError, match="--drop-old"):
            check_publishable(database, SPEC, swap=True)

        assert roll_back(database) == SPEC
        assert loaded_spec(database) == SPEC
        assert read_vectors(database) == vectors_of(range(130))
        assert_ledger_fits_table(database)
        assert publish(database, cache, songs_folder).place.table == TABLE
        with pytest.raises(TableMismatchError, match="nothing was swapped"):
            roll_back(database)

        again = publish(database, other_cache, songs_folder, OTHER, swap=True)
        assert [each.n_written for each in again.loads] == [0, 0]
        assert loaded_spec(database) == OTHER
        assert drop_others(database) == [KEPT]
        assert relations(database) == SERVING

    def test_halfvec_is_a_swap_from_the_same_cache(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(120))
        publish(database, cache, songs_folder)
        report = publish(database, cache, songs_folder, HALF, swap=True)
        assert loaded_spec(database) == HALF
        assert report.comparison is not None
        assert report.comparison.describe() == (
            "120 rows, 120 before; recall 100.0% at 11 probes, before: recall 100.0% at 11 probes; "
            "50 songs share 100% of their ten nearest with the table before"
        )
        rows = execute(database.adbc_uri, "SELECT song_id, embedding::vector::real[] FROM song_embeddings")
        assert {song_id: np.float16(values).tolist() for song_id, values in rows} == {
            song_id: np.float16(values).tolist() for song_id, values in vectors_of(range(120)).items()
        }

    def test_more_dimensions_than_a_vector_can_index_are_loaded_indexed_and_found_as_halfvec(
        self, database: Database, tmp_path: Path, songs_folder: Path
    ) -> None:
        wide = TableSpec("wide", 4_000, "halfvec")
        cache = ModelCache(tmp_path / "wide", wide.model, wide.dimensions)
        put(cache, range(40))
        publish(database, cache, songs_folder, wide)
        assert find_index(database) is not None
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
        publish(database, cache, songs_folder)
        put(other_cache, range(27))
        with pytest.raises(TableMismatchError, match=r"lacks 3 songs .*27, 28, 29"):
            publish(database, other_cache, songs_folder, OTHER, swap=True)
        assert loaded_spec(database) == SPEC
        shard, _ = load_embeddings_from_cache(other_cache, FIRST)
        shard.append_set_aside([27], [b"x" * 16], "the provider refused it")
        write_snapshot(songs_folder, [*range(28), 29], set_aside=[29])
        publish(database, other_cache, songs_folder, OTHER, swap=True)
        assert loaded_spec(database) == OTHER

    def test_rights_that_others_were_given_go_with_the_name(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(150))
        publish(database, cache, songs_folder)
        with as_role(database) as reader:
            role = sa.make_url(reader.url).username
            execute(database.adbc_uri, f"GRANT SELECT ON song_embeddings TO {role} WITH GRANT OPTION")
            put(cache, range(80), version=1)
            assert publish(database, cache, songs_folder).place.table == BESIDE
            assert execute(reader.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(150,)]
            grants = "SELECT privilege_type, is_grantable FROM information_schema.role_table_grants WHERE grantee = %s"
            assert execute(database.adbc_uri, grants, (role,)) == [("SELECT", "YES")]

    def test_a_lock_that_another_session_holds_is_waited_for_in_short_tries(
        self, database: Database, cache: ModelCache, songs_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(brief, "_PAUSE_S", 0.05)
        put(cache, range(30))
        publish(database, cache, songs_folder)
        publish(database, cache, songs_folder, HALF, swap=True)
        tries: list[int] = []
        with database.get_connection() as holder:
            holder.execute(sa.text("SELECT 1 FROM song_embeddings LIMIT 1"))

            def look() -> None:
                tries.append(1)
                # a search is never stopped by the one who waits
                assert execute(database.adbc_uri, "SELECT count(*) FROM song_embeddings") == [(30,)]
                if len(tries) == 3:
                    holder.rollback()

            assert roll_back(database, look) == SPEC
        assert len(tries) >= 3

    def test_a_lock_that_is_never_let_go_is_an_error_that_changes_nothing(self, database: Database) -> None:
        execute(database.adbc_uri, "CREATE TABLE held (id integer)")
        with database.get_connection() as holder:
            holder.execute(sa.text("LOCK TABLE held"))

            def rename(connection: sa.Connection) -> None:
                connection.execute(sa.text("ALTER TABLE held RENAME TO gone"))

            with pytest.raises(DatabaseError, match="another session holds a lock"):
                run_briefly(database, rename, patience_s=0)


_PUBLISHER = """
import os, signal, sys
from pathlib import Path
from songvec_assets.cache.shards import ModelCache
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import Tiling
from songvec_assets.vectors.ivfflat import IndexSettings
from songvec_assets.vectors.publish import publish_embeddings
from songvec_assets.vectors.table import TableSpec
url, cache, songs, step = sys.argv[1:]
def listen(progress):
    if progress.step == step and progress.done:
        os.kill(os.getpid(), signal.SIGKILL)
publish_embeddings(
    Database(url), ModelCache(Path(cache), "model-b", 16), TableSpec("model-b", 16), Tiling(100, 1_000), Path(songs),
    IndexSettings(), swap=True, progress=listen,
)
"""


def publisher(
    database: Database, cache: ModelCache, songs_folder: Path, step: str
) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    """A process that swaps OTHER in, and kills itself when a step tells that it is on its way."""
    return running(_PUBLISHER, database.url, str(cache.folder), str(songs_folder), step)


class TestInterrupted:
    def stop_at(self, step: str) -> tuple[StopSignal, Callable[[Progress], None]]:
        """A signal that is set when a step tells its first progress."""
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
        publish(database, cache, songs_folder)
        yield
        assert loaded_spec(database) == SPEC
        assert read_vectors(database) == vectors_of(range(230))
        publish(database, other_cache, songs_folder, OTHER, swap=True)
        assert loaded_spec(database) == OTHER
        assert relations(database) == BOTH

    @pytest.mark.parametrize("step", ["load rows", "build index", "measure recall"])
    def test_a_swap_that_is_stopped_in_a_step_goes_on_with_the_next_run(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path, step: str
    ) -> None:
        with self.serving_all_the_while(database, cache, other_cache, songs_folder):
            stop, listen = self.stop_at(step)
            with pytest.raises(StoppedError):
                publish(database, other_cache, songs_folder, OTHER, swap=True, stop=stop, progress=listen)

    @pytest.mark.parametrize("step", ["load rows", "build index", "measure recall"])
    def test_a_swap_that_is_killed_in_a_step_goes_on_with_the_next_run(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path, step: str
    ) -> None:
        with (
            self.serving_all_the_while(database, cache, other_cache, songs_folder),
            publisher(database, other_cache, songs_folder, step) as process,
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
            with publisher(database, other_cache, songs_folder, "no step") as process:
                wait_until(lambda: execute(database.adbc_uri, waiting) == [(1,)], seconds=60)
                process.send_signal(signal.SIGKILL)
                process.wait()

    def test_a_table_half_built_beside_is_removed_when_little_is_left_to_change(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(230))
        publish(database, cache, songs_folder)
        put(cache, range(120), version=1)
        stop, listen = self.stop_at("build index")
        with pytest.raises(StoppedError):
            publish(database, cache, songs_folder, stop=stop, progress=listen)
        assert BESIDE in relations(database)
        assert publish(database, cache, songs_folder, beside_from_rows=1000).place.table == TABLE
        assert relations(database) == SERVING
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(230), 0) | dict.fromkeys(range(120), 1))

    def test_another_models_half_built_table_stays_while_the_serving_one_is_refreshed(
        self, database: Database, cache: ModelCache, other_cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(130))
        put(other_cache, range(130))
        publish(database, cache, songs_folder)
        stop, listen = self.stop_at("build index")
        with pytest.raises(StoppedError):
            publish(database, other_cache, songs_folder, OTHER, swap=True, stop=stop, progress=listen)
        put(cache, range(130), version=1)
        report = publish(database, cache, songs_folder)
        assert report.place.table == TABLE
        assert "songvec swap" in report.place.reason
        assert BESIDE in relations(database)
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(130), 1))


class TestSearchesMeanwhile:
    def test_every_song_is_found_at_every_moment_of_a_swap_and_its_rollback(
        self, database: Database, cache: ModelCache, songs_folder: Path
    ) -> None:
        put(cache, range(230))
        publish(database, cache, songs_folder)
        with searching(database) as counts:
            put(cache, range(230), version=1)
            assert publish(database, cache, songs_folder).place.table == BESIDE
            publish(database, cache, songs_folder, HALF, swap=True)
            roll_back(database)
        assert set(counts) == {230}

    def test_a_range_is_never_half_there(self, database: Database, cache: ModelCache, songs_folder: Path) -> None:
        put(cache, range(230))
        publish(database, cache, songs_folder)
        with searching(database) as counts:
            for version in (1, 2, 3):
                put(cache, range(40), version=version)
                forget(cache, [50 + version])
                publish(database, cache, songs_folder, beside_from_rows=1000)
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
    publish(database, cache, songs_folder)
    with pytest.raises(DatabaseError, match="song_embeddings_new"):
        put_in_place(database, False, lambda: None)
    assert read_vectors(database) == vectors_of(range(30))


def write_snapshot(folder: Path, song_ids: list[int], set_aside: list[int]) -> None:
    """A snapshot of the first range."""
    rows = {
        "song_id": song_ids,
        "name": ["n"] * len(song_ids),
        "artist": ["a"] * len(song_ids),
        "lyrics": [""] * len(song_ids),
        "set_aside": ["the song has no name" if song_id in set_aside else None for song_id in song_ids],
    }
    pq.write_table(pa.table(rows, SNAPSHOT_SCHEMA), snapshot_path(folder, FIRST))


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
                assert publish(pooled, cache, songs_folder).place.table == TABLE
                rows = execute(database.adbc_uri, "SELECT reltuples FROM pg_class WHERE relname = 'song_embeddings'")
                assert rows == [(150,)], "the planner knows the table, whether it was vacuumed or only analyzed"
                put(cache, range(80), version=1)
                assert publish(pooled, cache, songs_folder).place.table == BESIDE
                publish(pooled, cache, songs_folder, HALF, swap=True)
                roll_back(pooled)
                assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | dict.fromkeys(range(80), 1))
                assert_ledger_fits_table(database)
                assert find_index(database) is not None
                assert execute(database.adbc_uri, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
            finally:
                dispose(url)

    @pytest.mark.parametrize("pooled", [False, True])
    def test_row_batches_and_copy_store_the_same_rows(
        self, database: Database, cache: ModelCache, pooled: bool
    ) -> None:
        put(cache, range(90))
        shard, live = load_embeddings_from_cache(cache, FIRST)
        ensure_table(database, SPEC)
        with running_pgbouncer(database.url) if pooled else contextlib.nullcontext(database.url) as url:
            stored = []
            for store in (store_embeddings_copy_bulk, store_each_batch):
                with Database(url).get_connection() as connection:
                    store(connection, read_embeddings_from_file(shard, live["row"]), SPEC)
                stored.append(read_vectors(database))
                execute(database.adbc_uri, "TRUNCATE song_embeddings")
            dispose(url)
        assert stored == [vectors_of(range(90))] * 2


def store_each_batch(connection: sa.Connection, batches: Iterator[ShardRows], spec: TableSpec) -> None:
    """What happens where COPY is not allowed."""
    for rows in batches:
        store_embeddings_batch(connection, rows.song_ids, rows.embeddings, spec)
