"""Songs that vanish from the source: in bulk they stop the run before anything is touched; a few leave the table, and
their vectors stay in the cache. Scenarios over all rooms: the command, Dagster, and runs over many ranges."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from songvec_assets import cli
from songvec_assets.definitions import defs
from songvec_assets.errors import BulkDeletionError, SongvecError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.songs import export as export_module
from songvec_assets.songs.reports import IncompleteExportError
from songvec_assets_tests.administration import as_role, execute
from songvec_assets_tests.conftest import environment_of, make_pipeline
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow

N_SONGS = 300
DAY_S = 86_400.0

Command = Callable[..., tuple[int, str]]


def insert(database: Database, first: int = 1, last: int = N_SONGS) -> None:
    """Put songs into the source, each with a text of its own; those that are there stay."""
    execute(
        database.adbc_uri,
        f"""
        CREATE TABLE IF NOT EXISTS songs (id integer PRIMARY KEY, name text, artist text, lyrics text);
        INSERT INTO songs SELECT n, 'Song ' || n, 'Ann', 'la la ' || n FROM generate_series({first}, {last}) n
        ON CONFLICT DO NOTHING
        """,
    )


def change(database: Database, statement: str) -> None:
    """Change the source as another program would."""
    execute(database.adbc_uri, statement)


def run_all(pipeline: Pipeline, confirm_deletions: bool = False) -> None:
    """Export, embed, load."""
    pipeline.export(confirm_deletions=confirm_deletions)
    reports = []
    pipeline.filler().fill_ranges(list(pipeline.tiling), reports.append)
    assert [each.error for each in reports] == [None] * len(reports)
    pipeline.load()


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_song_ids(database: Database) -> list[int]:
    """The songs in the serving table."""
    with database.get_connection() as connection:
        return list(connection.scalars(sa.text("SELECT song_id FROM song_embeddings ORDER BY song_id")))


def count_paid(provider: Provider) -> int:
    """Texts of songs that were billed since the ledger began."""
    return sum(count for text, count in provider.texts().items() if text != "probe")


@pytest.fixture
def command(
    database: Database,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Types a command in this process: exit code and output. The catalogue is embedded, loaded and indexed."""
    insert(database)
    for name, value in {
        **environment_of(database, provider, tmp_path),
        "DAGSTER_HOME": str(tmp_path),
        "COLUMNS": "2000",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def type_in(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["songvec", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    code, output = type_in("run")
    assert code == 0, output
    assert count_paid(provider) == N_SONGS
    provider.reset_ledger()
    return type_in


class TestCommand:
    @pytest.mark.parametrize(
        ("statement", "n_missing"), [("TRUNCATE songs", 300), ("DELETE FROM songs WHERE id > 255", 45)]
    )
    def test_absence_in_bulk_stops_the_run_with_nothing_touched_and_costs_nothing(
        self, command: Command, database: Database, provider: Provider, tmp_path: Path, statement: str, n_missing: int
    ) -> None:
        files = read_files(tmp_path / "store")
        change(database, statement)
        code, output = command("run")
        assert code == 1
        assert f"{n_missing} of 300 songs that are loaded or cached" in output, output
        assert "--confirm-deletions" in output
        assert "truncated" in output
        assert read_files(tmp_path / "store") == files
        assert read_song_ids(database) == [*range(1, N_SONGS + 1)]
        insert(database)
        code, output = command("run")
        assert (code, provider.ledger()["texts_billed"]) == (0, 0), output

    def test_what_is_confirmed_is_deleted_in_that_run_alone(
        self, command: Command, database: Database, provider: Provider
    ) -> None:
        change(database, "DELETE FROM songs WHERE id > 255")
        code, output = command("run", "--confirm-deletions")
        assert code == 0, output
        assert read_song_ids(database) == [*range(1, 256)]
        change(database, "DELETE FROM songs WHERE id > 210")
        code, output = command("run")
        assert (code, "45 of 255 songs" in output) == (1, True), output
        insert(database)
        code, output = command("run")
        assert (code, provider.ledger()["texts_billed"]) == (0, 0), output
        assert read_song_ids(database) == [*range(1, N_SONGS + 1)]

    def test_the_other_commands_that_export_stop_too_and_take_the_option(
        self, command: Command, database: Database, tmp_path: Path
    ) -> None:
        files = read_files(tmp_path / "store")
        change(database, "DELETE FROM songs WHERE id > 255")
        for words in (("embed",), ("estimate",), ("swap", "--vector-type", "halfvec")):
            code, output = command(*words)
            assert (code, "45 of 300 songs" in output) == (1, True), output
        assert read_files(tmp_path / "store") == files
        for words in (("estimate",), ("embed",), ("swap", "--vector-type", "halfvec")):
            code, output = command(*words, "--confirm-deletions")
            assert code == 0, output
        assert read_song_ids(database) == [*range(1, 256)]

    def test_a_dry_run_says_what_would_be_deleted_and_whether_a_run_would_stop(
        self, command: Command, database: Database, tmp_path: Path
    ) -> None:
        code, output = command("run", "--dry-run")
        assert (code, "delete: no song" in output) == (0, True), output
        files = read_files(tmp_path / "store")
        change(database, "DELETE FROM songs WHERE id > 290")
        code, output = command("run", "--dry-run")
        assert (code, "delete: 10 of 300 songs" in output, "would stop" in output) == (0, True, False), output
        change(database, "DELETE FROM songs WHERE id > 255")
        code, output = command("run", "--dry-run")
        assert (code, "delete: 45 of 300 songs" in output, "would stop" in output) == (0, True, True), output
        assert read_files(tmp_path / "store") == files
        assert read_song_ids(database) == [*range(1, N_SONGS + 1)]

    @pytest.mark.usefixtures("command")
    def test_through_dagster_the_step_fails_in_these_words_and_the_run_config_confirms(
        self, database: Database, tmp_path: Path
    ) -> None:
        change(database, "TRUNCATE songs")
        with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
            job = defs.resolve_job_def("refresh")
            failed = job.execute_in_process(instance=instance, raise_on_error=False)
            (failure,) = [event for event in failed.all_events if event.is_step_failure]
            assert failure.step_key == "songs_parquet"
            words = failure.step_failure_data.user_failure_data.description
            assert words.startswith("300 of 300 songs that are loaded or cached (")
            assert "are no longer in songs: nothing was changed" in words
            assert "confirm_deletions" in words
            config = {"resources": {"run": {"config": {"confirm_deletions": True}}}}
            job.execute_in_process(instance=instance, run_config=config, raise_on_error=False)
        assert read_song_ids(database) == []


class TestRanges:
    """Three ranges of 100 songs, below Dagster."""

    @pytest.fixture
    def begin(self, database: Database, provider: Provider, tmp_path: Path) -> Callable[..., Pipeline]:
        """Begins a run over songs that are embedded and loaded."""
        insert(database)
        run_all(make_pipeline(database, provider, tmp_path))
        provider.reset_ledger()
        return lambda **settings: make_pipeline(database, provider, tmp_path, **settings)

    def test_a_few_deleted_songs_leave_the_table_and_come_back_for_nothing(
        self, begin: Callable[..., Pipeline], database: Database, provider: Provider
    ) -> None:
        change(database, "DELETE FROM songs WHERE id BETWEEN 250 AND 259")
        run_all(begin())
        assert read_song_ids(database) == [*range(1, 250), *range(260, 301)]
        # over a fifth of the first range's rows are dead: it is compacted
        for words in ("once", "twice"):
            change(database, f"UPDATE songs SET lyrics = '{words}' || id WHERE id BETWEEN 230 AND 249")
            run_all(begin())
        provider.reset_ledger()
        insert(database)
        run_all(begin())
        assert count_paid(provider) == 0
        assert read_song_ids(database) == [*range(1, N_SONGS + 1)]

    def test_songs_that_lose_their_name_for_a_while_are_not_paid_for_again(
        self, begin: Callable[..., Pipeline], database: Database, provider: Provider
    ) -> None:
        change(database, "UPDATE songs SET name = '' WHERE id BETWEEN 250 AND 259")
        run_all(begin())
        assert len(read_song_ids(database)) == 290
        change(database, "UPDATE songs SET lyrics = 'new ' || id WHERE id BETWEEN 225 AND 249")
        run_all(begin())
        provider.reset_ledger()
        change(database, "UPDATE songs SET name = 'Song ' || id WHERE name = ''")
        run_all(begin())
        assert count_paid(provider) == 0
        assert read_song_ids(database) == [*range(1, N_SONGS + 1)]

    def test_after_the_retention_time_a_compaction_drops_them(
        self, begin: Callable[..., Pipeline], database: Database, provider: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change(database, "DELETE FROM songs WHERE id BETWEEN 205 AND 230")
        with pytest.raises(BulkDeletionError):
            begin(max_missing_share=0.05).export()
        run_all(begin())
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 31 * DAY_S)
        change(database, "UPDATE songs SET lyrics = 'new' WHERE id = 231")
        run_all(begin())
        provider.reset_ledger()
        insert(database)
        run_all(begin())
        assert count_paid(provider) == 26

    def test_no_retention_drops_them_with_the_next_compaction(
        self, begin: Callable[..., Pipeline], database: Database, provider: Provider
    ) -> None:
        change(database, "DELETE FROM songs WHERE id BETWEEN 205 AND 230")
        run_all(begin(retention_days=0))
        insert(database)
        run_all(begin(retention_days=0))
        assert count_paid(provider) == 26

    def test_nineteen_songs_may_go_and_twenty_of_fewer_than_two_hundred_may_not(
        self, begin: Callable[..., Pipeline], database: Database
    ) -> None:
        change(database, "DELETE FROM songs WHERE id > 150")
        run_all(begin(), confirm_deletions=True)
        change(database, "DELETE FROM songs WHERE id > 131")
        begin().export()
        change(database, "DELETE FROM songs WHERE id > 130")
        with pytest.raises(BulkDeletionError, match="20 of 150 songs"):
            begin().export()

    def test_what_an_earlier_export_saw_as_missing_counts_until_it_is_deleted(
        self, begin: Callable[..., Pipeline], database: Database
    ) -> None:
        """Absence that comes in small steps while nothing is loaded is in bulk, too."""
        change(database, "DELETE FROM songs WHERE id > 280")
        begin().export()
        change(database, "DELETE FROM songs WHERE id > 260")
        with pytest.raises(BulkDeletionError, match="40 of 300 songs"):
            begin().export()

    def test_other_ids_in_place_of_the_known_ones_are_absence_though_the_counts_are_equal(
        self, begin: Callable[..., Pipeline], database: Database
    ) -> None:
        change(database, "UPDATE songs SET id = id + 300")
        with pytest.raises(BulkDeletionError, match="300 of 300 songs"):
            begin().export()

    def test_songs_of_a_model_that_was_swapped_out_count_by_the_table_that_serves(
        self, begin: Callable[..., Pipeline], database: Database
    ) -> None:
        """The new model's cache is empty."""
        change(database, "DELETE FROM songs WHERE id > 255")
        other = begin(embedding_model="another/model", swap=True)
        with pytest.raises(BulkDeletionError, match="45 of 300 songs"):
            other.export()

    def test_a_cache_that_nothing_was_loaded_from_counts_too(
        self, begin: Callable[..., Pipeline], database: Database
    ) -> None:
        change(database, "DROP TABLE song_embeddings; DELETE FROM songvec.loaded_ranges")
        change(database, "TRUNCATE songs")
        with pytest.raises(BulkDeletionError, match="300 of 300 songs"):
            begin().export()

    def test_a_catalogue_that_was_never_embedded_may_be_emptied(
        self, database: Database, provider: Provider, tmp_path: Path
    ) -> None:
        insert(database)
        make_pipeline(database, provider, tmp_path).export()
        change(database, "TRUNCATE songs")
        make_pipeline(database, provider, tmp_path).export()
        assert not list((tmp_path / "songs").glob("*.parquet"))

    def test_a_raised_stop_hides_no_absence(self, database: Database, provider: Provider, tmp_path: Path) -> None:
        """The ledger still has the old tail as one range."""
        insert(database, 1_000, 1_099)
        insert(database, 1, 50)
        run_all(make_pipeline(database, provider, tmp_path))
        change(database, "DELETE FROM songs WHERE id > 1040")
        higher = make_pipeline(database, provider, tmp_path, song_id_stop=2_000)
        with pytest.raises(BulkDeletionError, match="59 of 150 songs"):
            higher.export()

    def test_songs_that_vanish_while_the_export_reads_stop_their_ranges(
        self, begin: Callable[..., Pipeline], database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """An ETL that truncates after the songs were counted."""
        files = read_files(tmp_path)
        counted = export_module.count_ranges

        def count_then_truncate(*arguments: object) -> object:
            counts = counted(*arguments)
            change(database, "TRUNCATE songs")
            return counts

        monkeypatch.setattr(export_module, "count_ranges", count_then_truncate)
        with pytest.raises(IncompleteExportError, match="songs that are loaded or cached"):
            begin().export()
        assert read_files(tmp_path) == files

    def test_an_append_without_snapshots_stops_too(
        self, begin: Callable[..., Pipeline], database: Database, tmp_path: Path
    ) -> None:
        """It exports every range as if it were new."""
        for path in (tmp_path / "songs").iterdir():
            path.unlink()
        change(database, "DELETE FROM songs WHERE id BETWEEN 101 AND 145")
        with pytest.raises(IncompleteExportError, match="45 of 300"):
            begin().export("append")
        begin().export("append", confirm_deletions=True)

    @pytest.mark.usefixtures("begin")
    def test_row_security_that_hides_songs_is_named(
        self, database: Database, provider: Provider, tmp_path: Path
    ) -> None:
        change(database, "ALTER TABLE songs ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON songs USING (id <= 200)")
        with as_role(database) as seen:
            role = sa.make_url(seen.url).username
            for schema in ("public", "songvec"):
                change(database, f"GRANT ALL ON SCHEMA {schema} TO {role}")
                change(database, f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {role}")
            with pytest.raises(BulkDeletionError, match=r"100 of 300 songs.*Row security is active"):
                make_pipeline(seen, provider, tmp_path).export()


class TestOneRange:
    """More than half of one range, and a small share of the catalogue."""

    @pytest.fixture
    def begin(self, database: Database, provider: Provider, tmp_path: Path) -> Callable[..., Pipeline]:
        """Begins a run over 220 songs in one range and 1,980 in others; ranges of 220."""
        insert(database, 0, 2_199)

        def deploy_wide(**settings: object) -> Pipeline:
            return make_pipeline(database, provider, tmp_path, range_size=220, song_id_stop=2_200, **settings)

        run_all(deploy_wide())
        provider.reset_ledger()
        return deploy_wide

    def test_half_of_one_range_stops_the_run(
        self, begin: Callable[..., Pipeline], database: Database, tmp_path: Path
    ) -> None:
        files = read_files(tmp_path)
        change(database, "DELETE FROM songs WHERE id BETWEEN 220 AND 330")
        with pytest.raises(BulkDeletionError, match=r"111 of 2,200 songs.*000000220-000000440: 111 of 220"):
            begin().export()
        assert read_files(tmp_path) == files
        begin(max_missing_range_share=0.6).export()

    def test_a_column_that_is_blanked_stops_its_range_and_no_other(
        self, begin: Callable[..., Pipeline], database: Database
    ) -> None:
        change(database, "UPDATE songs SET artist = NULL WHERE id BETWEEN 220 AND 330")
        change(database, "UPDATE songs SET lyrics = 'new' WHERE id = 5")
        pipeline = begin()
        with pytest.raises(
            IncompleteExportError, match=r"111 of 220.*no longer have the fields of the text template"
        ) as caught:
            pipeline.export()
        assert isinstance(caught.value, SongvecError)
        assert [each.range.start for each in caught.value.report.ranges if each.written] == [0]
        assert pipeline.cache.open(caught.value.report.failed[0].range).rows.height == 220
        pipeline.export(confirm_deletions=True)


def test_an_edit_beside_a_row_of_the_future_is_embedded_and_loaded(
    database: Database, provider: Provider, tmp_path: Path
) -> None:
    """Over all rooms: one row's updated_at is in 2099, and later edits of its range are found."""
    insert(database)
    change(
        database,
        """
        ALTER TABLE songs ADD COLUMN at timestamptz DEFAULT '2026-01-01';
        UPDATE songs SET at = '2099-01-01' WHERE id = 7
        """,
    )
    run_all(make_pipeline(database, provider, tmp_path, updated_at_column="at"))
    provider.reset_ledger()
    change(database, "UPDATE songs SET lyrics = 'edited', at = now() WHERE id = 8")
    change(database, "UPDATE songs SET lyrics = 'of the future' WHERE id = 7")
    change(database, "DELETE FROM songs WHERE id = 9; INSERT INTO songs VALUES (0, 'New', 'Ann', 'la', '2020-01-01')")
    run_all(make_pipeline(database, provider, tmp_path, updated_at_column="at"))
    assert set(provider.texts()) - {"probe"} == {
        "Song 8 by Ann\nedited",
        "Song 7 by Ann\nof the future",
        "New by Ann\nla",
    }
    assert read_song_ids(database) == [each for each in range(N_SONGS + 1) if each != 9]
