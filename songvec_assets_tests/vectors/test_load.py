"""The table equals the cache for every loaded range, whatever happens meanwhile, and only what changed is written."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from songvec_assets.cache.manifest import DataFile
from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, read_embeddings_from_file
from songvec_assets.cache.parts import CachedRows
from songvec_assets.errors import (
    DamagedCacheError,
    DatabaseError,
    SongvecError,
    StoppedError,
    StoreError,
)
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import Progress, StopSignal
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.load import store_embeddings_batch, store_embeddings_copy_bulk
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import as_role, execute
from songvec_assets_tests.vectors.conftest import (
    DIMENSIONS,
    FIRST,
    SECOND,
    SPEC,
    TAIL,
    TILING,
    assert_ledger_fits_table,
    complete,
    damage,
    file_with,
    files_of,
    forget,
    load,
    make_vector,
    put,
    read_vectors,
    read_writers,
    reject,
    reported,
    upload,
    vectors_of,
)

HALF = TableSpec("model-a", DIMENSIONS, "halfvec")


def loaded_ranges(database: Database) -> dict[SongIdRange, int]:
    """Songs by range, as the ledger has them."""
    return {song_range: entry.n_songs for song_range, entry in VectorTable(database).ledger.read().items()}


class StopDuringCopy(StopSignal):
    """Calls something at the second time a load asks, in the middle of a COPY, whether to stop."""

    def __init__(self, database: Database, call: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._database, self._call, self._asked = database, call or self.set, 0

    def check(self) -> None:
        """Look whether a COPY is running, call, then check as usual."""
        if find_copies(self._database):
            self._asked += 1
            if self._asked == 2:
                self._call()
        super().check()


def find_copies(database: Database) -> list[int]:
    """The server's processes that are in the middle of a COPY into the table."""
    statement = """
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND state = 'active' AND query LIKE 'COPY song_embeddings%'
    """
    return [pid for (pid,) in execute(database.adbc_uri, statement)]


def kill_copy(database: Database) -> None:
    """End the connection of the COPY that is running, as an administrator may."""
    (pid,) = find_copies(database)
    execute(database.adbc_uri, "SELECT pg_terminate_backend(%s, 5000)", (pid,))


def cancel(database: Database) -> None:
    """Cancel, and wait until the server got the request."""
    database.cancel()
    for thread in threading.enumerate():
        if thread.name == "songvec-cancel":
            thread.join()


