"""A snapshot's identity is that of its rows; it is compared and merged by song_id."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import (
    SNAPSHOT_SCHEMA,
    Changes,
    Footer,
    compare_snapshot,
    count_songs,
    digest_songs,
    load_songs_from_parquet,
    merge_songs,
    read_footer,
    snapshot_digest,
    snapshot_path,
    write_snapshot,
)

Row = tuple[int, str | None, str | None, str | None, str | None]
ROWS: list[Row] = [
    (1, "Füße", "Ann", "la la", None), (3, None, "Ben", None, "the song has no name"), (7, "", "", "", None),
    (8, "🎵", "Cy", None, None), (2**31 - 1, "Sea", None, "x" * 3000, "the song has no artist"),
]  # fmt: skip

texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
rows = st.dictionaries(st.integers(0, 2**31 - 1), st.tuples(texts, texts, texts, texts), max_size=12).map(
    lambda songs: [(song_id, *songs[song_id]) for song_id in sorted(songs)]
)


def table(songs: list[Row]) -> pa.Table:
    """Rows as an export makes them."""
    columns = list(zip(*songs, strict=True)) if songs else [[]] * 5
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SNAPSHOT_SCHEMA, strict=True)],
                    schema=SNAPSHOT_SCHEMA)  # fmt: skip


def rows_of(songs: pa.Table) -> list[Row]:
    """The rows again."""
    return [tuple(row.values()) for row in songs.to_pylist()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a snapshot goes."""
    return snapshot_path(tmp_path, SongIdRange(0, 2**31))


def write(path: Path, songs: list[Row]) -> Path:
    """Write a snapshot and give its path."""
    write_snapshot(path, table(songs), Footer(digest_songs(table(songs)), "source"))
    return path


class TestDigest:
    def test_it_stays_what_it_was_or_every_store_would_be_written_anew(self) -> None:
        assert digest_songs(table(ROWS)) == "50cccbb2e78f5b392695b7dcbaa357c6"
        assert digest_songs(table([])) == "e5189a9599e3f86205ea23ef06e28b2d"

    @given(rows, st.lists(st.integers(0, 12), max_size=4))
    def test_chunks_make_no_difference(self, songs: list[Row], cuts: list[int]) -> None:
        whole = table(songs)
        ends = sorted(min(cut, len(songs)) for cut in cuts)
        pieces = [whole.slice(start, stop - start) for start, stop in zip([0, *ends], [*ends, len(songs)], strict=True)]
        assert digest_songs(pa.concat_tables(pieces)) == digest_songs(whole)

    @given(rows, rows)
    def test_other_rows_have_another(self, some: list[Row], others: list[Row]) -> None:
        assert (digest_songs(table(some)) == digest_songs(table(others))) == (some == others)

    def test_a_text_that_moves_to_the_next_song_or_column_changes_it(self) -> None:
        digests = {
            digest_songs(table(songs))
            for songs in (
                [(1, "ab", "", None, None), (2, "c", "", None, None)],
                [(1, "a", "", None, None), (2, "bc", "", None, None)],
                [(1, "ab", "c", None, None), (2, "", "", None, None)],
                [(1, "ab", None, None, None), (2, "c", "", None, None)],
                [(1, "ab", "", None, None), (2, "c", None, None, None)],
            )
        }
        assert len(digests) == 5

    def test_rows_read_back_have_the_same(self, path: Path) -> None:
        write(path, ROWS)
        assert digest_songs(merge_songs(path, table([]))) == snapshot_digest(path) == digest_songs(table(ROWS))


class TestFile:
    def test_it_holds_what_was_written(self, path: Path) -> None:
        write(path, ROWS)
        assert load_songs_from_parquet(path).rows() == ROWS
        assert count_songs(path.parent, SongIdRange(0, 2**31)) == len(ROWS)

    @pytest.mark.parametrize("newest", [None, "2026-01-01 12:00:00+00"])
    def test_its_footer_comes_back(self, path: Path, newest: str | None) -> None:
        write_snapshot(path, table(ROWS), Footer("digest", '"public"."söngs" "id"', newest))
        assert read_footer(path) == Footer("digest", '"public"."söngs" "id"', newest)

    def test_without_a_file_or_with_a_damaged_one_there_is_no_footer(self, path: Path) -> None:
        assert (read_footer(path), snapshot_digest(path)) == (None, None)
        path.write_bytes(b"no Parquet")
        assert (read_footer(path), snapshot_digest(path)) == (None, None)


class TestCompare:
    @settings(max_examples=40, deadline=None)  # each writes a file
    @given(rows, rows)
    def test_it_counts_as_one_would_by_hand(
        self, tmp_path_factory: pytest.TempPathFactory, before: list[Row], after: list[Row]
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("songvec_assets.songs.snapshots._COMPARED_ROWS", 3)
            # hypothesis draws few song_ids twice: every second song stays
            after = sorted({**{row[0]: row for row in before[::2]}, **{row[0]: row for row in after}}.values())
            path = write(tmp_path_factory.mktemp("compared") / "file", before)
            old, new = ({row[0]: row for row in songs} for songs in (before, after))
            assert compare_snapshot(path, table(after)) == Changes(
                n_new=len(new.keys() - old.keys()),
                n_changed=sum(old[song_id] != new[song_id] for song_id in old.keys() & new.keys()),
                n_gone=len(old.keys() - new.keys()),
            )

    @pytest.mark.parametrize("column", [1, 2, 3, 4])
    @pytest.mark.parametrize("value", [None, "", "other"])
    def test_a_change_in_any_column_counts(self, path: Path, column: int, value: str | None) -> None:
        songs: list[Row] = [(song_id, "a", "b", "c", "d") for song_id in range(10_000)]
        write(path, songs)
        changed = list(songs[9_000])
        changed[column] = value
        songs[9_000] = tuple(changed)
        assert compare_snapshot(path, table(songs)) == Changes(0, 1, 0)

    def test_without_a_file_all_songs_are_new(self, path: Path) -> None:
        assert compare_snapshot(path, table(ROWS)) == Changes(len(ROWS), 0, 0)


class TestMerge:
    @settings(max_examples=40, deadline=None)  # each writes a file
    @given(rows, rows)
    def test_newer_rows_take_the_place_of_those_of_their_song_id(
        self, tmp_path_factory: pytest.TempPathFactory, before: list[Row], newer: list[Row]
    ) -> None:
        path = write(tmp_path_factory.mktemp("merged") / "file", before)
        newer = sorted(
            {row[0]: row for row in [*newer, *((row[0], "N", "N", None, None) for row in before[::2])]}.values()
        )
        merged = merge_songs(path, table(newer))
        expected = {row[0]: row for row in [*before, *newer]}
        assert rows_of(merged) == [expected[song_id] for song_id in sorted(expected)]
        assert merged.schema.equals(SNAPSHOT_SCHEMA, check_metadata=True)
