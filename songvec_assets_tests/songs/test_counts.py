"""Songs are counted by range; ids that no range can hold are counted by reason, or refused."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from songvec_assets.errors import SettingsError, SourceError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.counts import (
    IdSums,
    RangeCount,
    check_ids,
    count_ranges,
    count_unreachable_ids,
    find_ends,
)
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange, Tiling
from songvec_assets.songs.source import SongsSource, find_source
from songvec_assets_tests.songs.test_source import TILING, run


def ids(*song_ids: int) -> IdSums:
    """What a range that holds these songs says of them."""
    return IdSums.of(pl.Series(song_ids))


def test_songs_are_counted_by_range_up_to_the_highest_integer(database: Database) -> None:
    run(
        database,
        "CREATE TABLE songs (id bigint PRIMARY KEY, name text, artist text, lyrics text)",
        f"INSERT INTO songs SELECT unnest(ARRAY[-1, 0, 99, 100, 999, 1000, 50000, {MAX_SONG_ID}, {2**31}])",
    )
    assert count_ranges(find_source(database, PostgresSettings()), TILING) == {
        SongIdRange(0, 100): RangeCount(ids(0, 99)),
        SongIdRange(100, 200): RangeCount(ids(100)),
        SongIdRange(900, 1000): RangeCount(ids(999)),
        TILING.tail: RangeCount(ids(1000, 50_000, MAX_SONG_ID)),
    }


def test_ids_that_no_range_holds_are_counted_by_reason(database: Database) -> None:
    run(
        database,
        "CREATE TABLE songs (id bigint, name text, artist text, lyrics text)",
        f"INSERT INTO songs SELECT unnest(ARRAY[NULL, NULL, NULL, -1, {-(2**40)}, 0, {MAX_SONG_ID}, {2**31}])",
    )
    source = find_source(database, PostgresSettings(song_id_column="id"))
    assert count_unreachable_ids(source) == Counter(
        {"the id is NULL": 3, "the id is negative": 2, "the id is above 2147483647, the highest INTEGER": 1}
    )


def test_where_every_id_has_a_range_nothing_is_counted(database: Database) -> None:
    run(
        database,
        "CREATE TABLE songs (id smallint PRIMARY KEY, name text, artist text, lyrics text)",
        "INSERT INTO songs VALUES (1, 'Sea', 'Ann', NULL)",
    )
    assert count_unreachable_ids(find_source(database, PostgresSettings())) == Counter()


def test_the_newest_time_of_a_range_comes_with_its_count(database: Database) -> None:
    run(
        database,
        "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text, at timestamp)",
        """
        INSERT INTO songs (id, at)
        VALUES (1, '2026-01-02'), (2, '2026-01-03'), (3, NULL), (100, NULL)
        """,
    )
    counts = count_ranges(find_source(database, PostgresSettings(updated_at_column="at")), TILING)
    assert counts == {
        SongIdRange(0, 100): RangeCount(ids(1, 2, 3), "2026-01-03 00:00:00"),
        SongIdRange(100, 200): RangeCount(ids(100), None),
    }


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that count the songs by range, as they are sent."""
    statements: list[str] = []
    fetch = SongsSource.fetch

    def note_and_fetch(source: SongsSource, statement: str) -> list[tuple[Any, ...]]:
        if "GROUP BY number" in statement:
            statements.append(statement)
        return fetch(source, statement)

    monkeypatch.setattr(SongsSource, "fetch", note_and_fetch)
    return statements


def make_source(database: Database, *song_ids: int) -> SongsSource:
    """Songs with these ids."""
    run(
        database,
        "CREATE TABLE songs (id bigint PRIMARY KEY, name text, artist text, lyrics text)",
        f"INSERT INTO songs SELECT unnest(ARRAY[{', '.join(map(str, song_ids))}]::bigint[])",
    )
    return find_source(database, PostgresSettings())


def test_the_ends_are_the_ranges_of_the_lowest_and_the_highest_id_that_a_range_holds(database: Database) -> None:
    source = make_source(database, -7, 150, 3, 730, 2**31)
    assert find_ends(source, TILING) == [SongIdRange(0, 100), SongIdRange(700, 800)]
    run(database, "INSERT INTO songs VALUES (1000)")
    assert find_ends(source, TILING)[1] == TILING.tail
    run(database, "DELETE FROM songs WHERE id BETWEEN 0 AND 2000")
    assert find_ends(source, TILING) == []


@pytest.mark.parametrize(
    ("song_ids", "n_counts"),
    [
        ([-1, 100, 999, 1000, MAX_SONG_ID], 0),
        (range(900, 1100), 0),
        ([100, 2**31], 1),
    ],
)
def test_ids_that_ranges_hold_are_not_counted_for_the_check(
    database: Database, counted: list[str], song_ids: list[int], n_counts: int
) -> None:
    check_ids(make_source(database, *song_ids), Tiling(100, 1_000, start=100))
    assert len(counted) == n_counts


@pytest.mark.parametrize(
    ("song_ids", "error", "words"),
    [
        ([100, 7, 50], SettingsError, "2 songs of songs have an id below SONGVEC_SONG_ID_START, which is 100; .* is 7"),
        (range(900, 1101), SettingsError, "open tail from song_id 1000 on holds 101 songs, more than the 100"),
        ([100, 2**31, 2**40], SourceError, "2 songs of songs have an id above 2147483647.* number the songs"),
    ],
)
def test_ids_that_no_range_can_hold_are_refused(
    database: Database, song_ids: list[int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_ids(make_source(database, *song_ids), Tiling(100, 1_000, start=100))


def test_a_command_counts_the_songs_once_at_most(
    pipeline: Pipeline, songs: Callable[..., None], counted: list[str]
) -> None:
    songs((1, "Sea", "Ann", "waves"), (150, "Hill", "Ben", None))
    numbers = []
    for ask in (
        pipeline.find_span,
        pipeline.dry_run,
        pipeline.run,
        pipeline.find_boilerplate,
        pipeline.dry_run,
        pipeline.status,
        pipeline.run,
    ):
        ask()
        numbers.append(len(counted))
        counted.clear()
    assert numbers == [0, 1, 1, 0, 1, 1, 1]
