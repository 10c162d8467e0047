"""What the server has for a build, as different users see it, and what is refused or made smaller before it begins."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import DatabaseError, SettingsError
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index import build_plan
from songvec_assets.vectors.index.build_plan import IndexSettings, plan_lists
from songvec_assets.vectors.index.sizing import Capacity, build_bytes, estimate_build, read_capacity
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import as_role, dispose, execute
from songvec_assets_tests.vectors.conftest import SPEC
from songvec_assets_tests.vectors.indexes import build_index, change, fill, read_indexes

MEBIBYTE = 2**20
SONGS = TableSpec("model-a", 2000)
ROOMY = Capacity(2**40, "a test", None, None, workers=2)


def with_lists(lists: int, spec: TableSpec = SONGS) -> Capacity:
    """A server whose memory is just enough for so many."""
    return replace(ROOMY, memory_bytes=build_bytes(lists, spec.dimensions))


class TestReading:
    def test_a_setting_decides_over_memory(self, database: Database) -> None:
        capacity = read_capacity(database, 123 * MEBIBYTE)
        assert (capacity.memory_bytes, capacity.memory_source) == (123 * MEBIBYTE, "SONGVEC_INDEX_MEMORY_MB")

    def test_else_half_of_what_a_linux_server_has_available(self, database: Database) -> None:
        total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        capacity = read_capacity(database)
        assert 0 < capacity.memory_bytes < int(total.split()[1]) * 1024 / 2
        assert "available on the server" in capacity.memory_source

    def test_a_user_who_may_not_look_is_told_the_servers_own_setting(self, database: Database) -> None:
        with as_role(database) as seen:
            execute(database.adbc_uri, f"ALTER DATABASE {sa.make_url(database.url).database} "
                    "SET effective_cache_size = '300MB'")  # fmt: skip
            capacity = read_capacity(seen)
        assert capacity.memory_bytes == 300 * MEBIBYTE
        assert "effective_cache_size" in capacity.memory_source
        assert capacity.free_bytes is None

    def test_the_disk_of_a_server_on_this_machine_is_seen(self, database: Database) -> None:
        free = read_capacity(database).free_bytes
        assert free is not None
        assert free > 0

    def test_where_other_disks_are_set_none_is_judged(self, database: Database) -> None:
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET default_tablespace = 'pg_default'")
        dispose(database.url)
        assert read_capacity(database).free_bytes is None

    def test_a_limit_of_temporary_files_is_read(self, database: Database) -> None:
        assert read_capacity(database).temporary_bytes is None
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET temp_file_limit = '7MB'")
        dispose(database.url)
        assert read_capacity(database).temporary_bytes == 7 * MEBIBYTE

    def test_no_more_workers_than_the_server_starts_or_memory_feeds(self, database: Database) -> None:
        cores = os.cpu_count() or 1
        assert read_capacity(database).workers == min(cores - 1, 8)
        assert read_capacity(database, searched=True).workers == max(0, min(cores - 2, 8))
        assert read_capacity(database, 96 * MEBIBYTE).workers <= 2
        assert read_capacity(database, 10 * MEBIBYTE).workers == 0
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET max_parallel_workers = 0")
        dispose(database.url)
        assert read_capacity(database).workers == 0


class TestLists:
    def test_what_fits_is_taken(self) -> None:
        assert plan_lists(1_000_000, IndexSettings(), None, with_lists(1000), SONGS) == (1000, "")

    def test_what_does_not_fit_is_lowered_to_the_most_that_do_and_says_why(self) -> None:
        lists, reported = plan_lists(1_000_000, IndexSettings(), None, with_lists(400), SONGS)
        assert lists == 400
        assert reported == "1,000 lists need 612 MiB of memory, 197 MiB may be taken (a test), so it gets 400"

    def test_what_a_person_set_is_refused_with_both_figures_and_the_remedy(self) -> None:
        with pytest.raises(SettingsError) as caught:
            plan_lists(1_000_000, IndexSettings(lists=1000), None, with_lists(400), SONGS)
        assert str(caught.value) == (
            "SONGVEC_LISTS: 1,000 lists need 612 MiB of memory, 197 MiB may be taken (a test): set 400 or fewer, or "
            "none, or raise SONGVEC_INDEX_MEMORY_MB"
        )

    def test_what_is_there_already_is_not_refused(self) -> None:
        assert plan_lists(1_000_000, IndexSettings(lists=1000), 1000, with_lists(400), SONGS) == (1000, "")

    def test_memory_that_is_less_than_at_the_build_makes_no_new_build(self) -> None:
        assert plan_lists(1_000_000, IndexSettings(), 900, with_lists(400), SONGS) == (900, "")
        assert plan_lists(1_000_000, IndexSettings(), 1000, with_lists(400), SONGS) == (1000, "")

    def test_memory_that_is_more_than_at_the_build_is_used(self) -> None:
        assert plan_lists(1_000_000, IndexSettings(), 300, with_lists(400), SONGS)[0] == 400

    def test_not_even_one_list_is_an_error(self) -> None:
        with pytest.raises(DatabaseError, match=r"may be taken \(a test\): raise SONGVEC_INDEX_MEMORY_MB"):
            plan_lists(400, IndexSettings(), None, replace(ROOMY, memory_bytes=MEBIBYTE), SONGS)


class TestDisk:
    ESTIMATE = estimate_build(12_000_000, 3464, 2000, workers=2)

    def test_a_limit_of_temporary_files_refuses_with_both_figures_and_the_remedy(self) -> None:
        enough = replace(ROOMY, temporary_bytes=self.ESTIMATE.temporary_bytes)
        enough.check_disk(self.ESTIMATE)
        with pytest.raises(DatabaseError) as caught:
            replace(enough, temporary_bytes=2**30).check_disk(self.ESTIMATE)
        for words in ("89.9 GiB of temporary files", "temp_file_limit is 1.0 GiB", "ALTER ROLE … SET temp_file_limit"):
            assert words in str(caught.value)

    def test_too_little_free_disk_refuses_with_the_figures(self) -> None:
        needed = self.ESTIMATE.temporary_bytes + self.ESTIMATE.index_bytes
        replace(ROOMY, free_bytes=needed).check_disk(self.ESTIMATE)
        with pytest.raises(DatabaseError) as caught:
            replace(ROOMY, free_bytes=needed - 1).check_disk(self.ESTIMATE)
        for words in ("91.6 GiB of disk for the index", "up to 89.9 GiB while it sorts", "181.5 GiB are free"):
            assert words in str(caught.value)

    def test_what_cannot_be_seen_refuses_nothing(self) -> None:
        ROOMY.check_disk(self.ESTIMATE)


class TestBuild:
    """The same, by whole calls on a real server."""

    def test_too_little_memory_makes_fewer_lists_and_says_so(
        self, database: Database, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # a table of test size does not want so many
        monkeypatch.setattr(build_plan, "choose_lists", lambda n_rows: 2 * n_rows)
        VectorTable(database).ensure(SPEC)
        fill(database, 1, 400)
        report = build_index(database, cache, SPEC, IndexSettings(memory_bytes=100 * MEBIBYTE))
        assert report.index.lists == 703
        assert "100 MiB may be taken (SONGVEC_INDEX_MEMORY_MB), so it gets 703" in report.reason
        # memory that is less later is no reason to build, but what is built then must fit into it
        assert not build_index(database, cache, SPEC, IndexSettings(memory_bytes=90 * MEBIBYTE)).built
        change(database, 100)
        report = build_index(database, cache, SPEC, IndexSettings(memory_bytes=90 * MEBIBYTE))
        assert report.index.lists < 703
        assert "100 rows changed since it was built" in report.reason
        assert "90 MiB may be taken" in report.reason

    def test_memory_for_no_list_at_all_is_an_error(self, database: Database, cache: ModelCache) -> None:
        VectorTable(database).ensure(SPEC)
        fill(database, 1, 400)
        with pytest.raises(DatabaseError, match="20 lists need 64 MiB of memory, 20 MiB may be taken"):
            build_index(database, cache, SPEC, IndexSettings(memory_bytes=20 * MEBIBYTE))
        assert read_indexes(database) == {}

    def test_lists_that_do_not_fit_are_refused_before_anything_is_built(
        self, database: Database, cache: ModelCache
    ) -> None:
        VectorTable(database).ensure(SPEC)
        fill(database, 1, 400)
        wanted = IndexSettings(lists=5_000, memory_bytes=100 * MEBIBYTE)
        with pytest.raises(SettingsError, match=r"5,000 lists need 4\.9 GiB of memory, 100 MiB may be taken"):
            build_index(database, cache, SPEC, wanted)
        assert read_indexes(database) == {}

    def test_a_limit_of_temporary_files_refuses_before_anything_is_built(
        self, database: Database, cache: ModelCache
    ) -> None:
        VectorTable(database).ensure(SPEC)
        fill(database, 1, 400)
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET temp_file_limit = '1kB'")
        dispose(database.url)
        with pytest.raises(DatabaseError, match="temp_file_limit is 0 MiB"):
            build_index(database, cache, SPEC)
        assert read_indexes(database) == {}

    def test_sessions_and_roles_keep_their_settings(self, database: Database, cache: ModelCache) -> None:
        VectorTable(database).ensure(SPEC)
        fill(database, 1, 400)
        build_index(database, cache, SPEC, IndexSettings(memory_bytes=200 * MEBIBYTE))
        for profile in ("batch", "web"):
            with database.get_connection(profile) as connection:  # type: ignore[arg-type]
                assert connection.scalar(sa.text("SHOW maintenance_work_mem")) == "64MB"
                assert connection.scalar(sa.text("SHOW max_parallel_maintenance_workers")) == "2"
