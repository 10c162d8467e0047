"""The IVFFlat index: its size and memory, when it is built, and that a build that fails costs nobody anything."""

import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg2
import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError, TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_fact, write_fact
from songvec_assets.progress import Progress
from songvec_assets.vectors import ivfflat
from songvec_assets.vectors.ivfflat import (
    IndexReport,
    build_index,
    choose_lists,
    choose_probes,
    find_index,
    kmeans_bytes,
    reason_to_build,
)
from songvec_assets.vectors.table import CHANGES_FACT, TableSpec, ensure_table
from songvec_assets_tests.administration import dispose, execute, login_role, wait_until, with_parts
from songvec_assets_tests.vectors.conftest import SPEC

MEBIBYTE = 2**20


@pytest.fixture
def table(database: Database) -> Database:
    """A database whose table has 400 rows, song_ids 1 to 400."""
    ensure_table(database, SPEC)
    fill(database, 1, 400)
    return database


def fill(database: Database, first: int, last: int, spec: TableSpec = SPEC) -> None:
    """Insert random rows and count them as changes, as a load does."""
    execute(
        database.adbc_uri,
        f"""
        INSERT INTO song_embeddings SELECT n, array_agg(random() - 0.5)::vector::{spec.vector_type}
        FROM generate_series({first}, {last}) n, generate_series(1, {spec.dimensions}) GROUP BY n
        """,
    )
    count_changes(database, last - first + 1)


def count_changes(database: Database, n_rows: int) -> None:
    """Count rows as changed since the index was built."""
    with database.get_connection() as connection:
        write_fact(connection, CHANGES_FACT, (read_fact(connection, CHANGES_FACT) or 0) + n_rows)


def read_indexes(database: Database) -> dict[str, tuple[bool, str]]:
    """Every index of the table but its key: name to validity and definition."""
    rows = execute(
        database.adbc_uri,
        """
        SELECT c.relname, i.indisvalid, pg_get_indexdef(c.oid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE i.indrelid = 'song_embeddings'::regclass AND NOT i.indisprimary
        """,
    )
    return {name: (valid, definition) for name, valid, definition in rows}


def read_identity(database: Database) -> tuple:
    """Object and file of the index: both change when it is built anew."""
    return execute(database.adbc_uri, "SELECT oid, relfilenode FROM pg_class WHERE relname = 'embeddings_ivfflat_idx'")[
        0
    ]


def definition(lists: int, opclass: str = "vector_cosine_ops") -> str:
    """The index as Postgres spells it; for vector columns the operator class is not the default one, so it is shown."""
    return (
        "CREATE INDEX embeddings_ivfflat_idx ON public.song_embeddings USING ivfflat "
        f"(embedding {opclass}) WITH (lists='{lists}')"
    )


@contextmanager
def writer(database: Database) -> Iterator[None]:
    """Another program's open transaction that wrote to the table: CREATE INDEX CONCURRENTLY waits for its end."""
    with closing(psycopg2.connect(database.adbc_uri, application_name="writer")) as connection:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO song_embeddings SELECT -1, embedding FROM song_embeddings LIMIT 1")
        yield
        connection.rollback()


