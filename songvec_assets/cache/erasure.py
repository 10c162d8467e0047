"""Erasing songs from the cache on demand, before the retention time of deleted songs ends.

When to add here: another place of the store where a song leaves something. Keep out: how files are merged
(`completion`), and songs that the source still has.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import chain, groupby

from songvec_assets.cache import completion
from songvec_assets.cache.store import Store
from songvec_assets.errors import SettingsError
from songvec_assets.songs.ranges import SongIdRange


def erase_songs(
    store: Store, song_ids: Iterable[int], lock_range: Callable[[SongIdRange], AbstractContextManager[object]]
) -> int:
    """Erase all that the cache has of songs, of every model. Snapshots lost them when they left the source.

    Args:
        song_ids: of songs that the source no longer has.
        lock_range: keeps others from filling a range.

    Returns:
        The number of vectors erased.

    Raises:
        SettingsError: the last export has one of them, so that the next run would pay for it again. Nothing is erased.
        StoreError: a range is being embedded again, or cannot be read.
    """
    tiling = store.tiling
    ranges = {each: {*ids} for each, ids in groupby(sorted({*song_ids}), tiling.range_of)}
    in_snapshots = ({*store.songs.read(each, ["song_id"])["song_id"]} & ids for each, ids in ranges.items())
    exported = sorted(chain.from_iterable(in_snapshots))
    if exported:
        raise SettingsError(
            f"the songs table still had {', '.join(map(str, exported[:5]))} at the last export, and the next run would "
            "pay for what is erased: delete them there, `songvec run`, and then forget them"
        )
    n_erased = 0
    for cache in store.model_caches():
        for song_range in {*cache.ranges()} & ranges.keys():
            with lock_range(song_range):
                n_erased += completion.erase(cache.open_as_found(song_range), ranges[song_range])
    return n_erased
