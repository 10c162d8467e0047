"""Snapshots equal the table, and only those are written whose songs changed."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from songvec_assets.cache.fill import FillReport
from songvec_assets.errors import SourceError, StoreError, describe
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, RunContext
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs import content, readers
from songvec_assets.songs import export as export_module
from songvec_assets.songs.content import FILE_SCHEMA, SNAPSHOT_SCHEMA
from songvec_assets.songs.export import ExportOptions, cache_songs_to_parquet
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange, Tiling
from songvec_assets.songs.readers import read_songs_from_postgres
from songvec_assets.songs.reports import ExportReport, IncompleteExportError
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import find_source
from songvec_assets.songs.text import TextSpec, render_texts
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.administration import execute
from songvec_assets_tests.provider import Provider

TILING = Tiling(width=100, stop=1_000)
FIRST, SECOND = SongIdRange(0, 100), SongIdRange(100, 200)
DATED = PostgresSettings(updated_at_column="at")

SCRIPTS = [
    "Füße über Äcker: ſtraße",
    "Ночь на дворе — ёлка",
    "Ελληνικά: άνθρωπος",
    "日本語の歌「海」",
    "한국어 노래, 바다",
    "ภาษาไทย เพลงทะเล",
    "أغنية البحر",
    "שיר הים",
    "हिन्दी गीत, समुद्र",
    "🎵 emoji 👩‍🚀 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "e\u0301 is not \u00e9 here",
    "zero\u200bwidth, line\u2028separator, tab\t, new\nline, nul-like \u2400",
    "''quotes\"\" \\n {braces} %s $1 ; --",
    "\U00010348 \U0001d11e beyond the BMP",
]


def run(
    database: Database,
    folder: Path,
    names: PostgresSettings | None = None,
    mode: export_module.ExportMode = "all",
    spec: TextSpec | None = None,
    **options: Any,
) -> ExportReport:
    """One export of the table."""
    source = find_source(database, names or PostgresSettings(), spec)
    return cache_songs_to_parquet(source, stored(folder), TILING, ExportOptions(mode, **options))


def stored(folder: Path) -> Snapshots:
    """The snapshots of a folder."""
    return Snapshots(LocalStorage(folder))


def path_of(folder: Path, song_range: SongIdRange) -> Path:
    """The file of a range."""
    return folder / f"{song_range.key}.parquet"


def has_hashes(folder: Path, spec: TextSpec, song_range: SongIdRange = FIRST) -> bool:
    """Whether a snapshot keeps the hashes of its texts, as these settings make them."""
    footer = stored(folder).footer(song_range)
    return footer is not None and footer.text == spec.identity


def change(database: Database, statement: str) -> None:
    """Change the source as another program would."""
    execute(database.adbc_uri, statement)


def read(folder: Path) -> list[tuple]:
    """All snapshots' rows: song_id, name, artist, lyrics."""
    tables = [stored(folder).read(each) for each in stored(folder).ranges()]
    return [row for table in tables for row in table.drop("rejected").rows()]


def names_of(folder: Path) -> dict[int, str]:
    """Each song's name."""
    return {song_id: name for song_id, name, *_ in read(folder)}


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Each file's inode and time of change."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def counts_of(report: ExportReport) -> dict[str, tuple[int, int, int, int, bool]]:
    """What each range's report says: songs, new, changed, deleted, and whether its file was written."""
    return {each.range.key: (each.footer.n_songs, *each.changes, each.written) for each in report.ranges}


@pytest.fixture
def dated(database: Database) -> Database:
    """A source with updated_at: songs 1 to 5 and 101, all of them changed on the first of January."""
    change(
        database,
        """
        CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text, at timestamp);
        INSERT INTO songs SELECT n, 'Song ' || n, 'Ann', NULL, '2026-01-01 12:00'
        FROM unnest(ARRAY[1, 2, 3, 4, 5, 101]) n
        """,
    )
    return database


