"""A snapshot's identity is that of its rows, and they are compared by song_id."""

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from songvec_assets.songs.content import (
    SNAPSHOT_SCHEMA,
    Changes,
    Footer,
    add_text_hashes,
    count_changes,
    digest_songs,
)
from songvec_assets.songs.text import TextSpec

PROFILE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
Row = tuple[int, str | None, str | None, str | None, str | None]
ROWS: list[Row] = [
    (1, "Füße", "Ann", "la la", None), (3, None, "Ben", None, "the song has no name"), (7, "", "", "", None),
    (8, "🎵", "Cy", None, None), (2**31 - 1, "Sea", None, "x" * 3000, "the song has no artist"),
]  # fmt: skip

texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
rows = st.dictionaries(st.integers(0, 2**31 - 1), st.tuples(texts, texts, texts, texts), max_size=12).map(
    lambda songs: [(song_id, *songs[song_id]) for song_id in sorted(songs)]
)


def columns_of(songs: list[Row]) -> pa.Table:
    """Rows without hashes."""
    columns = list(zip(*songs, strict=True)) if songs else [[]] * 5
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SNAPSHOT_SCHEMA, strict=True)],
                    schema=SNAPSHOT_SCHEMA)  # fmt: skip


def table(songs: list[Row]) -> pa.Table:
    """Rows as an export makes them."""
    hashes = pa.array([hash(row) for row in songs], pa.int64())
    return add_text_hashes(columns_of(songs).append_column("source_hash", hashes), TextSpec())


def hashed(songs: list[Row]) -> pl.DataFrame:
    """Rows as they are compared."""
    return pl.DataFrame(table(songs).select(["song_id", "source_hash"]))


def rows_of(songs: pa.Table) -> list[Row]:
    """The rows again."""
    return [tuple(row.values()) for row in songs.select(SNAPSHOT_SCHEMA.names).to_pylist()]


class TestDigest:
    def test_it_stays_what_it_was_or_every_store_would_be_written_again(self) -> None:
        assert digest_songs(columns_of(ROWS)) == "50cccbb2e78f5b392695b7dcbaa357c6"
        assert digest_songs(columns_of([])) == "e5189a9599e3f86205ea23ef06e28b2d"

    @PROFILE
    @given(rows, st.lists(st.integers(0, 12), max_size=4))
    def test_chunks_make_no_difference(self, songs: list[Row], cuts: list[int]) -> None:
        whole = columns_of(songs)
        ends = sorted(min(cut, len(songs)) for cut in cuts)
        pieces = [whole.slice(start, stop - start) for start, stop in zip([0, *ends], [*ends, len(songs)], strict=True)]
        assert digest_songs(pa.concat_tables(pieces)) == digest_songs(whole)

    @PROFILE
    @given(rows, rows)
    def test_other_rows_have_another(self, some: list[Row], others: list[Row]) -> None:
        assert (digest_songs(columns_of(some)) == digest_songs(columns_of(others))) == (some == others)

    def test_a_text_that_moves_to_the_next_song_or_column_changes_it(self) -> None:
        digests = {
            digest_songs(columns_of(songs))
            for songs in (
                [(1, "ab", "", None, None), (2, "c", "", None, None)],
                [(1, "a", "", None, None), (2, "bc", "", None, None)],
                [(1, "ab", "c", None, None), (2, "", "", None, None)],
                [(1, "ab", None, None, None), (2, "c", "", None, None)],
                [(1, "ab", "", None, None), (2, "c", None, None, None)],
            )
        }
        assert len(digests) == 5


class TestCompare:
    @PROFILE
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


def test_a_footer_comes_back_from_metadata_as_earlier_versions_wrote_it_too() -> None:
    footer = Footer.of(table(ROWS), "settings")
    assert (footer.n_songs, footer.rejected["the song has no name"]) == (5, 1)
    encoded = {key: value.encode() for key, value in footer.encode().items()}
    assert Footer.decode(encoded, 5) == footer
    earlier = encoded | {b"songvec.counts": b'[{"the song has no name": 2}, [[0, 4], [23, 1]]]'}
    assert Footer.decode(earlier, 5).rejected == {"the song has no name": 2}
    assert Footer.decode({}, 0) == Footer()
