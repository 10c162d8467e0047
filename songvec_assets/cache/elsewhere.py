"""Texts that other ranges of a model have vectors of: found by their hashes, and copied instead of paid for again.

Songs that get other song_ids may move into other ranges. Of each range the first 64 bits of its text hashes are held:
8 bytes per row, 96 MB for 12 million songs, and a filter of 32 MB. Any row counts, also one of an older text or of a
deleted song.
When to add here: another source of stored vectors. Keep out: what a range lacks (`plan`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.model_cache import ModelCache, copy_vectors
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TEXT_HASH_BYTES

LOOK_AGAIN_S = 60.0
"""When all ranges are looked at again, since other processes may have filled them. Each range looks for its texts in
all others: a look at every other one each time would grow with the square of their number, two requests per pair in a
bucket."""

_FILTER_BITS = 28
"""A bit for each value of the first bits of a key, set if some range has it: of 50,000 texts that are nowhere it leaves
2,200 to search for in each of 240 ranges. 32 MB."""

_Keys = NDArray[np.uint64]
_Take = Callable[[SongIdRange, pl.DataFrame], pl.DataFrame]


@dataclass
class OtherRanges:
    """See the module. A range is read when it is needed, and again once its manifest changed. One thread at a time.

    Attributes:
        cache: of the model.
    """

    cache: ModelCache
    _keys: dict[SongIdRange, tuple[str | None, _Keys]] = field(default_factory=dict)
    _seen: set[SongIdRange] = field(default_factory=set)
    _seen_at: float = float("-inf")
    _filter: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1 << _FILTER_BITS >> 3, np.uint8))

    def forget(self, song_range: SongIdRange) -> None:
        """Look at a range again when it is needed: this process changed it. Callable from any thread."""
        self._seen.discard(song_range)

    def find(self, song_range: SongIdRange, songs: pl.DataFrame) -> pl.DataFrame:
        """The songs whose text a range other than theirs has. Reads no vector, so that damaged ones count, too.

        Args:
            songs: columns song_id (Int32) and text_hash (Binary).
        """
        return self._take(song_range, songs, lambda _, here: here)

    def copy(self, cached: CachedRange, songs: pl.DataFrame, check: Callable[[], None]) -> pl.DataFrame:
        """Copy sound vectors of other ranges into a range; they are durable when this returns.

        Args:
            cached: the range of the songs; its lock is held.
            songs: as in `find`.
            check: called before each range that is copied from; raises to stop. What was copied before is kept.

        Returns:
            The songs that got a vector.
        """

        def take(other: SongIdRange, here: pl.DataFrame) -> pl.DataFrame:
            check()
            try:
                return self._copy(cached, other, here)
            except StoreError as error:
                if error.code != "storage.changed":
                    raise
                # its fill merged and deleted its files meanwhile
                return self._copy(cached, other, here)

        return self._take(cached.range, songs, take)

    def _copy(self, cached: CachedRange, other: SongIdRange, here: pl.DataFrame) -> pl.DataFrame:
        source = self._open(other)
        if source is None:
            return here.clear()
        stored = source.all_rows.join(here, on="text_hash", how="semi")
        vectors = source.find_sound(stored).unique("text_hash", keep="last").select("text_hash", "row")
        copied = here.join(vectors, on="text_hash", how="inner", maintain_order="left")
        copy_vectors(source, copied, cached)
        return copied

    def _take(self, song_range: SongIdRange, songs: pl.DataFrame, take: _Take) -> pl.DataFrame:
        """Offer each other range the songs whose texts it seems to have; the songs that were taken."""
        if songs.is_empty():
            return songs
        if time.monotonic() >= self._seen_at + LOOK_AGAIN_S:
            self._seen, self._seen_at = set(), time.monotonic()
        others = {other: self._read_keys(other) for other in self.cache.ranges() if other != song_range}
        places, bits = _places_of(_keys_of(songs))
        candidates = songs.filter(self._filter[places] & bits != 0)
        # in the order of their keys, which makes each search several times faster
        left = candidates[np.argsort(_keys_of(candidates))]
        wanted = _keys_of(left)
        for other, keys in others.items():
            are_here = _are_in(wanted, keys)
            if are_here.any():
                taken = take(other, left.filter(are_here))
                left = left.join(taken, on="song_id", how="anti", maintain_order="left")
                wanted = _keys_of(left)
        return candidates.join(left, on="song_id", how="anti", maintain_order="left")

    def _read_keys(self, song_range: SongIdRange) -> _Keys:
        """The sorted keys of a range's rows."""
        version, keys = self._keys.get(song_range, ("", np.empty(0, np.uint64)))
        if song_range in self._seen:
            return keys
        # before the look: what changes after it may be forgotten meanwhile
        self._seen.add(song_range)
        files = self.cache.look(song_range)
        if version != files.version:
            opened = self._open(song_range)
            keys = np.sort(_keys_of(opened.all_rows)) if opened else keys
            self._keys[song_range] = files.version, keys
            places, bits = _places_of(keys)
            np.bitwise_or.at(self._filter, places, bits)
        return keys

    def _open(self, song_range: SongIdRange) -> CachedRange | None:
        try:
            return self.cache.open(song_range)
        except StoreError:  # its own fill and `songvec status` name it; the range that lacks texts is not at fault
            return None


def _keys_of(rows: pl.DataFrame) -> _Keys:
    return np.frombuffer(b"".join(rows["text_hash"].to_list()), dtype="<u8")[:: TEXT_HASH_BYTES // 8]


def _places_of(keys: _Keys) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
    """Where keys are in the filter: bytes, and a bit of each."""
    bits = keys >> np.uint64(64 - _FILTER_BITS)
    return (bits >> np.uint64(3)).astype(np.intp), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8)


def _are_in(wanted: _Keys, stored: _Keys) -> NDArray[np.bool_]:
    """Which of some keys are among stored ones; both in order."""
    if not len(stored):
        return np.zeros(len(wanted), dtype=np.bool_)
    are_in: NDArray[np.bool_] = stored.take(np.searchsorted(stored, wanted), mode="clip") == wanted
    return are_in
