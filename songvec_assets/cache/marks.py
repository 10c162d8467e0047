"""The mark of a complete fill, beside its shard: what it depended on, and what it counted.

It saves the next fill the comparison, and tells a load that songs the shard no longer has are gone, not lost. Without
one, or with one that does not fit, all is compared again.
"""

import contextlib
from pathlib import Path

import msgspec
import xxhash

from songvec_assets.cache.shards import ModelCache
from songvec_assets.files import replace_atomically


class Mark(msgspec.Struct, frozen=True):
    """A complete fill.

    Attributes:
        snapshot: digest of the songs it saw; None where it saw none.
        text: identity of how songs become texts.
        n_bytes: of the shard.
        n_songs, n_set_aside, n_truncated: of the range.
        server: that rejected songs; empty where none was rejected.
    """

    snapshot: str | None
    text: str
    n_bytes: int
    n_songs: int
    n_set_aside: int
    n_truncated: int
    server: str = ""

    def fits(self, snapshot: str | None, text: str, shard: Path, server: str) -> bool:
        """Whether the fill is complete still: of the same songs, rendered the same way, in this file; what a server
        rejected another one may accept."""
        if self.server not in ("", server):
            return False
        n_bytes = shard.stat().st_size if shard.exists() else 0
        return snapshot is not None and (self.snapshot, self.text, self.n_bytes) == (snapshot, text, n_bytes)


def read_mark(path: Path) -> Mark | None:
    """The mark, or None where there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Mark)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def digest_cache(cache: ModelCache) -> str:
    """An identity of all that is cached of a model: of each shard its size, and what fills left beside it."""
    state = xxhash.xxh3_128(f"{cache.model} {cache.dimensions}".encode())
    for song_range in cache.ranges():
        state.update(f"{song_range.key} {cache.path_of(song_range).stat().st_size}\n".encode())
        for told in (cache.mark_of(song_range), cache.anew_of(song_range)):
            with contextlib.suppress(FileNotFoundError):
                state.update(told.read_bytes())
    return state.hexdigest()


def write_mark(path: Path, mark: msgspec.Struct) -> None:
    """Write a mark, or another small record beside a shard, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as file:
        file.write(msgspec.json.encode(mark))