class Builder(threading.Thread):
    """A build in a thread of its own."""

    def __init__(self, database: Database, lists: int | None = None) -> None:
        super().__init__(daemon=True)
        self._database, self._lists = database, lists
        self.told: list[Progress] = []
        self.report: IndexReport | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Build; keep what it returns or raises."""
        try:
            self.report = build_index(self._database, SPEC, self._lists, self.told.append)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def wait_for_new_index(self) -> None:
        """Until the index that is being built is in the catalogue, not valid yet."""
        wait_until(lambda: "embeddings_ivfflat_idx_new" in read_indexes(self._database))


class TestArithmetic:
    @pytest.mark.parametrize(
        ("n_rows", "lists"), [(0, 1), (1, 1), (10, 3), (400, 20), (10_000, 100), (1_000_000, 1000), (12_425_000, 3525)]
    )
    def test_lists_are_the_square_root_of_the_rows(self, n_rows: int, lists: int) -> None:
        assert choose_lists(n_rows) == lists

    def test_a_setting_decides_the_lists(self) -> None:
        assert choose_lists(1_000_000, 77) == 77

    @pytest.mark.parametrize(
        ("lists", "n_rows", "probes"),
        [(1, 1, 1), (20, 400, 20), (100, 10_000, 100), (100, 10_001, 10), (1000, 1_000_000, 32), (1, 20_000, 1)],
    )
    def test_probes_are_all_lists_of_a_small_table_and_the_square_root_of_a_large_ones(
        self, lists: int, n_rows: int, probes: int
    ) -> None:
        assert choose_probes(lists, n_rows) == probes

    @pytest.mark.parametrize(("lists", "mebibytes"), [(316, 148), (1000, 600), (3525, 3846)])
    def test_memory_is_what_was_measured_at_2000_dimensions(self, lists: int, mebibytes: int) -> None:
        assert kmeans_bytes(lists, 2000) / MEBIBYTE == pytest.approx(mebibytes, abs=1)

    @pytest.mark.parametrize(("lists", "n_rows"), [(150, 10_000), (400, 20_000)])
    def test_memory_is_what_the_server_itself_asks_for(self, database: Database, lists: int, n_rows: int) -> None:
        ensure_table(database, SPEC)
        fill(database, 1, n_rows)
        expected = kmeans_bytes(lists, SPEC.dimensions)
        with pytest.raises(DatabaseError) as caught, database.get_connection() as connection:
            connection.execute(sa.text(f"SET maintenance_work_mem = '{expected * 9 // 10 // 1024}kB'"))
            connection.execute(
                sa.text(
                    "CREATE INDEX ON song_embeddings USING ivfflat (embedding vector_cosine_ops) "
                    f"WITH (lists = {lists})"
                )
            )
        asked = re.search(r"memory required is (\d+) MB", str(caught.value))
        assert asked is not None
        assert int(asked[1]) == pytest.approx(expected / MEBIBYTE, abs=1)

    @pytest.mark.parametrize(
        ("n_rows", "lists", "built", "n_changed", "reason"),
        [
            (400, 20, None, 0, "there is none"),
            (400, 20, {"lists": 20, "n_rows": 400}, 0, None),
            (400, 20, {"lists": 20, "n_rows": 400}, 80, None),
            (400, 20, {"lists": 20, "n_rows": 400}, 81, "81 rows changed since it was built, over a fifth of 400"),
            (625, 25, {"lists": 20, "n_rows": 400}, 100, None),
            (676, 26, {"lists": 20, "n_rows": 400}, 100, "676 rows want 26 lists, it has 20"),
            (225, 15, {"lists": 20, "n_rows": 400}, 10, None),
            (196, 14, {"lists": 20, "n_rows": 400}, 10, "196 rows want 14 lists, it has 20"),
            (12_000_000, 3464, {"lists": 3464, "n_rows": 12_000_000}, 2_500_000,
             "2,500,000 rows changed since it was built, over a fifth of 12,000,000"),
        ],
    )  # fmt: skip
    def test_it_is_built_when_there_is_none_or_lists_or_changes_are_far_off(
        self, n_rows: int, lists: int, built: dict[str, int] | None, n_changed: int, reason: str | None
    ) -> None:
        assert reason_to_build(n_rows, lists, built, n_changed) == reason


class TestBuild:
    def test_the_first_build_makes_the_index_that_the_design_names(self, table: Database) -> None:
        assert find_index(table) is None
        report = build_index(table, SPEC)
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}
        assert (report.built, report.reason) == (True, "there is none")
        assert (report.index.lists, report.index.n_rows, report.index.probes) == (20, 400, 20)
        size = execute(table.adbc_uri, "SELECT pg_relation_size('embeddings_ivfflat_idx')")
        assert [(report.index.n_bytes,)] == size
        assert report.index == find_index(table)
        assert report.seconds > 0

    def test_a_second_build_is_skipped_and_says_why(self, table: Database) -> None:
        build_index(table, SPEC)
        before = read_identity(table)
        report = build_index(table, SPEC)
        assert read_identity(table) == before
        assert (report.built, report.seconds) == (False, 0.0)
        assert report.reason == "20 lists fit 400 rows, 0 rows changed since it was built"

    def test_a_fifth_of_changed_rows_builds_it_anew_and_begins_to_count_again(self, table: Database) -> None:
        build_index(table, SPEC)
        before = read_identity(table)
        count_changes(table, 80)
        assert not build_index(table, SPEC).built
        count_changes(table, 1)
        assert build_index(table, SPEC).reason == "81 rows changed since it was built, over a fifth of 400"
        assert read_identity(table) != before
        assert not build_index(table, SPEC).built
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}

    def test_more_rows_build_it_anew_with_the_lists_that_fit(self, table: Database) -> None:
        build_index(table, SPEC)
        fill(table, 401, 900)
        report = build_index(table, SPEC)
        assert (report.reason, report.index.lists) == ("900 rows want 30 lists, it has 20", 30)
        assert report.index.n_rows == 900
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(30))}

    def test_a_setting_of_lists_builds_it_anew_and_then_holds(self, table: Database) -> None:
        build_index(table, SPEC)
        assert build_index(table, SPEC, lists=50).reason == "400 rows want 50 lists, it has 20"
        assert not build_index(table, SPEC, lists=50).built
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(50))}

    def test_the_memory_that_k_means_needs_is_set_before_the_build(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # so that a table of test size needs more than is set at least
        monkeypatch.setattr(ivfflat, "_MIN_MAINTENANCE_BYTES", 64 << 10)
        name = sa.make_url(database.url).database
        execute(database.adbc_uri, f"ALTER DATABASE {name} SET maintenance_work_mem = '64kB'")
        ensure_table(database, SPEC)
        fill(database, 1, 10_000)
        assert build_index(database, SPEC, lists=150).index.lists == 150

    def test_halfvec_gets_its_own_operator_class(self, database: Database) -> None:
        spec = TableSpec("model-a", 8, "halfvec")
        ensure_table(database, spec)
        fill(database, 1, 400, spec)
        build_index(database, spec)
        assert read_indexes(database) == {"embeddings_ivfflat_idx": (True, definition(20, "halfvec_cosine_ops"))}

    def test_an_index_of_another_operator_class_in_its_place_is_built_anew(self, table: Database) -> None:
        execute(
            table.adbc_uri,
            "CREATE INDEX embeddings_ivfflat_idx ON song_embeddings USING ivfflat (embedding vector_l2_ops)"
            "WITH (lists = 20)",
        )
        with table.get_connection() as connection:
            write_fact(connection, CHANGES_FACT, 0)
        build_index(table, SPEC)
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}

    def test_an_index_that_is_not_valid_counts_as_none(self, table: Database) -> None:
        build_index(table, SPEC)
        execute(
            table.adbc_uri,
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_ivfflat_idx'::regclass",
        )
        assert find_index(table) is None
        assert build_index(table, SPEC).reason == "there is none"
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}

    def test_the_leftover_of_a_crash_is_removed(self, table: Database) -> None:
        build_index(table, SPEC)
        execute(
            table.adbc_uri,
            "CREATE INDEX embeddings_ivfflat_idx_new ON song_embeddings USING ivfflat (embedding vector_cosine_ops)"
            "WITH (lists = 7); UPDATE pg_index SET indisvalid = false "
            "WHERE indexrelid = 'embeddings_ivfflat_idx_new'::regclass",
        )
        assert set(read_indexes(table)) == {"embeddings_ivfflat_idx", "embeddings_ivfflat_idx_new"}
        count_changes(table, 400)
        build_index(table, SPEC)
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}

    def test_without_a_table_or_rows_it_is_refused(self, database: Database) -> None:
        with pytest.raises(TableMismatchError, match="materialize song_embeddings_table first"):
            build_index(database, SPEC)
        ensure_table(database, SPEC)
        with pytest.raises(TableMismatchError, match=r"empty: .* load it first"):
            build_index(database, SPEC)
        assert read_indexes(database) == {}


class TestBuildUnderWay:
    def test_a_cancelled_build_leaves_no_leftover_and_keeps_the_old_index(self, table: Database) -> None:
        build_index(table, SPEC)
        before = read_identity(table)
        fill(table, 401, 900)
        builder = Builder(table)
        with writer(table):
            builder.start()
            builder.wait_for_new_index()
            assert read_indexes(table)["embeddings_ivfflat_idx"] == (True, definition(20))
            table.cancel()
        builder.join(timeout=20)
        assert isinstance(builder.error, DatabaseError)
        assert "the statement was cancelled" in str(builder.error)
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}
        assert read_identity(table) == before
        assert build_index(table, SPEC).reason == "900 rows want 30 lists, it has 20"

    def test_a_build_whose_connection_breaks_keeps_the_old_index_and_can_be_done_again(self, table: Database) -> None:
        build_index(table, SPEC)
        fill(table, 401, 900)
        builder = Builder(table)
        with writer(table):
            builder.start()
            builder.wait_for_new_index()
            kill = """
                SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
                WHERE datname = current_database() AND state = 'active' AND query LIKE 'CREATE INDEX CONCURRENTLY%'
            """
            assert execute(table.adbc_uri, kill) == [(True,)]
        builder.join(timeout=20)
        assert isinstance(builder.error, DatabaseError)
        assert read_indexes(table)["embeddings_ivfflat_idx"] == (True, definition(20))
        assert build_index(table, SPEC).built
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(30))}

    def test_the_roles_timeouts_do_not_end_it_and_its_progress_is_told(self, table: Database) -> None:
        with login_role(table.adbc_uri, "SUPERUSER") as role:
            for timeout in ("statement_timeout", "lock_timeout"):
                execute(table.adbc_uri, f"ALTER ROLE {role} SET {timeout} = '1s'")
            seen = Database(with_parts(table.url, username=role))
            builder = Builder(seen)
            with writer(table):
                builder.start()
                wait_until(lambda: builder.told or not builder.is_alive())
            builder.join(timeout=20)
            dispose(seen.url)
            assert builder.error is None
            assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}
            told = builder.told[0]
            assert (told.step, told.total, told.unit) == ("build index", 100, "%")
            assert told.note == "waiting for writers before build"
            execute(table.adbc_uri, f"REASSIGN OWNED BY {role} TO postgres")

    def test_of_two_builds_at_once_the_second_waits_and_finds_it_done(self, table: Database) -> None:
        builders = [Builder(table), Builder(table)]
        with writer(table):
            for builder in builders:
                builder.start()
            builders[0].wait_for_new_index()
        for builder in builders:
            builder.join(timeout=20)
        assert [builder.error for builder in builders] == [None, None]
        assert sorted(builder.report.built for builder in builders if builder.report) == [False, True]
        assert read_indexes(table) == {"embeddings_ivfflat_idx": (True, definition(20))}
