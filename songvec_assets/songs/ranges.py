"""Half-open ranges of song_ids: the unit of partitions, files, transactions, resume and cost. Pure.

A range's key is `000050000-000100000`; that of the open tail above the last stop is `016000000-max`. Ids from
1,000,000,000 on have ten digits: sort ranges, not keys.
When to add here: another check of ranges or of their tiling. Keep out: what a range holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from songvec_assets.errors import SettingsError

MAX_SONG_ID = 2**31 - 1
"""The highest value of Postgres' INTEGER, the type of `song_embeddings.song_id`."""

_TAIL = "max"
_MAX_RANGES = 5_000
"""With more partitions, Dagster's pages and sensors take seconds."""


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

    def overlaps(self, other: "SongIdRange") -> bool:
        """Whether a song_id is in both."""
        return self.start < other.stop and other.start < self.stop

    @property
    def key(self) -> str:
        """The key, zero-padded to nine digits, equal to its Dagster partition key."""
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


def name_some(names: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


@dataclass(frozen=True)
class Tiling:
    """How song_ids are divided: ranges of `width` from `start` up to `stop`, then one open tail.

    Attributes:
        width: song_ids per range.
        stop: first song_id of the tail, a multiple of `width`; MAX_SONG_ID + 1 is replaced by the last multiple below.
        start: first song_id of the first range, a multiple of `width`.
    """

    width: int
    stop: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.stop < 1:
            raise SettingsError(
                f"expected a range width and a stop of 1 or more, got {self.width} and {self.stop}", "settings.song-ids"
            )
        if self.stop > MAX_SONG_ID + 1:
            raise SettingsError(
                f"SONGVEC_SONG_ID_STOP: expected at most {MAX_SONG_ID + 1:,}, got {self.stop:,}", "settings.song-ids"
            )
        if self.stop == MAX_SONG_ID + 1:
            # the tail holds at least one id
            object.__setattr__(self, "stop", MAX_SONG_ID // self.width * self.width)
        for name, value in (("SONGVEC_SONG_ID_STOP", self.stop), ("SONGVEC_SONG_ID_START", self.start)):
            if value % self.width:
                raise SettingsError(
                    f"{name} must be a multiple of SONGVEC_RANGE_SIZE: {value} is not one of {self.width}",
                    "settings.song-ids",
                )
        if not 0 <= self.start < self.stop:
            raise SettingsError(
                f"SONGVEC_SONG_ID_START must be from 0 on and below SONGVEC_SONG_ID_STOP: got {self.start:,} and "
                f"{self.stop:,}",
                "settings.song-ids",
            )

    def __iter__(self) -> Iterator[SongIdRange]:
        for start in range(self.start, self.stop, self.width):
            yield SongIdRange(start, start + self.width)
        yield self.tail

    def __contains__(self, song_range: SongIdRange) -> bool:
        return self.start <= song_range.start and self.range_of(song_range.start) == song_range

    def __len__(self) -> int:
        return (self.stop - self.start) // self.width + 1

    def check_count(self) -> None:
        """Refuse more ranges than a graph can show.

        Raises:
            SettingsError: the message has a range size that fits, with its start and stop.
        """
        if len(self) - 1 <= _MAX_RANGES:
            return
        steps = (digit * 10**zeros for zeros in range(7) for digit in (1, 2, 5))
        width = next(each for each in steps if each * _MAX_RANGES >= self.stop - self.start + each)
        start, stop = self.start // width * width, min(-(-self.stop // width) * width, MAX_SONG_ID + 1)
        raise SettingsError(
            f"SONGVEC_SONG_ID_START, SONGVEC_SONG_ID_STOP and SONGVEC_RANGE_SIZE make {len(self) - 1:,} ranges, more "
            f"than {_MAX_RANGES:,}: set SONGVEC_RANGE_SIZE={width} SONGVEC_SONG_ID_START={start} "
            f"SONGVEC_SONG_ID_STOP={stop}, or begin where the ids begin",
            "settings.song-ids",
        )

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
                "what the tail's cache holds is kept. If the lowest song_id is high too, begin there with "
                "SONGVEC_SONG_ID_START",
                "settings.song-ids",
            )

    def range_of(self, song_id: int) -> SongIdRange:
        """The range of a song_id from 0 to MAX_SONG_ID; below `start` it is a range that this tiling does not have."""
        if song_id >= self.stop:
            return self.tail
        start = song_id - song_id % self.width
        return SongIdRange(start, start + self.width)


def parse_span(given: str, tiling: Tiling) -> tuple[SongIdRange, SongIdRange]:
    """The first and last range of FIRST...LAST, or of one key.

    Raises:
        SettingsError: they are not ranges of the graph, or not in their order.
    """
    first, _, last = given.partition("...")
    try:
        span = SongIdRange.from_key(first.strip()), SongIdRange.from_key((last or first).strip())
    except ValueError as error:
        raise SettingsError(f"ranges: {error} for each end of FIRST...LAST", "settings.ranges") from error
    if span[0] not in tiling or span[1] not in tiling or span[0] > span[1]:
        raise SettingsError(
            f"ranges: FIRST...LAST names no ranges of this graph in their order, got {given!r}", "settings.ranges"
        )
    return span
