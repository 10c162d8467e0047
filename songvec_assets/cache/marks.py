"""The mark of a complete fill, beside its shard: what it depended on, and what it counted.

It saves the next fill the comparison, and tells a load that songs the shard no longer has are gone, not lost. Without
one, or with one that does not fit, all is compared again.
"""

from pathlib import Path

import msgspec

from songvec_assets.files import replace_atomically


class Mark(msgspec.Struct, frozen=True):
    """A complete fill.

    Attributes:
        snapshot: digest of the songs it saw; None where it saw none.
        text: identity of how songs become texts.
        n_bytes: of the shard.
        n_songs, n_set_aside, n_truncated: of the range.
    """

    snapshot: str | None
    text: str
    n_bytes: int
    n_songs: int
    n_set_aside: int
    n_truncated: int


def read_mark(path: Path) -> Mark | None:
    """The mark, or None where there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Mark)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_mark(path: Path, mark: Mark) -> None:
    """Write a mark, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as file:
        file.write(msgspec.json.encode(mark))
