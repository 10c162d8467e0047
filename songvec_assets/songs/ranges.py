"""Half-open ranges of song_ids: the unit of partitions, files, transactions, resume and cost. Pure.

A range is written `000050000-000100000`; the open tail above the last stop is `016000000-max`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from songvec_assets.errors import SettingsError

MAX_SONG_ID = 2**31 - 1
"""The highest value of Postgres' INTEGER, the type of `song_embeddings.song_id`."""

_TAIL = "max"
_MAX_STOP = 999_999_999


@dataclass(frozen=True, order=True)
class SongIdRange:
    """The song_ids from `start` to `stop`, `stop` not included; the tail's stop is MAX_SONG_ID + 1."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= MAX_SONG_ID + 1:
            raise ValueError(f"expected 0 <= start < stop <= {MAX_SONG_ID + 1}, got [{self.start}, {self.stop})")

    def __contains__(self, song_id: int) -> bool:
        return self.start <= song_id < self.stop

    @property
    def key(self) -> str:
        """The zero-padded key, equal to its Dagster partition key; keys sort as the ranges do."""
        return f"{self.start:09d}-{_TAIL if self.is_tail else format(self.stop, '09d')}"

    @property
    def is_tail(self) -> bool:
        """Whether the range is open above."""
        return self.stop == MAX_SONG_ID + 1

    @classmethod
    def from_key(cls, key: str) -> "SongIdRange":
        """The inverse of `key`.

        Raises:
            ValueError: the key is not of the form `000050000-000100000` or `016000000-max`.
        """
        start, dash, stop = key.partition("-")
        digits = (start, "0" if stop == _TAIL else stop)
        if not dash or len(key) > 21 or not all(part.isdecimal() and part.isascii() for part in digits):
            raise ValueError(f"expected a range key like 000050000-000100000, got {key!r}")
        song_range = cls(int(start), MAX_SONG_ID + 1 if stop == _TAIL else int(stop))
        if song_range.key != key:
            raise ValueError(f"expected the range key {song_range.key}, got {key!r}")
        return song_range


@dataclass(frozen=True)
class Tiling:
    """How all song_ids are cut: ranges of `width` from 0 up to `stop`, then one open tail.

    Attributes:
        width: song_ids a range.
        stop: where the tail begins; a multiple of `width`.
    """

    width: int
    stop: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.stop < 1:
            raise SettingsError(f"expected a range width and a stop of 1 or more, got {self.width} and {self.stop}")
        if self.stop > _MAX_STOP:
            raise SettingsError(
                f"SONGVEC_SONG_ID_STOP: keys have nine digits, so at most {_MAX_STOP:,}, got {self.stop:,}"
            )
        if self.stop % self.width:
            raise SettingsError(
                f"SONGVEC_SONG_ID_STOP must be a multiple of SONGVEC_RANGE_SIZE: {self.stop} is not one of {self.width}"
            )

    def __iter__(self) -> Iterator[SongIdRange]:
        for start in range(0, self.stop, self.width):
            yield SongIdRange(start, start + self.width)
        yield self.tail

    def __len__(self) -> int:
        return self.stop // self.width + 1

    @property
    def tail(self) -> SongIdRange:
        """The open range above the last stop."""
        return SongIdRange(self.stop, MAX_SONG_ID + 1)

    def check_tail(self, song_range: SongIdRange, n_songs: int) -> None:
        """Refuse a tail with more songs than one range may hold.

        Raises:
            SettingsError: names the setting to raise.
        """
        if song_range == self.tail and n_songs > self.width:
            raise SettingsError(
                f"the open tail from song_id {self.stop} on holds {n_songs:,} songs, more than the {self.width:,} of "
                "one range: raise SONGVEC_SONG_ID_STOP above the highest song_id and start the same command again; "
                "what the tail's cache holds is kept"
            )

    def range_of(self, song_id: int) -> SongIdRange:
        """The range that holds a song_id from 0 to MAX_SONG_ID."""
        if song_id >= self.stop:
            return self.tail
        start = song_id - song_id % self.width
        return SongIdRange(start, start + self.width)
