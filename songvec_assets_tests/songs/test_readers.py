"""What ends a statement or a connection costs its range, a missing server ends the export, a stop ends at once."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError, SourceError, StoppedError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, RunContext, StopSignal
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs import readers
from songvec_assets.songs.export import ExportMode, ExportOptions, cache_songs_to_parquet
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.reports import IncompleteExportError
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import find_source
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.administration import dispose, execute, wait_until
from songvec_assets_tests.pooler import running_pgbouncer

TILING = Tiling(width=100, stop=4_000)
FRAGILE = PostgresSettings(songs_table="faults.songs", song_id_column="id")
END_CONNECTION, SLEEP = "pg_terminate_backend(pg_backend_pid())", "pg_sleep(600)"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PAUSES_S", (0.0, 0.01, 0.01))


@pytest.fixture
def misbehave(database: Database) -> Callable[..., None]:
    """Creates the songs of FRAGILE, two a range; some of them do something while they are read, at first or always."""

    def create(action: str, *song_ids: int, n_ranges: int = 10, times: int = 1_000_000) -> None:
        # declared STABLE, so that counting the view's rows does not call it
        execute(
            database.adbc_uri,
            f"""
            CREATE SCHEMA faults;
            CREATE SEQUENCE faults.attempts;
            CREATE TABLE faults.rows (id integer PRIMARY KEY, name text, artist text);
            INSERT INTO faults.rows SELECT 100 * n + m, 'Song', 'Ann'
            FROM generate_series(0, {n_ranges - 1}) n, unnest(ARRAY[0, 50]) m;
            CREATE FUNCTION faults.sing(id integer) RETURNS text STABLE LANGUAGE plpgsql AS $$ BEGIN
                IF id = ANY ('{{{",".join(map(str, song_ids))}}}') THEN
                    IF nextval('faults.attempts') <= {times} THEN PERFORM {action}; END IF;
                END IF;
                RETURN 'la ' || id;
            END $$;
            CREATE VIEW faults.songs AS SELECT id, name, artist, faults.sing(id) AS lyrics FROM faults.rows
            """,
        )

    return create


def run(
    database: Database, folder: Path, n_readers: int = 2, mode: ExportMode = "all", context: RunContext | None = None
) -> list[Progress]:
    """One export of FRAGILE; its progress."""
    reported: list[Progress] = []
    options = ExportOptions(mode, n_readers=n_readers)
    source = find_source(database, FRAGILE)
    cache_songs_to_parquet(
        source, Snapshots(LocalStorage(folder)), TILING, options, context or RunContext(reported.append)
    )
    return reported


def exported(folder: Path) -> list[int]:
    """The song_ids of all snapshots."""
    return [
        song_id
        for each in Snapshots(LocalStorage(folder)).ranges()
        for song_id in Snapshots(LocalStorage(folder)).read(each)["song_id"]
    ]


def all_but(*ranges: int, n_ranges: int = 10) -> list[int]:
    """The song_ids of FRAGILE outside some ranges."""
    return [100 * n + m for n in range(n_ranges) if n not in ranges for m in (0, 50)]


def set_timeout(database: Database, milliseconds: int) -> None:
    """What an administrator sets against long queries."""
    name = sa.make_url(database.url).database
    execute(database.adbc_uri, f"ALTER DATABASE {name} SET statement_timeout = {milliseconds}")


def test_songs_that_are_refused_do_not_leave_their_transaction_to_the_next_range(database: Database) -> None:
    begun: list[object] = []

    def read(connection: readers.adbc.Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT now()")
            begun.append(cursor.fetchone())
        raise SourceError("an id is there twice")

    with readers.Readers(database, 1) as one:
        for _ in range(2):
            with pytest.raises(SourceError, match="twice"):
                next(one.map(lambda reader, _: reader.read(read), [None], RunContext()))
    assert begun[0] != begun[1]


class TestPassingFaults:
    @pytest.mark.parametrize("n_readers", [1, 3])
    def test_a_connection_that_ends_in_the_middle_of_a_range_is_made_again(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path, n_readers: int
    ) -> None:
        misbehave(END_CONNECTION, 350, times=2)
        reported = run(database, tmp_path, n_readers)
        assert exported(tmp_path) == all_but()
        assert execute(database.adbc_uri, "SELECT last_value FROM faults.attempts") == [(3,)]
        assert [(each.done, each.total, each.note) for each in reported] == [(2 * n, 20, "") for n in range(1, 11)]

    def test_a_statement_that_timed_out_is_tried_again(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave(SLEEP, 0, times=1)
        set_timeout(database, 300)
        run(database, tmp_path)
        assert exported(tmp_path) == all_but()

    def test_every_connection_ending_at_once_costs_nothing(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        others = "pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        misbehave(others, 250, times=1)
        run(database, tmp_path, n_readers=4)
        assert exported(tmp_path) == all_but()


class TestLastingFaults:
    def test_a_range_that_ends_every_connection_is_named_and_the_others_are_done(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave(END_CONNECTION, 350)
        with pytest.raises(IncompleteExportError) as caught:
            run(database, tmp_path)
        assert exported(tmp_path) == all_but(3)
        assert execute(database.adbc_uri, "SELECT last_value FROM faults.attempts") == [(3,)]
        words = str(caught.value)
        assert words.startswith("1 of 10 ranges were not exported; the others are done and kept")
        assert "000000300-000000400: Postgres: " in words
        assert "terminating connection due to administrator command" in words
        assert isinstance(caught.value, DatabaseError)
        report = caught.value.report
        assert [each.footer.n_songs for each in report.ranges] == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]
        assert [each.range.key for each in report.failed] == ["000000300-000000400"]

    def test_a_range_that_always_times_out_is_named_and_exported_once_it_no_longer_does(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave(SLEEP, 350, 450, times=6)
        set_timeout(database, 200)
        with pytest.raises(IncompleteExportError, match="statement timeout") as caught:
            run(database, tmp_path)
        assert "000000300-000000400, 000000400-000000500: Postgres: " in str(caught.value)
        assert exported(tmp_path) == all_but(3, 4)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        run(database, tmp_path)
        assert exported(tmp_path) == all_but()
        assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()

    def test_a_fault_of_the_songs_themselves_is_not_tried_again(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1 / 0", 150, 250, 350, 450)
        reported: list[Progress] = []
        with pytest.raises(IncompleteExportError, match="division by zero"):
            run(database, tmp_path, n_readers=1, context=RunContext(reported.append))
        # four in a row are no reason to give the others up: the server answers
        assert exported(tmp_path) == all_but(1, 2, 3, 4)
        assert execute(database.adbc_uri, "SELECT last_value FROM faults.attempts") == [(4,)]
        assert reported[2].note == "not exported: 000000100-000000200, 000000200-000000300"

    def test_ranges_that_failed_for_the_same_reason_are_named_together_and_not_all_of_them(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1 / 0", *range(50, 750, 100))
        with pytest.raises(IncompleteExportError) as caught:
            run(database, tmp_path)
        words = str(caught.value)
        assert "000000400-000000500 and 2 more: Postgres: " in words
        assert words.count("division by zero") == 1

    def test_a_missing_server_is_not_asked_for_every_range(
        self,
        database: Database,
        misbehave: Callable[..., None],
        tmp_path: Path,
        server_url: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        name, n_connections, connect = sa.make_url(database.url).database, 0, readers.adbc.connect

        def count_and_connect(address: str) -> object:
            nonlocal n_connections
            n_connections += 1
            return connect(address)

        def close_doors(progress: Progress) -> None:
            if progress.done == 2:
                execute(server_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
                execute(
                    server_url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
                )

        monkeypatch.setattr(readers.adbc, "connect", count_and_connect)
        misbehave("pg_sleep(0.02)", *range(0, 4000, 50), n_ranges=40)
        try:
            with pytest.raises(IncompleteExportError, match="not currently accepting connections") as caught:
                run(database, tmp_path, context=RunContext(close_doors))
        finally:
            execute(server_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert len(caught.value.report.ranges) == 40
        assert len(caught.value.report.failed) > 30
        assert n_connections < 30

    def test_an_append_that_fails_where_songs_are_already_writes_no_later_range(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1 / 0", 150, times=1)
        execute(database.adbc_uri, "DELETE FROM faults.rows WHERE id > 100")
        run(database, tmp_path)
        execute(database.adbc_uri, "INSERT INTO faults.rows SELECT n, 'New', 'Ann' FROM unnest(ARRAY[150, 250, 350]) n")
        with pytest.raises(IncompleteExportError, match="3 of 3 ranges"):
            run(database, tmp_path, mode="append")
        assert exported(tmp_path) == [0, 50, 100]
        run(database, tmp_path, mode="append")
        assert exported(tmp_path) == [0, 50, 100, 150, 250, 350]

    def test_an_append_reads_a_range_that_failed_before(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1 / 0", 250, times=1)
        with pytest.raises(IncompleteExportError):
            run(database, tmp_path)
        assert exported(tmp_path) == all_but(2)
        run(database, tmp_path, mode="append")
        assert exported(tmp_path) == all_but()


class TestStop:
    def test_it_cancels_what_is_being_read_and_keeps_what_is_done(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave(SLEEP, 350, 400)
        stop = StopSignal()
        sleeping = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"

        def stop_later() -> None:
            wait_until(lambda: len(execute(database.adbc_uri, sleeping)) == 2)
            stop.set()

        stopper = Thread(target=stop_later)
        stopper.start()
        with pytest.raises(StoppedError):
            run(database, tmp_path, context=RunContext(stop=stop))
        stopper.join()
        assert exported(tmp_path) == all_but(*range(3, 10))
        wait_until(lambda: not execute(database.adbc_uri, sleeping))

    def test_it_ends_a_pause_between_two_attempts(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        misbehave(END_CONNECTION, 350)
        monkeypatch.setattr(readers, "_PAUSES_S", (0.0, 3600.0))
        stop = StopSignal()

        def stop_at_three(progress: Progress) -> None:
            if progress.done == 6:
                wait_until(lambda: execute(database.adbc_uri, "SELECT 1 FROM faults.attempts WHERE is_called"))
                time.sleep(0.1)  # until the reader that lost its connection pauses
                stop.set()

        with pytest.raises(StoppedError):
            run(database, tmp_path, context=RunContext(stop_at_three, stop))
        assert exported(tmp_path)[:6] == all_but(*range(3, 10))

    def test_no_more_is_read_ahead_than_a_few_ranges(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1")
        stop = StopSignal()

        def stop_at_first(progress: Progress) -> None:
            wait_until(lambda: len(Snapshots(LocalStorage(tmp_path)).ranges()) == 4)
            time.sleep(0.2)  # long enough to read another
            stop.set()

        with pytest.raises(StoppedError):
            run(database, tmp_path, context=RunContext(stop_at_first, stop))
        assert exported(tmp_path) == all_but(*range(4, 10))

    def test_what_waits_for_a_reader_when_they_end_is_not_begun(self, database: Database) -> None:
        begun: list[int] = []

        def work(_: readers.Reader, item: int) -> None:
            begun.append(item)
            assert not item or two._ended.wait(60)

        with readers.Readers(database, 2) as two:
            next(two.map(work, range(9), RunContext()))
            wait_until(lambda: len(begun) == 3)
        assert sorted(begun) == [0, 1, 2]


class TestSideBySide:
    @pytest.mark.parametrize("n_readers", [1, 2, 5])
    def test_reports_come_in_order_whoever_is_first(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path, n_readers: int
    ) -> None:
        misbehave("pg_sleep(0.2)", 0, 400)
        reported: list[Progress] = []
        source = find_source(database, FRAGILE)
        options = ExportOptions(n_readers=n_readers)
        report = cache_songs_to_parquet(
            source, Snapshots(LocalStorage(tmp_path)), TILING, options, RunContext(reported.append)
        )
        assert [each.range.start for each in report.ranges] == list(range(0, 1000, 100))
        assert [(each.done, each.total) for each in reported] == [(2 * n, 20) for n in range(1, 11)]

    def test_what_one_writes_another_number_of_readers_does_not_write_again(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1")
        run(database, tmp_path, n_readers=1)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        run(database, tmp_path, n_readers=4)
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    def test_connections_are_named_for_who_looks_at_the_server_and_closed_at_the_end(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        misbehave("1")
        execute(
            database.adbc_uri,
            "CREATE VIEW faults.named AS SELECT id, name, current_setting('application_name') AS artist, "
            "pg_backend_pid()::text AS lyrics FROM faults.rows",
        )
        source = find_source(database, PostgresSettings(songs_table="faults.named", song_id_column="id"))
        cache_songs_to_parquet(source, Snapshots(LocalStorage(tmp_path)), TILING, ExportOptions(n_readers=2))
        songs = [Snapshots(LocalStorage(tmp_path)).read(each) for each in Snapshots(LocalStorage(tmp_path)).ranges()]
        assert {name for each in songs for name in each["artist"]} == {"songvec"}
        assert len({pid for each in songs for pid in each["lyrics"]}) <= 2
        dispose(database.url)  # the readers' connections are in no pool
        wait_until(
            lambda: (
                execute(
                    database.adbc_uri,
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'songvec' "
                    "AND datname = current_database()",
                )
                == [(0,)]
            )
        )


class TestPooler:
    def test_songs_come_through_a_pooler_in_transaction_mode(
        self, database: Database, misbehave: Callable[..., None], tmp_path: Path
    ) -> None:
        # one session of the server for all readers: each transaction waits for another's end
        misbehave(END_CONNECTION, 350, times=1)
        with running_pgbouncer(database.url, pool_size=1) as url:
            seen = Database(url)
            run(seen, tmp_path)
            assert exported(tmp_path) == all_but()
            execute(database.adbc_uri, "INSERT INTO faults.rows VALUES (960, 'New', 'Ann')")
            run(seen, tmp_path, mode="append")
            assert exported(tmp_path) == [*all_but(), 960]
            seen.get_engine().dispose()
