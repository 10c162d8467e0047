"""A snapshot is read as it was written, and merged by song_id."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from polars.testing import assert_frame_equal

from songvec_assets.errors import StoreError
from songvec_assets.songs import snapshots
from songvec_assets.songs.content import FILE_SCHEMA, Footer, digest_songs
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Snapshots, get_max_cached_song_id, load_songs_from_parquet
from songvec_assets.songs.text import TextSpec, render_texts
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.songs.test_content import ROWS, Row, rows, rows_of, table

ALL = SongIdRange(0, 2**31)


@pytest.fixture
def stored(tmp_path: Path) -> Snapshots:
    """No snapshots yet."""
    return Snapshots(LocalStorage(tmp_path))


def write(stored: Snapshots, songs: list[Row]) -> Snapshots:
    """Write a snapshot."""
    stored.write(ALL, table(songs), Footer.of(table(songs), TextSpec().identity))
    return stored


class TestFile:
    def test_it_holds_what_was_written(self, stored: Snapshots) -> None:
        write(stored, ROWS)
        assert stored.read(ALL).rows() == ROWS
        assert stored.footer(ALL).n_songs == len(ROWS)
        assert load_songs_from_parquet(stored.storage.root / f"{ALL.key}.parquet").rows() == ROWS
        assert get_max_cached_song_id(stored.storage.root) == ROWS[-1][0]

    def test_its_footer_comes_back(self, stored: Snapshots) -> None:
        footer = Footer.of(table(ROWS), "settings")
        stored.write(ALL, table(ROWS), footer)
        assert stored.footer(ALL) == footer

    def test_without_a_file_or_with_a_damaged_one_there_is_no_footer(self, stored: Snapshots) -> None:
        assert stored.footer(ALL) == Footer()
        stored.storage.put(f"{ALL.key}.parquet", b"no Parquet")
        assert stored.footer(ALL) == Footer()


class TestMerge:
    def test_rows_read_back_have_the_same(self, stored: Snapshots) -> None:
        write(stored, ROWS)
        merged = stored.merge(ALL, table([]), pl.Series([row[0] for row in ROWS], dtype=pl.Int32))
        assert digest_songs(merged) == stored.footer(ALL).digest == digest_songs(table(ROWS))

    @settings(max_examples=40, deadline=None)  # each writes a file
    @given(rows, rows)
    def test_newer_rows_take_the_place_of_those_of_their_song_id(
        self, tmp_path_factory: pytest.TempPathFactory, before: list[Row], newer: list[Row]
    ) -> None:
        stored = write(Snapshots(LocalStorage(tmp_path_factory.mktemp("merged"))), before)
        newer = sorted(
            {row[0]: row for row in [*newer, *((row[0], "N", "N", None, None) for row in before[::2])]}.values()
        )
        expected = {row[0]: row for row in [*before, *newer]}
        kept = sorted(expected)[::3] + sorted(expected)[1::3]
        merged = stored.merge(ALL, table(newer), pl.Series(kept, dtype=pl.Int32))
        assert rows_of(merged) == [expected[song_id] for song_id in sorted(kept)]
        assert merged.schema.equals(FILE_SCHEMA, check_metadata=True)

    @settings(max_examples=20, deadline=None)  # each writes a file
    @given(rows)
    def test_what_is_merged_has_the_identity_of_its_rows(
        self, tmp_path_factory: pytest.TempPathFactory, songs: list[Row]
    ) -> None:
        """Rows that went leave no bytes behind."""
        stored = write(Snapshots(LocalStorage(tmp_path_factory.mktemp("merged"))), songs)
        kept = songs[::2]
        merged = stored.merge(ALL, table([]), pl.Series([row[0] for row in kept], dtype=pl.Int32))
        assert digest_songs(merged) == digest_songs(table(kept))


class TestSome:
    def test_only_the_songs_asked_for_are_loaded_in_their_order(
        self, stored: Snapshots, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(stored, ROWS)
        monkeypatch.setattr(snapshots, "BATCH_ROWS", 2)
        some = stored.read(ALL, song_ids=[2**31 - 1, 3, 99])
        assert some.rows() == [ROWS[1], ROWS[4]]
        assert some.schema == stored.read(ALL).schema
        assert stored.read(ALL, ["song_id", "name"], song_ids=[1]).rows() == [(1, "Füße")]
        assert stored.read(ALL, song_ids=[]).rows() == []
        assert stored.read(SongIdRange(0, 100), song_ids=[1]).schema == some.schema


def test_hashes_are_those_of_the_texts(stored: Snapshots) -> None:
    write(stored, ROWS)
    hashes = stored.read_text_hashes(ALL, TextSpec())
    accepted = stored.read(ALL).filter(pl.col("rejected").is_null())
    assert_frame_equal(hashes, render_texts(accepted, TextSpec()).drop("text"))
    short = TextSpec(max_chars=5)
    assert_frame_equal(stored.read_text_hashes(ALL, short), render_texts(accepted, short).drop("text"))


def test_a_text_that_does_not_fit_its_hash_is_named(stored: Snapshots) -> None:
    write(stored, ROWS)
    assert stored.render(ALL, TextSpec(), pl.Series([1, 8]))["text"].to_list() == ["Füße by Ann\nla la", "🎵 by Cy"]
    other = table([(1, "Füße", "Ann", "other words", None), *ROWS[1:]]).set_column(
        6, "text_hash", table(ROWS)["text_hash"]
    )
    stored.write(ALL, other, Footer.of(other, TextSpec().identity))
    assert stored.render(ALL, TextSpec(), pl.Series([8]))["text"].to_list() == ["🎵 by Cy"]
    with pytest.raises(StoreError, match="texts do not have the hashes that the file keeps"):
        stored.render(ALL, TextSpec(), pl.Series([1, 8]))
