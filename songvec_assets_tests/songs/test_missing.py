"""How many songs may be missing, and that nothing is read of ranges whose ids are those of their snapshot."""

from pathlib import Path

import polars as pl
import pytest

from songvec_assets.errors import BulkDeletionError
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import SILENT
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.counts import count_ranges
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.missing import MissingSongs
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import find_source
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.songs.test_source import TILING, run

FIRST, SECOND, THIRD = (SongIdRange(start, start + 100) for start in (0, 100, 200))


def read_all(song_range: SongIdRange) -> pl.Series:
    """Every song_id of a range."""
    return pl.Series(range(song_range.start, song_range.stop), dtype=pl.Int32)


@pytest.mark.parametrize(
    ("known", "missing", "is_empty", "is_bulk"),
    [
        ((190, 0), (19, 0), False, False),
        ((190, 0), (20, 0), False, True),
        ((1_000, 0), (100, 0), False, False),
        ((1_000, 0), (101, 0), False, True),
        ((200, 10_000), (100, 0), False, False),
        ((200, 10_000), (101, 0), False, True),
        ((198, 10_000), (99, 0), False, False),
        ((5, 0), (5, 0), False, False),
        ((5, 0), (5, 0), True, True),
        ((0, 0), (0, 0), True, False),
    ],
)
def test_a_share_of_all_songs_or_of_a_range_stops_an_export_and_a_few_songs_do_not(
    known: tuple[int, int], missing: tuple[int, int], is_empty: bool, is_bulk: bool
) -> None:
    ranges = (FIRST, SECOND)
    missing = MissingSongs(
        dict(zip(ranges, known, strict=True)), read_all, 0.1, 0.5, missing=dict(zip(ranges, missing, strict=True))
    )
    missing.is_empty = is_empty
    assert missing.is_bulk == is_bulk


def test_ids_are_read_of_ranges_that_differ_from_their_snapshot_only(database: Database, tmp_path: Path) -> None:
    run(
        database,
        "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)",
        "INSERT INTO songs SELECT n, 'Sea', 'Ann', NULL FROM generate_series(0, 299) n",
    )
    source, snapshots, read = find_source(database, PostgresSettings()), Snapshots(LocalStorage(tmp_path)), []
    cache_songs_to_parquet(source, snapshots, TILING)
    run(database, "DELETE FROM songs WHERE id IN (7, 8); UPDATE songs SET id = 300 WHERE id = 250")

    def read_and_note(song_range: SongIdRange) -> pl.Series:
        read.append(song_range)
        return read_all(song_range)

    missing = MissingSongs(dict.fromkeys((FIRST, SECOND, THIRD), 100), read_and_note, 0.1, 0.5)
    missing.find(source, snapshots, count_ranges(source, TILING), SILENT)
    assert (read, missing.missing) == ([FIRST, THIRD], {FIRST: 2, THIRD: 1})
    assert missing.describe() == (
        "3 of 300 songs that are loaded or cached (000000000-000000100: 2 of 100, 000000200-000000300: 1 of 100)"
    )
    missing.check(source)
    run(database, "DELETE FROM songs WHERE id > 250")
    missing.find(source, snapshots, count_ranges(source, TILING), SILENT)
    with pytest.raises(BulkDeletionError, match=r"52 of 300 songs .* are no longer in songs: nothing was changed"):
        missing.check(source)