class TestLoad:
    def test_the_first_load_makes_the_table_equal_the_cache(self, database: Database, cache: ModelCache) -> None:
        song_ids = [0, 5, 99, 100, 199, 1000, 2**31 - 1]
        put(cache, song_ids)
        assert load(database, cache) == {FIRST.key: (3, 3, 0), SECOND.key: (2, 2, 0), TAIL.key: (2, 2, 0)}
        assert read_vectors(database) == vectors_of(song_ids)
        assert_ledger_fits_table(database)
        assert loaded_ranges(database) == {FIRST: 3, SECOND: 2, TAIL: 2}
        rows, below = VectorTable(database).read_id_sums(TILING)
        assert ({each: counts.n_rows for each, counts in rows.items()}, below.n_rows) == (loaded_ranges(database), 0)

    def test_a_load_without_changes_writes_nothing(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(300))
        load(database, cache)
        ledger = "SELECT xmin::text FROM songvec.loaded_ranges"
        before = read_writers(database), execute(database.adbc_uri, ledger)
        assert set(load(database, cache).values()) == {(100, 0, 0)}
        assert (read_writers(database), execute(database.adbc_uri, ledger)) == before

    def test_only_new_changed_and_vanished_songs_are_written(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(250))
        load(database, cache)
        before = read_writers(database)
        put(cache, [3, 7], version=1)
        put(cache, [260])
        forget(cache, [50, 51, 52])
        assert load(database, cache) == {
            FIRST.key: (97, 2, 5), SECOND.key: (100, 0, 0), "000000200-000000300": (51, 1, 0)
        }  # fmt: skip
        after = read_writers(database)
        assert {song_id for song_id in after if after[song_id] != before.get(song_id)} == {3, 7, 260}
        assert read_vectors(database) == vectors_of(dict.fromkeys([*range(50), *range(53, 250), 260], 0) | {3: 1, 7: 1})
        assert_ledger_fits_table(database)

    @pytest.mark.parametrize(("n_changed", "n_written"), [(1, 1), (40, 40), (50, 50), (51, 100), (100, 100)])
    def test_a_range_is_written_as_a_whole_only_when_over_half_of_it_changed(
        self, database: Database, cache: ModelCache, n_changed: int, n_written: int
    ) -> None:
        put(cache, range(100))
        load(database, cache)
        before = read_writers(database)
        put(cache, range(n_changed), version=1)
        assert load(database, cache) == {FIRST.key: (100, n_written, n_written)}
        after = read_writers(database)
        assert sum(after[song_id] != before[song_id] for song_id in after) == n_written
        assert read_vectors(database) == vectors_of({song_id: int(song_id < n_changed) for song_id in range(100)})

    def test_a_range_that_doubles_keeps_its_old_rows(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(50))
        load(database, cache)
        before = read_writers(database)
        put(cache, range(50, 99))
        assert load(database, cache) == {FIRST.key: (99, 49, 0)}
        after = read_writers(database)
        assert {song_id: after[song_id] for song_id in before} == before

    def test_a_range_whose_songs_all_vanished_is_emptied(self, database: Database, cache: ModelCache) -> None:
        put(cache, [1, 2, 101])
        load(database, cache)
        forget(cache, [1, 2])
        assert load(database, cache)[FIRST.key] == (0, 0, 2)
        assert read_vectors(database) == vectors_of([101])
        assert load(database, cache)[FIRST.key] == (0, 0, 0)

    def test_songs_that_the_provider_refuses_are_not_loaded(self, database: Database, cache: ModelCache) -> None:
        put(cache, [1, 2])
        reject(cache, [2, 3], "too long")
        load(database, cache)
        assert read_vectors(database) == vectors_of([1])

    def test_rows_carry_the_time_of_their_own_writing(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(10))
        load(database, cache)
        execute(database.adbc_uri, "UPDATE song_embeddings SET created_at = '2020-01-01'")
        put(cache, [4], version=1)
        load(database, cache)
        newer = "SELECT song_id FROM song_embeddings WHERE created_at > now() - interval '1 minute'"
        assert execute(database.adbc_uri, newer) == [(4,)]

    def test_changes_are_added_up_for_the_index(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(150))
        load(database, cache)
        put(cache, [3], version=1)
        forget(cache, [120])
        load(database, cache)
        with database.get_connection() as connection:
            assert VectorTable(database).read_changes(connection) == 150 + 1 + 1

    def test_progress_counts_the_rows_of_ranges_that_differ(self, database: Database, cache: ModelCache) -> None:
        put(cache, [1, 2, 150])
        seen: list[Progress] = []
        upload(database, cache, SPEC, TILING, progress=seen.append)
        assert [(each.done, each.total) for each in (seen[0], seen[-1])] == [(0, 3), (3, 3)]
        assert {each.note for each in seen} == {"", FIRST.key, SECOND.key}
        seen.clear()
        put(cache, [3])
        upload(database, cache, SPEC, TILING, progress=seen.append)
        assert [(each.done, each.total, each.note) for each in seen] == [(0, 1, ""), (1, 1, FIRST.key), (1, 1, "")]

    def test_a_bulk_load_is_vacuumed_and_a_small_one_not(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(1000))
        load(database, cache)
        visible = "SELECT relallvisible > 0, reltuples FROM pg_class WHERE relname = 'song_embeddings'"
        assert execute(database.adbc_uri, visible) == [(True, 1000)]
        bounds = "SELECT cardinality(histogram_bounds::text::int[]) FROM pg_stats WHERE attname = 'song_id'"
        assert execute(database.adbc_uri, f"{bounds} AND tablename = 'song_embeddings'") == [(11,)], "of a small sample"
        put(cache, [1000])
        load(database, cache)
        assert execute(database.adbc_uri, visible) == [(True, 1000)]

    def test_an_empty_cache_says_which_command_fills_it_and_makes_no_table(
        self, database: Database, cache: ModelCache
    ) -> None:
        with pytest.raises(StoreError, match="`songvec run`") as caught:
            load(database, cache)
        assert SPEC.model in str(caught.value)
        assert str(cache.storage) in str(caught.value)
        assert execute(database.adbc_uri, "SELECT to_regclass('song_embeddings')") == [(None,)]

    def test_two_loads_at_once_both_end_well(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(500))
        errors: list[BaseException] = []

        def run() -> None:
            try:
                load(database, cache)
            except Exception as error:  # noqa: BLE001 - looked at below
                errors.append(error)

        for version in (0, 1):
            put(cache, range(0, 500, 7), version=version)
            threads = [threading.Thread(target=run) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            expected = {song_id: version if song_id % 7 == 0 else 0 for song_id in range(500)}
            assert read_vectors(database) == vectors_of(expected)
            assert_ledger_fits_table(database)

    def test_a_raised_stop_moves_the_tails_songs_to_their_own_ranges(
        self, database: Database, cache: ModelCache, tmp_path: Path
    ) -> None:
        put(cache, [1, 1050, 2050])
        load(database, cache)
        wider = Tiling(width=100, stop=2_000)
        cut = ModelCache(LocalStorage(tmp_path / "cut"), SPEC.model, SPEC.dimensions)
        put(cut, [1, 1050, 2050, 1051], tiling=wider)
        upload(database, cut, SPEC, wider)
        assert read_vectors(database) == vectors_of([1, 1050, 1051, 2050])
        assert {each.key: n for each, n in loaded_ranges(database).items()} == {
            FIRST.key: 1, "000001000-000001100": 2, "000002000-max": 1
        }  # fmt: skip
        assert_ledger_fits_table(database)
        assert {written for _, written, _ in
                reported(upload(database, cut, SPEC, wider)).values()} == {0}  # fmt: skip


class TestForeignChanges:
    @pytest.mark.parametrize(
        "statement",
        [
            "INSERT INTO song_embeddings SELECT 77, embedding FROM song_embeddings WHERE song_id = 1",
            "DELETE FROM song_embeddings WHERE song_id = 1",
            "DELETE FROM song_embeddings WHERE song_id < 100",
            "UPDATE song_embeddings SET song_id = 140 WHERE song_id = 1",
            "TRUNCATE song_embeddings",
        ],
    )
    def test_rows_that_somebody_else_added_or_removed_are_healed(
        self, database: Database, cache: ModelCache, statement: str
    ) -> None:
        put(cache, [1, 2, 3, 101, 102])
        load(database, cache)
        execute(database.adbc_uri, statement)
        load(database, cache)
        assert read_vectors(database) == vectors_of([1, 2, 3, 101, 102])
        assert_ledger_fits_table(database)

    def test_a_foreign_row_in_the_place_of_a_new_song_gives_way(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(10))
        load(database, cache)
        execute(database.adbc_uri, "UPDATE song_embeddings SET song_id = 50 WHERE song_id = 9")
        load(database, cache)
        assert read_vectors(database) == vectors_of(range(10))
        execute(database.adbc_uri, "UPDATE song_embeddings SET song_id = 50 WHERE song_id = 9")
        put(cache, [50])
        load(database, cache)
        assert read_vectors(database)[50] == make_vector(50).tolist()

    def test_rows_outside_the_loaded_ranges_stay(self, database: Database, cache: ModelCache) -> None:
        put(cache, [1])
        load(database, cache)
        for song_id in (-5, 500):
            foreign = "INSERT INTO song_embeddings SELECT %s, embedding FROM song_embeddings WHERE song_id = 1"
            execute(database.adbc_uri, foreign, (song_id,))
        put(cache, [2])
        load(database, cache)
        assert set(read_vectors(database)) == {-5, 1, 2, 500}

    def test_a_dropped_table_is_filled_anew_from_the_cache(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(150))
        load(database, cache)
        execute(database.adbc_uri, "DROP TABLE song_embeddings")
        assert load(database, cache) == {FIRST.key: (100, 100, 0), SECOND.key: (50, 50, 0)}
        assert read_vectors(database) == vectors_of(range(150))


class TestErrorsInTheMiddle:
    def prepare(self, database: Database, cache: ModelCache) -> dict[int, list[float]]:
        """Load three songs of two ranges, then let much more be to do; what the table holds."""
        put(cache, [1, 2, 101])
        load(database, cache)
        for song_ids in (range(30), range(30, 60), range(60, 90), range(101, 160)):
            put(cache, song_ids, version=1)
        return vectors_of([1, 2, 101])

    def finish(self, database: Database, cache: ModelCache) -> None:
        """A rerun ends well."""
        load(database, cache)
        assert read_vectors(database) == vectors_of(dict.fromkeys([*range(90), *range(101, 160)], 1))
        assert_ledger_fits_table(database)

    def test_a_statement_timeout_made_for_queries_does_not_end_a_load(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, [1])
        load(database, cache)
        execute(
            database.adbc_uri,
            """
            CREATE SCHEMA slow;
            CREATE FUNCTION slow.wait() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END';
            CREATE TRIGGER slow BEFORE INSERT ON song_embeddings FOR EACH STATEMENT EXECUTE FUNCTION slow.wait();
            """,
        )
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET statement_timeout = '400ms'")
        try:
            put(cache, [2])
            load(database, cache)
        finally:
            execute(database.adbc_uri, f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET statement_timeout")
        assert read_vectors(database) == vectors_of([1, 2])

    def test_a_stop_in_the_middle_of_a_range_leaves_that_range_as_it_was(
        self, database: Database, cache: ModelCache
    ) -> None:
        before = self.prepare(database, cache)
        stop = StopDuringCopy(database)
        with pytest.raises(StoppedError, match="the same command goes on from there"):
            upload(database, cache, SPEC, TILING, stop=stop, n_connections=1)
        assert read_vectors(database) == before
        assert_ledger_fits_table(database)
        self.finish(database, cache)

    def test_a_stop_between_two_ranges_keeps_the_first(self, database: Database, cache: ModelCache) -> None:
        self.prepare(database, cache)
        stop = StopSignal()

        def stop_after_the_first(progress: Progress) -> None:
            if progress.note == FIRST.key and progress.done == 90:
                stop.set()

        with pytest.raises(StoppedError):
            upload(database, cache, SPEC, TILING, progress=stop_after_the_first, stop=stop, n_connections=1)
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(90), 1) | {101: 0})
        assert_ledger_fits_table(database)
        self.finish(database, cache)

    def test_a_connection_killed_during_copy_leaves_the_range_as_it_was(
        self, database: Database, cache: ModelCache
    ) -> None:
        before = self.prepare(database, cache)
        stop = StopDuringCopy(database, lambda: kill_copy(database))
        with pytest.raises(DatabaseError, match="start the same command again"):
            upload(database, cache, SPEC, TILING, stop=stop, n_connections=1)
        assert read_vectors(database) == before
        assert_ledger_fits_table(database)
        self.finish(database, cache)

    def test_a_cancelled_copy_leaves_the_range_as_it_was(self, database: Database, cache: ModelCache) -> None:
        before = self.prepare(database, cache)
        stop = StopDuringCopy(database, lambda: cancel(database))
        with pytest.raises(SongvecError):
            upload(database, cache, SPEC, TILING, stop=stop, n_connections=1)
        assert read_vectors(database) == before
        assert_ledger_fits_table(database)
        self.finish(database, cache)

    def test_a_ledger_that_cannot_be_written_takes_the_rows_back(self, database: Database, cache: ModelCache) -> None:
        before = self.prepare(database, cache)
        execute(database.adbc_uri, "ALTER TABLE songvec.loaded_ranges ADD CONSTRAINT full_disk CHECK (n_songs < 50)")
        with pytest.raises(DatabaseError, match="full_disk"):
            load(database, cache)
        assert read_vectors(database) == before
        execute(database.adbc_uri, "ALTER TABLE songvec.loaded_ranges DROP CONSTRAINT full_disk")
        self.finish(database, cache)


