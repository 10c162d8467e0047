"""A snapshot's identity is that of its rows; it is compared and merged by song_id."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from songvec_assets.errors import StoreError
from songvec_assets.songs import snapshots
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import (
    FILE_SCHEMA,
    SIZE_CLASS_BYTES,
    SNAPSHOT_SCHEMA,
    Changes,
    Footer,
    Snapshots,
    add_text_hashes,
    count_changes,
    digest_songs,
    get_max_cached_song_id,
    load_songs_from_parquet,
)
from songvec_assets.songs.text import TextSpec, render_texts
from songvec_assets.storage import Storage

Row = tuple[int, str | None, str | None, str | None, str | None]
ALL = SongIdRange(0, 2**31)
ROWS: list[Row] = [
    (1, "Füße", "Ann", "la la", None), (3, None, "Ben", None, "the song has no name"), (7, "", "", "", None),
    (8, "🎵", "Cy", None, None), (2**31 - 1, "Sea", None, "x" * 3000, "the song has no artist"),
]  # fmt: skip

texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
rows = st.dictionaries(st.integers(0, 2**31 - 1), st.tuples(texts, texts, texts, texts), max_size=12).map(
    lambda songs: [(song_id, *songs[song_id]) for song_id in sorted(songs)]
)


def content(songs: list[Row]) -> pa.Table:
    """Rows without hashes."""
    columns = list(zip(*songs, strict=True)) if songs else [[]] * 5
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SNAPSHOT_SCHEMA, strict=True)],
                    schema=SNAPSHOT_SCHEMA)  # fmt: skip


def table(songs: list[Row]) -> pa.Table:
    """Rows as an export makes them."""
    hashes = pa.array([hash(row) for row in songs], pa.int64())
    return add_text_hashes(content(songs).append_column("source_hash", hashes), TextSpec())


def hashed(songs: list[Row]) -> pl.DataFrame:
    """Rows as they are compared."""
    return pl.DataFrame(table(songs).select(["song_id", "source_hash"]))


def rows_of(songs: pa.Table) -> list[Row]:
    """The rows again."""
    return [tuple(row.values()) for row in songs.select(SNAPSHOT_SCHEMA.names).to_pylist()]


@pytest.fixture
def stored(tmp_path: Path) -> Snapshots:
    """No snapshots yet."""
    return Snapshots(Storage(tmp_path))


def write(stored: Snapshots, songs: list[Row]) -> Snapshots:
    """Write a snapshot."""
    stored.write(ALL, table(songs), Footer.of(table(songs), TextSpec().identity))
    return stored


class TestDigest:
    def test_it_stays_what_it_was_or_every_store_would_be_written_again(self) -> None:
        assert digest_songs(content(ROWS)) == "50cccbb2e78f5b392695b7dcbaa357c6"
        assert digest_songs(content([])) == "e5189a9599e3f86205ea23ef06e28b2d"

    @given(rows, st.lists(st.integers(0, 12), max_size=4))
    def test_chunks_make_no_difference(self, songs: list[Row], cuts: list[int]) -> None:
        whole = content(songs)
        ends = sorted(min(cut, len(songs)) for cut in cuts)
        pieces = [whole.slice(start, stop - start) for start, stop in zip([0, *ends], [*ends, len(songs)], strict=True)]
        assert digest_songs(pa.concat_tables(pieces)) == digest_songs(whole)

    @given(rows, rows)
    def test_other_rows_have_another(self, some: list[Row], others: list[Row]) -> None:
        assert (digest_songs(content(some)) == digest_songs(content(others))) == (some == others)

    def test_a_text_that_moves_to_the_next_song_or_column_changes_it(self) -> None:
        digests = {
            digest_songs(content(songs))
            for songs in (
                [(1, "ab", "", None, None), (2, "c", "", None, None)],
                [(1, "a", "", None, None), (2, "bc", "", None, None)],
                [(1, "ab", "c", None, None), (2, "", "", None, None)],
                [(1, "ab", None, None, None), (2, "c", "", None, None)],
                [(1, "ab", "", None, None), (2, "c", None, None, None)],
            )
        }
        assert len(digests) == 5

    def test_rows_read_back_have_the_same(self, stored: Snapshots) -> None:
        write(stored, ROWS)
        merged = stored.merge(ALL, table([]), pl.Series([row[0] for row in ROWS], dtype=pl.Int32))
        assert digest_songs(merged) == stored.footer(ALL).digest == digest_songs(table(ROWS))


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
        assert (footer.n_songs, footer.rejected["the song has no name"]) == (5, 1)
        assert footer.text_sizes == {0: 4, 3003 // SIZE_CLASS_BYTES: 1}

    def test_without_a_file_or_with_a_damaged_one_there_is_no_footer(self, stored: Snapshots) -> None:
        assert stored.footer(ALL) == Footer()
        stored.storage.put(f"{ALL.key}.parquet", b"no Parquet")
        assert stored.footer(ALL) == Footer()


class TestCompare:
    @given(rows, rows)
    def test_it_counts_as_one_would_by_hand(self, before: list[Row], after: list[Row]) -> None:
        # hypothesis draws few song_ids twice: every second song stays
        after = sorted({**{row[0]: row for row in before[::2]}, **{row[0]: row for row in after}}.values())
        old, new = ({row[0]: row for row in songs} for songs in (before, after))
        assert count_changes(hashed(before), hashed(after)) == Changes(
            n_new=len(new.keys() - old.keys()),
            n_changed=sum(old[song_id] != new[song_id] for song_id in old.keys() & new.keys()),
            n_deleted=len(old.keys() - new.keys()),
        )

    @pytest.mark.parametrize("column", [1, 2, 3, 4])
    @pytest.mark.parametrize("value", [None, "", "other"])
    def test_a_change_in_any_column_counts(self, column: int, value: str | None) -> None:
        songs: list[Row] = [(song_id, "a", "b", "c", "d") for song_id in range(100)]
        before = hashed(songs)
        changed = list(songs[90])
        changed[column] = value
        songs[90] = tuple(changed)
        assert count_changes(before, hashed(songs)) == Changes(0, 1, 0)


class TestMerge:
    @settings(max_examples=40, deadline=None)  # each writes a file
    @given(rows, rows)
    def test_newer_rows_take_the_place_of_those_of_their_song_id(
        self, tmp_path_factory: pytest.TempPathFactory, before: list[Row], newer: list[Row]
    ) -> None:
        stored = write(Snapshots(Storage(tmp_path_factory.mktemp("merged"))), before)
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
        stored = write(Snapshots(Storage(tmp_path_factory.mktemp("merged"))), songs)
        kept = songs[::2]
        merged = stored.merge(ALL, table([]), pl.Series([row[0] for row in kept], dtype=pl.Int32))
        assert digest_songs(merged) == digest_songs(table(kept))


class TestSome:
    def test_only_the_songs_asked_for_are_loaded_in_their_order(
        self, stored: Snapshots, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(stored, ROWS)
        monkeypatch.setattr(snapshots, "_BATCH_ROWS", 2)
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
