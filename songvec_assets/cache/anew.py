"""Songs that are embedded again because a person asked for it: who asked, from which row on it counts, who was served.

Only fills that were asked look here: until a song has its new vector the old one holds, for loads and for every other
fill. One file a range, beside its shard; and one for the ask that is under way, so that the same command resumes it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from songvec_assets.cache.marks import write_mark
from songvec_assets.cache.shards import ModelCache
from songvec_assets.songs.ranges import SongIdRange

Kind = TypeVar("Kind", bound=msgspec.Struct)


class Ask(msgspec.Struct, frozen=True):
    """An ask that is under way: whose, and over which ranges."""

    asked_by: str
    first: str
    last: str


class Anew(msgspec.Struct, frozen=True):
    """What was asked of one range.

    Attributes:
        asked_by: whose ask is under way; None: nobody's.
        first_row: of the shard, that counts as an answer to it.
        served: who asked before and got it.
    """

    asked_by: str | None = None
    first_row: int = 0
    served: tuple[str, ...] = ()

    def is_owed(self, asked_by: str | None) -> bool:
        """Whether somebody asks who was not served."""
        return asked_by is not None and asked_by not in self.served


def begin_ask(cache: ModelCache, ranges: Sequence[SongIdRange], asked_by: str) -> str:
    """Take up the ask over just these ranges that was not ended, or begin this one; whose it is."""
    keys = sorted(each.key for each in ranges)
    asked = _read(_ask_path(cache), Ask)
    if not keys or (asked is not None and (asked.first, asked.last) == (keys[0], keys[-1])):
        return asked.asked_by if asked else asked_by
    write_mark(_ask_path(cache), Ask(asked_by, keys[0], keys[-1]))
    return asked_by


def end_ask(cache: ModelCache) -> None:
    """Every range of the ask was served: the next one asks anew."""
    _ask_path(cache).unlink(missing_ok=True)


def read_anew(cache: ModelCache, song_range: SongIdRange) -> Anew:
    """What was asked of a range."""
    return _read(cache.anew_of(song_range), Anew) or Anew()


def write_anew(cache: ModelCache, song_range: SongIdRange, anew: Anew) -> None:
    """Record what was asked of a range, or that it was served."""
    write_mark(cache.anew_of(song_range), anew)


def _ask_path(cache: ModelCache) -> Path:
    return cache.folder / "ask.anew"


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