class TestDamage:
    def test_a_damaged_row_is_never_loaded_but_named_and_the_other_ranges_are_loaded(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, [*range(20), *range(100, 120), *range(200, 220)])
        damage(cache, 107)
        with pytest.raises(DamagedCacheError, match=r"song_id 107,.*run `songvec run --ranges 000000100") as caught:
            load(database, cache)
        assert cache.storage.describe(SECOND.key) in str(caught.value)
        assert read_vectors(database) == vectors_of([*range(20), *range(200, 220)])
        assert_ledger_fits_table(database)

    def test_after_it_was_discarded_the_rest_of_the_range_is_loaded(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(20))
        damage(cache, 7)
        damage(cache, 8)
        with pytest.raises(DamagedCacheError):
            load(database, cache)
        _, live = load_embeddings_from_cache(cache, FIRST)
        assert live["song_id"].to_list() == [*range(7), *range(9, 20)]
        assert load(database, cache) == {FIRST.key: (18, 18, 0)}
        put(cache, [7, 8])  # embedded anew
        load(database, cache)
        assert read_vectors(database) == vectors_of(range(20))

    def test_a_loaded_range_keeps_its_rows_when_its_files_are_damaged_later(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(20))
        load(database, cache)
        put(cache, [30])
        put(cache, [30, 31], version=1)
        damage(cache, 31, version=1)
        with pytest.raises(DamagedCacheError, match="song_id 31"):
            load(database, cache)
        assert read_vectors(database) == vectors_of(range(20))
        load(database, cache)
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(20), 0) | {30: 1})

    @pytest.mark.parametrize("is_complete", [True, False])
    @pytest.mark.parametrize("kind", ["narrow", "cut", "half", "missing"])
    def test_songs_that_a_damaged_file_lost_are_not_taken_for_deleted(
        self, database: Database, cache: ModelCache, kind: str, is_complete: bool
    ) -> None:
        put(cache, range(10))
        put(cache, range(10, 20))
        put(cache, range(100, 110))
        if is_complete:
            complete(cache, FIRST)
        load(database, cache)
        path = file_with(cache, 3)
        whole = bytearray(path.read_bytes())
        if kind == "narrow":
            whole[whole.index(np.arange(10, dtype="<i4").tobytes())] ^= 4
        path.write_bytes(whole[: {"cut": -1, "half": len(whole) // 2}.get(kind, len(whole))])
        if kind == "missing":
            path.unlink()
        put(cache, [105], version=1)
        for _ in range(2):
            with pytest.raises(DamagedCacheError, match=r"run `songvec run --ranges 000000000-000000100"):
                load(database, cache)
            assert {song_id for song_id in read_vectors(database) if song_id < 100} == {*range(20)}
            assert cache.read_manifest(FIRST).complete is None, "the next fill compares"

    def test_without_a_manifest_a_loaded_song_that_no_file_has_is_lost(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, [44, 47])
        put(cache, [45, 46])
        load(database, cache)
        file_with(cache, 45).unlink()
        (cache.storage.root / FIRST.key / "manifest.json").unlink()
        with pytest.raises(DamagedCacheError, match="the vectors of 2 loaded songs are lost"):
            load(database, cache)
        assert set(read_vectors(database)) == {44, 45, 46, 47}

    def test_what_was_discarded_is_not_deleted_by_the_next_load(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(10))
        load(database, cache)
        put(cache, [30])
        damage(cache, 3)
        damage(cache, 30)
        for _ in range(2):
            with pytest.raises(DamagedCacheError):
                load(database, cache)
            assert read_vectors(database) == vectors_of(range(10))
        put(cache, [3, 30], version=1)
        load(database, cache)
        assert read_vectors(database) == vectors_of(dict.fromkeys(range(10), 0) | {3: 1, 30: 1})

    def test_what_a_fill_is_just_writing_is_no_damage(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(10))
        load(database, cache)
        put(cache, range(10, 20))
        forget(cache, [3])
        path = file_with(cache, 4)
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half a file")
        load(database, cache)
        assert read_vectors(database) == vectors_of({*range(20)} - {3})

    def test_a_complete_range_that_was_merged_says_which_songs_were_deleted(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(10))
        load(database, cache)
        forget(cache, range(5))
        complete(cache, FIRST)
        assert cache.open(FIRST).n_rows == 5
        load(database, cache)
        assert read_vectors(database) == vectors_of(range(5, 10))

    def test_a_foreign_file_is_named_and_the_other_ranges_are_loaded(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, [*range(10), *range(100, 110)])
        (path,) = files_of(cache, FIRST)
        path.write_bytes(files_of(cache, SECOND)[0].read_bytes())
        with pytest.raises(DamagedCacheError, match=rf"{path.name} holds model-a.*range 000000100-0"):
            load(database, cache)
        assert read_vectors(database) == vectors_of(range(100, 110))

    @pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
    def test_a_vector_that_is_zero_or_not_finite_is_discarded_though_its_checksum_fits(
        self, database: Database, cache: ModelCache, value: float
    ) -> None:
        put(cache, range(20))
        writer, bad = cache.open(FIRST).open_writer(), np.full((1, DIMENSIONS), value, dtype=np.float32)
        writer.write_base(CachedRows.of([7], [bytes(16)], bad), iter([bad]))
        cached = cache.open(FIRST)
        file = next(DataFile(name, size) for name, size in cached.files.sizes.items() if name.endswith("-base.arrow"))
        cached.save(cached.manifest.adopt([file], [7]))
        with pytest.raises(DamagedCacheError, match="song_id 7,"):
            load(database, cache)
        load(database, cache)
        assert read_vectors(database) == vectors_of({*range(20)} - {7})

    def test_nothing_is_discarded_while_another_run_fills_the_range(
        self, database: Database, cache: ModelCache
    ) -> None:
        put(cache, range(20))
        damage(cache, 7)
        before = cache.read_manifest(FIRST)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                load(database, cache)
            except SongvecError as error:
                errors.append(error)

        loader = threading.Thread(target=run, daemon=True)

        def nothing() -> None:
            return None

        # the lock under which Pipeline's filler writes the range
        with hold_lock(database, f"fill {FIRST.key}", on_wait=nothing, check=nothing):
            loader.start()
            loader.join(timeout=1.5)
            assert cache.read_manifest(FIRST) == before
            assert loader.is_alive()
        loader.join(timeout=60)
        assert [type(error) for error in errors] == [DamagedCacheError]
        assert cache.read_manifest(FIRST).damaged == (7,)


class TestStoring:
    def store(self, database: Database, cache: ModelCache, spec: TableSpec, bulk: bool) -> list[tuple]:
        """Store the first range one way or the other; the rows, then an empty table again."""
        cached, live = load_embeddings_from_cache(cache, FIRST)
        with database.get_connection() as connection:
            batches = read_embeddings_from_file(cached, live["row"])
            if bulk:
                store_embeddings_copy_bulk(connection, batches, spec)
            else:
                for rows in batches:
                    store_embeddings_batch(connection, rows.song_ids, rows.embeddings, spec)
            binary = f"{spec.vector_type}_send(embedding)::text"
            found = connection.execute(sa.text(f"SELECT song_id, {binary} FROM song_embeddings ORDER BY song_id")).all()
            connection.execute(sa.text("TRUNCATE song_embeddings"))
        return [tuple(row) for row in found]

    @pytest.mark.parametrize("spec", [SPEC, HALF])
    def test_batches_and_copy_store_the_same_rows_to_the_last_bit(
        self, database: Database, cache: ModelCache, spec: TableSpec
    ) -> None:
        put(cache, range(60))
        put(cache, range(40, 100), version=1)
        VectorTable(database).ensure(spec)
        copied = self.store(database, cache, spec, bulk=True)
        assert len(copied) == 100
        assert self.store(database, cache, spec, bulk=False) == copied

    def test_batches_update_rows_that_are_there(self, database: Database) -> None:
        VectorTable(database).ensure(SPEC)
        for version in (0, 1):
            with database.get_connection() as connection:
                vectors = np.stack([make_vector(song_id, version) for song_id in (1, 2)])
                store_embeddings_batch(connection, np.array([1, 2], dtype=np.int32), vectors, SPEC)
            assert read_vectors(database) == vectors_of({1: version, 2: version})

    def test_copy_takes_as_many_rows_as_there_are_and_none(self, database: Database) -> None:
        VectorTable(database).ensure(SPEC)
        n_rows = 30_000  # several chunks
        vectors = np.random.default_rng(1).standard_normal((n_rows, DIMENSIONS), dtype=np.float32)
        song_ids, checksums = np.arange(n_rows, dtype=np.int32), np.zeros(n_rows, dtype=np.uint64)
        rows = CachedRows(song_ids, np.zeros(n_rows, dtype="V16"), checksums, vectors)
        with database.get_connection() as connection:
            store_embeddings_copy_bulk(connection, iter(()), SPEC)
            store_embeddings_copy_bulk(connection, iter([rows]), SPEC)
        assert execute(database.adbc_uri, "SELECT count(*), sum(song_id) FROM song_embeddings") == [
            (n_rows, n_rows * (n_rows - 1) // 2)
        ]

    def test_where_copy_is_not_allowed_rows_come_in_batches(self, database: Database, cache: ModelCache) -> None:
        put(cache, range(150))
        with as_role(database, database_right="CREATE, CONNECT") as seen:
            role = sa.make_url(seen.url).username
            execute(
                database.adbc_uri,
                f"""
                GRANT ALL ON SCHEMA public, songvec TO {role};
                GRANT ALL ON ALL TABLES IN SCHEMA songvec TO {role}
                """,
            )
            VectorTable(seen).ensure(SPEC)
            # Postgres takes no COPY FROM into a table with row-level security
            execute(
                database.adbc_uri,
                """
                ALTER TABLE song_embeddings ENABLE ROW LEVEL SECURITY;
                ALTER TABLE song_embeddings FORCE ROW LEVEL SECURITY;
                CREATE POLICY everything ON song_embeddings USING (true) WITH CHECK (true)
                """,
            )
            assert load(seen, cache) == {FIRST.key: (100, 100, 0), SECOND.key: (50, 50, 0)}
            put(cache, [3], version=1)
            assert load(seen, cache)[FIRST.key] == (100, 1, 1)
            assert read_vectors(database) == vectors_of(dict.fromkeys(range(150), 0) | {3: 1})
