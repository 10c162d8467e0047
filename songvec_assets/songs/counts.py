"""The songs of the source by range: how many there are, which ids they have, and ids that no range can hold.

When to add here: another number that the source's indexes give. Keep out: texts.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl

from songvec_assets.errors import SettingsError, SourceError
from songvec_assets.songs import songs_table
from songvec_assets.songs.advice import describe_numbering
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange, Tiling
from songvec_assets.songs.source import PRESENT, SongsSource

_PRIME = 2**31 - 1


class IdSums(NamedTuple):
    """A checksum of a set of song_ids: equal for equal sets, and almost never for others."""

    n_rows: int = 0
    sum_of_ids: int = 0
    sum_of_squares: int = 0

    @classmethod
    def of(cls, song_ids: pl.Series) -> "IdSums":
        """The sums of these distinct ids."""
        ids = song_ids.to_numpy().astype(np.int64)
        return cls(len(ids), int(ids.sum()), int((ids * ids % _PRIME).sum()))

    @staticmethod
    def columns(song_id: str) -> str:
        """The SQL expressions that compute the sums, of a quoted column."""
        return (
            f"count(*), sum({song_id}::bigint)::bigint, sum({song_id}::bigint * {song_id}::bigint % {_PRIME})::bigint"
        )


@dataclass(frozen=True)
class RangeCount:
    """What the source holds in a range.

    Attributes:
        newest: the latest updated_at that is not in the future by the server's clock, as text; None if there is no such
            column or row.
    """

    ids: IdSums = field(default_factory=IdSums)
    newest: str | None = None

    @property
    def n_songs(self) -> int:
        """Rows."""
        return self.ids.n_rows


def count_ranges(source: SongsSource, tiling: Tiling) -> dict[SongIdRange, RangeCount]:
    """Count the source's songs by range, without empty ranges. An index-only scan of the ids, if possible."""
    newest = "NULL"
    if source.updated_at:
        present = PRESENT[str(source.updated_at_type)]
        newest = f"(max({source.updated_at}) FILTER (WHERE {source.updated_at} <= {present}))::text"
    rows = source.fetch(
        f"SELECT least({source.song_id}, {tiling.stop}) / {tiling.width} AS number, {newest}, "
        f"{IdSums.columns(source.song_id)} "
        f"FROM {source.relation} WHERE {source.song_id} BETWEEN {tiling.start} AND {MAX_SONG_ID} GROUP BY number",
    )
    return {tiling.range_of(number * tiling.width): RangeCount(IdSums(*sums), newest) for number, newest, *sums in rows}


def get_numbers(counts: Mapping[SongIdRange, RangeCount]) -> dict[SongIdRange, int]:
    """Number of songs by range."""
    return {song_range: counted.n_songs for song_range, counted in counts.items()}


def find_ends(source: SongsSource, tiling: Tiling) -> list[SongIdRange]:
    """The ranges of the lowest and of the highest song_id, from the id's index; empty if no range holds songs."""
    ends = f"SELECT min({source.song_id}), max({source.song_id}) FROM {source.relation}"
    [(lowest, highest)] = source.fetch(f"{ends} WHERE {source.song_id} BETWEEN {tiling.start} AND {MAX_SONG_ID}")
    return [] if lowest is None else [tiling.range_of(lowest), tiling.range_of(highest)]


def read_song_ids(source: SongsSource, song_range: SongIdRange) -> pl.Series:
    """The ids of a range's songs, in order."""
    return pl.Series([song_id for (song_id,) in source.fetch(source.select("song_id", song_range))], dtype=pl.Int32)


def check_ids(source: SongsSource, tiling: Tiling) -> None:
    """Refuse ids that no range can hold. Reads the id's index outside the ranges, and counts songs only if it must.

    Raises:
        SettingsError: songs have ids below the first range, or the open tail holds more songs than a range may.
        SourceError: more songs have ids above INTEGER than within it; the message has the statements that number them.
    """
    song_id, start, relation = source.song_id, tiling.start, source.relation
    in_tail = f"SELECT FROM {relation} WHERE {song_id} BETWEEN {tiling.stop} AND {MAX_SONG_ID} LIMIT {tiling.width + 1}"
    [(n_below, lowest, n_beyond, n_in_tail)] = source.fetch(
        f"SELECT count(*) FILTER (WHERE {song_id} < {start}), min({song_id}), "
        f"count(*) FILTER (WHERE {song_id} > {MAX_SONG_ID}), (SELECT count(*) FROM ({in_tail}) AS tail) "
        # negative ids are rejected one by one
        f"FROM {relation} WHERE {song_id} > {MAX_SONG_ID} OR {song_id} >= 0 AND {song_id} < {start}"
    )
    counts = count_ranges(source, tiling) if n_beyond or n_in_tail > tiling.width else {}
    tiling.check_tail(tiling.tail, counts.get(tiling.tail, RangeCount()).n_songs)
    if n_below:
        raise SettingsError(
            f"{n_below:,} songs of {source.table} have an id below SONGVEC_SONG_ID_START, which is {start}; "
            f"the lowest is {lowest}: set it to {lowest // tiling.width * tiling.width} or less",
            "settings.song-ids",
        )
    if n_beyond > sum(get_numbers(counts).values()):
        with source.database.get_connection() as connection:
            table = songs_table.find_table(connection, source.table)
            cure = f": {describe_numbering(connection, table, source.song_id_column)}" if table else ""
        raise SourceError(
            f"{n_beyond:,} songs of {source.table} have an id above {MAX_SONG_ID}, the highest INTEGER, which is "
            f"the type of song_embeddings.song_id{cure}",
            "source.id-column",
        )


def count_unreachable_ids(source: SongsSource) -> Counter[str]:
    """Number of songs with an id that no range can hold, by reason."""
    reasons = {
        f"the id is above {MAX_SONG_ID}, the highest INTEGER": f"{source.song_id} > {MAX_SONG_ID}",
        "the id is negative": f"{source.song_id} < 0",
        "the id is NULL": f"{source.song_id} IS NULL",
    }
    # one subquery per reason, so that each can use the index
    numbers = (f"(SELECT count(*) FROM {source.relation} WHERE {each})" for each in reasons.values())
    [row] = source.fetch(f"SELECT {', '.join(numbers)}")
    return +Counter(dict(zip(reasons, row, strict=True)))