class TestContent:
    def test_snapshots_equal_the_table_whatever_the_script(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        rows = [(6 * place, text, f"by {text}", text * 50) for place, text in enumerate(SCRIPTS, start=1)]
        rows += [(98, "No lyrics", "Ann", None), (99, "Empty lyrics", "Ann", "")]
        songs(*rows)
        report = run(database, tmp_path)
        assert read(tmp_path) == rows
        assert report.rejected == Counter()
        assert report.changes.n_new == report.n_songs == len(rows)
        assert pq.read_schema(path_of(tmp_path, FIRST)).equals(FILE_SCHEMA)

    def test_each_song_is_in_the_file_of_its_range(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        song_ids = [0, 99, 100, 999, 1000, MAX_SONG_ID]
        songs(*((song_id, "Sea", "Ann", None) for song_id in song_ids))
        run(database, tmp_path)
        found = {each.key: stored(tmp_path).read(each)["song_id"].to_list()
                 for each in stored(tmp_path).ranges()}  # fmt: skip
        assert found == {
            "000000000-000000100": [0, 99],
            "000000100-000000200": [100],
            "000000900-000001000": [999],
            "000001000-max": [1000, MAX_SONG_ID],
        }
        assert stored(tmp_path).find_max_song_id() == MAX_SONG_ID

    def test_songs_of_a_bigint_table_are_exported_and_those_above_integer_counted(
        self, database: Database, tmp_path: Path
    ) -> None:
        change(
            database,
            f"""
            CREATE TABLE songs (id bigint PRIMARY KEY, name text, artist text, lyrics text);
            INSERT INTO songs SELECT n, 'Sea', 'Ann', NULL FROM unnest(ARRAY[-5, 5, {MAX_SONG_ID}, {2**40}]) n
            """,
        )
        report = run(database, tmp_path)
        assert [song_id for song_id, *_ in read(tmp_path)] == [5, MAX_SONG_ID]
        assert report.unreachable == Counter(
            {"the id is negative": 1, "the id is above 2147483647, the highest INTEGER": 1}
        )

    def test_a_range_without_a_file_is_a_range_without_songs(self, tmp_path: Path) -> None:
        empty = stored(tmp_path).read(FIRST)
        assert (empty.height, empty.columns) == (0, SNAPSHOT_SCHEMA.names)
        assert stored(tmp_path).read(FIRST, ["song_id"]).columns == ["song_id"]
        assert stored(tmp_path).find_max_song_id() is None

    def test_an_empty_table_gives_no_file(self, database: Database, songs: Callable[..., None], tmp_path: Path) -> None:
        songs()
        assert run(database, tmp_path).ranges == []
        assert list(tmp_path.iterdir()) == []

    def test_progress_counts_the_songs_up_to_their_number(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs(*((song_id, "Sea", "Ann", None) for song_id in (1, 2, 150, 5000)))
        reported: list[Progress] = []
        source = find_source(database, PostgresSettings())
        cache_songs_to_parquet(source, stored(tmp_path), TILING, run=RunContext(reported.append))
        assert [(each.done, each.total) for each in reported] == [(2, 4), (3, 4), (4, 4)]


class TestUnchanged:
    def test_a_second_export_touches_no_file(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs(*((song_id, f"Song {song_id}", "Ann", SCRIPTS[song_id % 14]) for song_id in range(50, 250)))
        run(database, tmp_path)
        before = files_of(tmp_path)
        assert len(before) == 3
        change(database, "UPDATE songs SET name = name")
        change(database, "ALTER TABLE songs ADD COLUMN plays integer DEFAULT 7")
        report = run(database, tmp_path)
        assert files_of(tmp_path) == before
        assert [each[1:] for each in counts_of(report).values()] == [(0, 0, 0, False)] * 3

    def test_the_size_of_the_batches_it_comes_in_makes_no_difference(
        self, database: Database, songs: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        songs(*((song_id, f"Song {song_id}", "Ann" if song_id % 3 else "", None) for song_id in range(100)))
        change(database, "UPDATE songs SET lyrics = repeat('la ', 50 * id) WHERE id % 2 = 0")
        run(database, tmp_path)
        before = files_of(tmp_path)
        monkeypatch.setattr(readers, "_BATCH_BYTES", 1)
        run(database, tmp_path)
        assert files_of(tmp_path) == before

    @pytest.mark.parametrize(
        ("statement", "expected"),
        [
            ("UPDATE songs SET name = 'New' WHERE id = 150", (100, 0, 1, 0, True)),
            ("UPDATE songs SET artist = 'New' WHERE id = 150", (100, 0, 1, 0, True)),
            ("UPDATE songs SET lyrics = '' WHERE id = 150", (100, 0, 1, 0, True)),
            ("UPDATE songs SET name = NULL WHERE id = 150", (100, 0, 1, 0, True)),
            ("DELETE FROM songs WHERE id = 150", (99, 0, 0, 1, True)),
            ("UPDATE songs SET id = 150 WHERE id = 250", (100, 0, 0, 1, True)),
        ],
    )
    def test_one_changed_song_rewrites_the_file_of_its_range_alone(
        self, database: Database, songs: Callable[..., None], tmp_path: Path, statement: str, expected: tuple
    ) -> None:
        songs(*((song_id, "Song", "Ann", None) for song_id in range(300)))
        if "250" in statement:  # a song moves: its old range loses it
            change(database, "DELETE FROM songs WHERE id = 150")
        run(database, tmp_path)
        before = files_of(tmp_path)
        change(database, statement)
        report = run(database, tmp_path)
        after = files_of(tmp_path)
        touched = {name for name in before if after[name] != before[name]}
        if "250" in statement:
            assert touched == {"000000100-000000200.parquet", "000000200-000000300.parquet"}
            assert counts_of(report)["000000100-000000200"] == (100, 1, 0, 0, True)
            assert counts_of(report)["000000200-000000300"] == (99, 0, 0, 1, True)
        else:
            assert touched == {"000000100-000000200.parquet"}
            assert counts_of(report)["000000100-000000200"] == expected
        assert read(tmp_path) == execute(database.adbc_uri, "SELECT * FROM songs ORDER BY id")

    def test_a_range_whose_songs_were_all_deleted_loses_its_file(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", None), (101, "Hill", "Ben", None), (102, "Moon", "Cy", None))
        run(database, tmp_path)
        change(database, "DELETE FROM songs WHERE id > 100")
        report = run(database, tmp_path)
        assert counts_of(report)[SECOND.key] == (0, 0, 0, 2, True)
        assert [path.name for path in tmp_path.iterdir()] == [path_of(tmp_path, FIRST).name]

    @pytest.mark.parametrize("mode", ["all", "append"])
    def test_a_raised_stop_gives_the_tails_songs_files_of_their_own(
        self, database: Database, songs: Callable[..., None], tmp_path: Path, mode: export_module.ExportMode
    ) -> None:
        songs((1, "Sea", "Ann", None), (1001, "Hill", "Ben", None), (5000, "Moon", "Cy", None))
        run(database, tmp_path)
        source = find_source(database, PostgresSettings())
        cache_songs_to_parquet(source, stored(tmp_path), Tiling(width=100, stop=2_000), ExportOptions(mode))
        assert [each.key for each in stored(tmp_path).ranges()] == [
            "000000000-000000100", "000001000-000001100", "000002000-max"
        ]  # fmt: skip
        assert names_of(tmp_path) == {1: "Sea", 1001: "Hill", 5000: "Moon"}


class TestBadInput:
    def test_songs_without_name_or_artist_are_rejected_with_the_reason(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs(
            (1, None, "Ann", "la"), (2, "", "Ann", "la"), (3, " \t\n\u00a0\u3000", "Ann", "la"),
            (4, "Sea", None, "la"), (5, "Sea", "  ", "la"), (6, None, None, None),
            (7, "Sea", "Ann", None), (8, " Sea ", ".", ""), (101, "", "Ann", None),
        )  # fmt: skip
        report = run(database, tmp_path)
        snapshot = stored(tmp_path).read(FIRST)
        no_name, no_artist = "the song has no name", "the song has no artist"
        assert dict(snapshot.select("song_id", "rejected").rows()) == {
            1: no_name, 2: no_name, 3: no_name, 4: no_artist, 5: no_artist, 6: no_name, 7: None, 8: None
        }  # fmt: skip
        assert report.rejected == Counter({no_name: 5, no_artist: 2})
        assert [each.footer.rejected.total() for each in report.ranges] == [6, 1]
        again = run(database, tmp_path)
        assert (again.rejected, again.rejected.total()) == (report.rejected, 7)

    def test_an_id_that_is_there_twice_is_refused_by_name_and_the_other_ranges_are_done(
        self, database: Database, tmp_path: Path
    ) -> None:
        change(
            database,
            """
            CREATE TABLE songs (id integer, name text, artist text, lyrics text);
            INSERT INTO songs SELECT n, 'Sea', 'Ann', NULL FROM unnest(ARRAY[1, 2, 150, 151, 151, 250]) n
            """,
        )
        with pytest.raises(
            IncompleteExportError, match="column 'id' of songs must be unique, 151 is there more than once"
        ) as caught:
            run(database, tmp_path, PostgresSettings(song_id_column="id"))
        assert "SONGVEC_SONG_ID_COLUMN" in str(caught.value)
        assert isinstance(caught.value.__cause__, SourceError)
        assert [song_id for song_id, *_ in read(tmp_path)] == [1, 2, 250]
        assert caught.value.reasons == {describe(caught.value.__cause__): [SECOND.key]}
        assert caught.value.is_partial

    def test_a_range_that_cannot_be_read_ends_in_the_servers_words_and_leaves_its_file(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", None), (150, "Hill", "Ben", None), (250, "Moon", "Cy", None))
        change(database, "CREATE VIEW fragile AS SELECT id, name, artist, (1 / (id - 151))::text AS lyrics FROM songs")
        names = PostgresSettings(songs_table="fragile", song_id_column="id")
        run(database, tmp_path, names)
        before = files_of(tmp_path)
        songs((1, "New", "Ann", None), (151, "Moon", "Cy", None), (250, "New", "Cy", None))
        with pytest.raises(IncompleteExportError, match="division by zero") as caught:
            run(database, tmp_path, names)
        after = files_of(tmp_path)
        assert [name for name in after if after[name] == before[name]] == [path_of(tmp_path, SECOND).name]
        assert names_of(tmp_path) == {1: "New", 150: "Hill", 250: "New"}
        assert caught.value.report.changes.n_changed == 2

    @pytest.mark.parametrize("damage", [slice(None, -1), slice(None, 1000), slice(0, 0)])
    def test_a_damaged_snapshot_is_written_again(
        self, database: Database, songs: Callable[..., None], tmp_path: Path, damage: slice
    ) -> None:
        songs((1, "Sea", "Ann", None), (150, "Hill", "Ben", None), (160, "Moon", "Cy", None))
        run(database, tmp_path)
        path = path_of(tmp_path, SECOND)
        whole = path.read_bytes()
        path.write_bytes(whole[damage])
        report = run(database, tmp_path)
        assert counts_of(report) == {FIRST.key: (1, 0, 0, 0, False), SECOND.key: (2, 2, 0, 0, True)}
        assert path.read_bytes() == whole

    def test_a_snapshot_whose_rows_are_damaged_is_written_again(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea" * 50, "Ann", "la " * 500))
        run(database, tmp_path)
        path = path_of(tmp_path, FIRST)
        path.write_bytes(b"PAR1" + bytes(200) + path.read_bytes()[204:])
        songs((2, "Hill", "Ben", None))
        assert counts_of(run(database, tmp_path)) == {FIRST.key: (2, 2, 0, 0, True)}
        assert sorted(names_of(tmp_path)) == [1, 2]


class TestAppend:
    def test_only_songs_above_the_highest_one_are_read(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", None), (101, "Hill", "Ben", None), (110, "Moon", "Cy", None))
        assert run(database, tmp_path, mode="append").changes.n_new == 3
        first = files_of(tmp_path)["000000000-000000100.parquet"]
        songs((1, "changed", "Ann", None), (105, "late", "Ben", None), (110, "changed", "Cy", None))
        songs((111, "New", "Di", None), (250, "Newer", "Ed", None))
        change(database, "DELETE FROM songs WHERE id = 101")
        report = run(database, tmp_path, mode="append")
        assert names_of(tmp_path) == {1: "Sea", 101: "Hill", 110: "Moon", 111: "New", 250: "Newer"}
        assert counts_of(report) == {SECOND.key: (3, 1, 0, 0, True), "000000200-000000300": (1, 1, 0, 0, True)}
        assert files_of(tmp_path)["000000000-000000100.parquet"] == first
        run(database, tmp_path)
        assert read(tmp_path) == execute(database.adbc_uri, "SELECT * FROM songs ORDER BY id")

    def test_nothing_above_touches_no_file(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", None), (199, "Hill", "Ben", None))
        run(database, tmp_path)
        before = files_of(tmp_path)
        assert run(database, tmp_path, mode="append").ranges == []
        songs((50, "late", "Ann", None))
        assert run(database, tmp_path, mode="append").changes.n_new == 0
        assert files_of(tmp_path) == before


class TestUpdatedAt:
    @pytest.mark.parametrize("kind", ["timestamp", "timestamptz", "date"])
    def test_only_rows_newer_than_the_last_export_are_read(self, database: Database, tmp_path: Path, kind: str) -> None:
        change(
            database,
            f"""
            CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text, at {kind});
            INSERT INTO songs SELECT n, 'Song', 'Ann', NULL, '2026-01-01' FROM generate_series(1, 5) n;
            INSERT INTO songs VALUES (6, 'Song', 'Ann', NULL, '2026-01-05')
            """,
        )
        run(database, tmp_path, DATED)
        change(database, "UPDATE songs SET name = 'unseen' WHERE id = 2")
        change(database, "UPDATE songs SET name = 'seen', at = '2026-02-01' WHERE id = 4")
        change(database, "INSERT INTO songs VALUES (7, 'new', 'Ann', NULL, '2026-02-02')")
        report = run(database, tmp_path, DATED)
        # song 2 changed without its time: had the range been read as a whole, the change would show
        assert names_of(tmp_path) == {1: "Song", 2: "Song", 3: "Song", 4: "seen", 5: "Song", 6: "Song", 7: "new"}
        assert counts_of(report) == {FIRST.key: (7, 1, 1, 0, True)}

    def test_a_range_with_nothing_newer_is_not_written(self, dated: Database, tmp_path: Path) -> None:
        change(dated, "UPDATE songs SET at = '2025-12-01' WHERE id IN (1, 2)")
        run(dated, tmp_path, DATED)
        before = files_of(tmp_path)
        change(dated, "UPDATE songs SET name = 'unseen' WHERE id IN (1, 2)")
        report = run(dated, tmp_path, DATED)
        assert files_of(tmp_path) == before
        assert counts_of(report)[FIRST.key] == (5, 0, 0, 0, False)
        assert names_of(tmp_path)[1] == "Song 1"

    def test_rows_that_an_export_looked_at_are_not_read_again_though_no_text_of_theirs_changed(
        self, dated: Database, tmp_path: Path
    ) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET at = '2026-03-01' WHERE id < 100")
        before = read(tmp_path)
        run(dated, tmp_path, DATED)
        assert read(tmp_path) == before
        # newer than the last change of a text, and older than what the export before looked at
        change(dated, "UPDATE songs SET name = 'unseen', at = '2026-02-01' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "Song 2"

    def test_a_change_that_was_committed_late_is_found_with_the_next_newer_one(
        self, dated: Database, tmp_path: Path
    ) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'late', at = '2026-01-01 11:30' WHERE id = 2")
        change(dated, "UPDATE songs SET name = 'newer', at = '2026-01-01 13:00' WHERE id = 3")
        run(dated, tmp_path, DATED)
        assert (names_of(tmp_path)[2], names_of(tmp_path)[3]) == ("late", "newer")

    def test_a_change_that_was_committed_late_is_found_though_none_is_newer(
        self, dated: Database, tmp_path: Path
    ) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'late', at = '2026-01-01 11:59:50' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "late"

    def test_a_second_change_on_the_same_day_is_found_where_the_column_is_a_date(
        self, dated: Database, tmp_path: Path
    ) -> None:
        change(dated, "ALTER TABLE songs ALTER COLUMN at TYPE date")
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'in the evening', at = '2026-01-01' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "in the evening"

    def test_rows_without_a_time_are_read_every_time_something_is_newer(self, dated: Database, tmp_path: Path) -> None:
        change(dated, "UPDATE songs SET at = NULL WHERE id = 2")
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'untimed' WHERE id = 2")
        change(dated, "UPDATE songs SET name = 'newer', at = '2026-01-02' WHERE id = 3")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "untimed"

    def test_a_range_where_no_row_has_a_time_is_read_as_a_whole(self, dated: Database, tmp_path: Path) -> None:
        change(dated, "UPDATE songs SET at = NULL")
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'untimed' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "untimed"

    @pytest.mark.parametrize(
        "statement",
        [
            "DELETE FROM songs WHERE id = 2",
            "DELETE FROM songs WHERE id = 2; INSERT INTO songs VALUES (9, 'Song 9', 'Ann', NULL, '2026-01-02')",
            "DELETE FROM songs WHERE id IN (2, 3); INSERT INTO songs VALUES (9, 'Song 9', 'Ann', NULL, '2026-01-02')",
            "INSERT INTO songs VALUES (9, 'Song 9', 'Ann', NULL, '2020-01-01')",
            "DELETE FROM songs WHERE id = 2; INSERT INTO songs VALUES (9, 'Song 9', 'Ann', NULL, '2020-01-01')",
            "UPDATE songs SET at = '2020-01-01', id = CASE id WHEN 1 THEN 0 WHEN 5 THEN 6 ELSE id END",
            "UPDATE songs SET id = 9, at = '2026-01-02' WHERE id = 2",
            "UPDATE songs SET id = 109 WHERE id = 2",
            "DELETE FROM songs WHERE id < 100",
        ],
    )
    def test_what_went_and_came_is_found_by_its_ids(self, dated: Database, tmp_path: Path, statement: str) -> None:
        run(dated, tmp_path, DATED)
        change(dated, statement)
        run(dated, tmp_path, DATED)
        assert read(tmp_path) == execute(dated.adbc_uri, "SELECT id, name, artist, lyrics FROM songs ORDER BY id")

    def test_its_files_equal_those_of_a_full_export(self, dated: Database, tmp_path: Path) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = NULL, lyrics = 'ö', at = '2026-01-02' WHERE id = 3")
        report = run(dated, tmp_path, DATED)
        assert report.rejected == Counter({"the song has no name": 1})
        before = files_of(tmp_path)
        full = run(dated, tmp_path)
        assert files_of(tmp_path) == before
        assert full.rejected == run(dated, tmp_path, DATED).rejected == report.rejected

    def test_a_full_export_reads_what_the_times_hide(self, dated: Database, tmp_path: Path) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'hidden' WHERE id = 2")
        run(dated, tmp_path)
        assert names_of(tmp_path)[2] == "hidden"

    def test_naming_the_column_later_begins_with_a_full_read(self, dated: Database, tmp_path: Path) -> None:
        run(dated, tmp_path)
        change(dated, "UPDATE songs SET name = 'hidden' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "hidden"

    def test_an_append_hides_no_change_from_the_next_export(self, dated: Database, tmp_path: Path) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'changed', at = '2026-01-02' WHERE id = 101")
        change(dated, "INSERT INTO songs VALUES (109, 'Song 109', 'Ann', NULL, '2026-01-03')")
        run(dated, tmp_path, DATED, mode="append")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[101] == "changed"

    @pytest.mark.parametrize("kind", ["timestamp", "timestamptz", "date"])
    def test_a_time_in_the_future_hides_nothing(self, dated: Database, tmp_path: Path, kind: str) -> None:
        change(dated, f"UPDATE songs SET at = '2099-01-01' WHERE id = 1; ALTER TABLE songs ALTER COLUMN at TYPE {kind}")
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'edited', at = now() WHERE id = 2")
        change(dated, "UPDATE songs SET name = 'of the future' WHERE id = 1")
        run(dated, tmp_path, DATED)
        assert (names_of(tmp_path)[2], names_of(tmp_path)[1]) == ("edited", "of the future")
        change(dated, "UPDATE songs SET name = 'unseen', at = '2026-01-01' WHERE id = 3")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[3] == "Song 3", "all songs were read for the sake of one"

    @pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "UTC", "Pacific/Pago_Pago"])
    def test_it_hides_nothing_whatever_the_time_zone_of_the_server(
        self, dated: Database, tmp_path: Path, zone: str
    ) -> None:
        """A time without a zone, five hours ahead of UTC; the server's own may be 14 hours ahead."""
        change(dated, f"ALTER DATABASE {sa.make_url(dated.url).database} SET timezone = '{zone}'")
        change(dated, "UPDATE songs SET at = now() AT TIME ZONE 'UTC' + INTERVAL '5 hours' WHERE id = 1")
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'edited', at = now() AT TIME ZONE 'UTC' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "edited"

    def test_a_clock_that_is_late_by_an_hour_and_a_transaction_of_an_hour_hide_nothing(
        self, dated: Database, tmp_path: Path
    ) -> None:
        run(dated, tmp_path, DATED)
        change(dated, "UPDATE songs SET name = 'late', at = '2026-01-01 10:01' WHERE id = 2")
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "late"

    def test_a_snapshot_that_was_replaced_by_an_older_one_hides_no_change(
        self, dated: Database, tmp_path: Path
    ) -> None:
        run(dated, tmp_path, DATED)
        path = path_of(tmp_path, FIRST)
        older = path.read_bytes()
        change(dated, "UPDATE songs SET name = 'changed', at = '2026-02-01' WHERE id = 2")
        change(dated, "UPDATE songs SET at = '2026-03-01' WHERE id = 3")
        run(dated, tmp_path, DATED)
        path.write_bytes(older)
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "changed"

    @pytest.mark.parametrize("at", ["at", "'2025-06-01'", "NULL"])
    def test_what_the_times_hide_is_found_after_a_day(
        self, dated: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
    ) -> None:
        """A change without its time, and one by a clock that went back."""
        change(dated, "UPDATE songs SET at = '2025-12-01' WHERE id = 2")
        run(dated, tmp_path, DATED)
        change(dated, f"UPDATE songs SET name = 'hidden', at = {at} WHERE id = 2")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 23 * 3600)
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == ("hidden" if at == "NULL" else "Song 2")
        monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
        run(dated, tmp_path, DATED)
        assert names_of(tmp_path)[2] == "hidden"
        before = files_of(tmp_path)
        run(dated, tmp_path, DATED)
        assert files_of(tmp_path) == before

    def test_a_full_compare_by_setting_reads_all_songs_every_time(self, dated: Database, tmp_path: Path) -> None:
        for name in ("first", "second"):
            change(dated, f"UPDATE songs SET name = '{name}' WHERE id = 2")
            run(dated, tmp_path, DATED, full_compare_hours=0)
            assert names_of(tmp_path)[2] == name

    def test_a_full_compare_that_failed_in_one_range_is_owed_still(
        self, dated: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(dated, tmp_path, DATED)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
        change(
            dated, "ALTER TABLE songs DROP CONSTRAINT songs_pkey; INSERT INTO songs SELECT * FROM songs WHERE id = 101"
        )
        names = PostgresSettings(song_id_column="id", updated_at_column="at")
        with pytest.raises(IncompleteExportError):
            run(dated, tmp_path, names)
        change(dated, "DELETE FROM songs WHERE id = 101; UPDATE songs SET name = 'hidden' WHERE id = 2")
        run(dated, tmp_path, names)
        assert names_of(tmp_path)[2] == "hidden"


class TestHashes:
    @pytest.mark.parametrize("names", [PostgresSettings(), DATED])
    def test_only_songs_whose_content_changed_are_rendered(
        self, dated: Database, tmp_path: Path, rendered: list[int], names: PostgresSettings
    ) -> None:
        run(dated, tmp_path, names)
        assert sorted(rendered) == [1, 2, 3, 4, 5, 101]
        rendered.clear()
        change(dated, "UPDATE songs SET name = 'new', at = '2026-01-02' WHERE id = 3")
        change(dated, "UPDATE songs SET at = '2026-01-02' WHERE id = 4")
        change(dated, "DELETE FROM songs WHERE id = 5")
        run(dated, tmp_path, names)
        assert rendered == [3]
        assert_hashed(tmp_path, TextSpec())

    @pytest.mark.parametrize("names", [PostgresSettings(), DATED])
    def test_the_server_sends_the_texts_of_changed_songs_only(
        self, dated: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: PostgresSettings
    ) -> None:
        run(dated, tmp_path, names)
        sent: list[int] = []

        def read_and_count(*arguments: Any, **named: Any) -> pa.Table:
            songs = read_songs_from_postgres(*arguments, **named)
            sent.extend(songs["song_id"].to_pylist())
            return songs

        monkeypatch.setattr(export_module, "read_songs_from_postgres", read_and_count)
        change(dated, "UPDATE songs SET at = '2026-01-02'")
        run(dated, tmp_path, names)
        assert sent == []
        change(dated, "UPDATE songs SET lyrics = 'new' WHERE id = 4")
        change(dated, "DELETE FROM songs WHERE id = 1")
        run(dated, tmp_path, names)
        assert sent == [4]
        assert read(tmp_path) == execute(dated.adbc_uri, "SELECT id, name, artist, lyrics FROM songs ORDER BY id")

    def test_rejected_songs_have_none(self, database: Database, songs: Callable[..., None], tmp_path: Path) -> None:
        songs((1, None, "Ann", "la"), (2, "Sea", "Ann", "waves"), (101, "", "Ann", None))
        run(database, tmp_path)
        assert_hashed(tmp_path, TextSpec())
        hashes = stored(tmp_path).read_text_hashes(FIRST, TextSpec())
        assert hashes["song_id"].to_list() == [2]

    def test_other_settings_have_none_until_the_next_export_which_changes_no_identity(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", "waves and salt"), (2, "Hill", "Ben", None))
        run(database, tmp_path)
        digest = stored(tmp_path).digest_all()
        short = TextSpec(max_chars=9)
        assert not has_hashes(tmp_path, short)
        report = run(database, tmp_path, spec=short)
        assert_hashed(tmp_path, short)
        assert (stored(tmp_path).digest_all(), report.changes.n_changed) == (digest, 0)
        before = files_of(tmp_path)
        run(database, tmp_path, spec=short)
        assert files_of(tmp_path) == before

    def test_other_settings_reject_other_songs(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", None, "waves"), (2, None, None, "stones"))
        assert run(database, tmp_path).rejected.total() == 2
        report = run(database, tmp_path, spec=TextSpec("{name}: {lyrics}"))
        assert report.rejected == Counter({"the song has no name": 1})
        assert_hashed(tmp_path, TextSpec("{name}: {lyrics}"))

    @pytest.mark.parametrize(("columns", "first"), [(5, (2, 2, 0, 0, True)), (8, (2, 1, 1, 1, True))])
    def test_a_snapshot_of_an_earlier_version_is_exported_again_and_keeps_its_identity(
        self, database: Database, songs: Callable[..., None], tmp_path: Path, columns: int, first: tuple
    ) -> None:
        songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", None), (101, "Moon", "Cy", None))
        run(database, tmp_path)
        digest = stored(tmp_path).digest_all()
        for each in stored(tmp_path).ranges():
            make_old(path_of(tmp_path, each), columns)
        with pytest.raises(
            StoreError, match=r"000000000-000000100\.parquet was written by an earlier version: export again"
        ):
            stored(tmp_path).read_text_hashes(FIRST, TextSpec())
        assert stored(tmp_path).digest_all() == digest
        songs((2, "Hill", "Ben", "stones"), (3, "New", "Di", None))
        change(database, "DELETE FROM songs WHERE id = 1")
        report = run(database, tmp_path)
        assert counts_of(report) == {FIRST.key: first, SECOND.key: (1, 0, 0, 0, True)}
        assert_hashed(tmp_path, TextSpec())

    def test_an_append_to_a_snapshot_of_an_earlier_version_exports_its_range_again(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", None))
        run(database, tmp_path)
        make_old(path_of(tmp_path, FIRST))
        songs((1, "changed", "Ann", None), (3, "New", "Di", None))
        run(database, tmp_path, mode="append")
        assert names_of(tmp_path) == {1: "changed", 2: "Hill", 3: "New"}
        assert_hashed(tmp_path, TextSpec())

    @pytest.mark.parametrize("columns", [5, 8])
    def test_a_store_of_an_earlier_version_pays_for_no_text_again(
        self, pipeline: Pipeline, songs: Callable[..., None], provider: Provider, columns: int
    ) -> None:
        songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", None), (3, None, "Cy", None), (101, "Moon", "Cy", None))
        requests = []
        for _ in range(2):
            pipeline.export()
            reports: list[FillReport] = []
            pipeline.filler().fill_ranges(list(pipeline.tiling), reports.append)
            assert [each.error for each in reports] == [None, None]
            requests.append(provider.ledger()["requests"])
            for each in pipeline.store.songs.ranges():
                make_old(path_of(pipeline.store.songs.storage.root, each), columns)
        assert requests[0] == requests[1] > 0

    def test_texts_that_are_exchanged_or_move_to_another_column_are_changes(
        self, database: Database, songs: Callable[..., None], tmp_path: Path
    ) -> None:
        songs((1, "Sea", "Ann", None), (2, "Hill", "Ann", None), (3, "Moon", "Cy", None), (4, "Sun", "Ed", ""))
        run(database, tmp_path)
        songs((1, "Hill", "Ann", None), (2, "Sea", "Ann", None), (3, "Cy", "Moon", None), (4, "Sun", "Ed", None))
        assert run(database, tmp_path).changes.n_changed == 4
        assert read(tmp_path) == execute(database.adbc_uri, "SELECT * FROM songs ORDER BY id")


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The songs whose texts are rendered, as they are."""
    song_ids: list[int] = []

    def count_and_render(songs: pl.DataFrame, spec: TextSpec) -> pl.DataFrame:
        song_ids.extend(songs["song_id"])
        return render_texts(songs, spec)

    monkeypatch.setattr(content, "render_texts", count_and_render)
    return song_ids


def assert_hashed(folder: Path, spec: TextSpec) -> None:
    """Every snapshot has the hashes of the texts of its songs."""
    for each in stored(folder).ranges():
        assert has_hashes(folder, spec, each)
        accepted = stored(folder).read(each).filter(pl.col("rejected").is_null())
        hashes = stored(folder).read_text_hashes(each, spec)
        assert_frame_equal(hashes, render_texts(accepted, spec).drop("text"))


def make_old(path: Path, n_columns: int = 8) -> None:
    """Write a snapshot as earlier versions did: 5 columns without hashes, or all 8."""
    songs = pq.read_table(path)
    names = {"rejected": "set_aside", b"songvec.text2": b"songvec.text"}
    metadata = {names.get(key, key): value for key, value in songs.schema.metadata.items()}
    if n_columns == 5:
        metadata = {key: value for key, value in metadata.items() if key == b"songvec.digest2"}
    songs = songs.rename_columns([names.get(name, name) for name in songs.column_names])
    pq.write_table(songs.select(range(n_columns)).replace_schema_metadata(metadata), path)
