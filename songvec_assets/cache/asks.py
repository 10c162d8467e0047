"""The request to embed songs again that is under way: whose it is and over which ranges, so that it can be resumed.

Who was served, and where the new vectors are, is in each range's manifest.
"""

from collections.abc import Sequence

import msgspec

from songvec_assets.cache.shards import ModelCache
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange

_KEY = "ask.json"


class _Ask(msgspec.Struct, frozen=True):
    asked_by: str
    first: str
    last: str


def begin(cache: ModelCache, ranges: Sequence[SongIdRange], asked_by: str) -> str:
    """Resume the request over just these ranges that was not ended, or begin this one; whose it is.

    Raises:
        StoreError: what is known of it does not parse.
    """
    read = cache.storage.read(_KEY)
    try:
        asked = msgspec.json.decode(read.content, type=_Ask) if read else None
    except msgspec.DecodeError as error:
        raise StoreError(
            f"{cache.storage.describe(_KEY)} does not parse ({error}): remove it, and songs that were embedded again "
            "before are embedded once more"
        ) from error
    keys = sorted(each.key for each in ranges)
    if asked and (not keys or (asked.first, asked.last) == (keys[0], keys[-1])):
        return asked.asked_by
    if keys:
        cache.storage.put(_KEY, msgspec.json.encode(_Ask(asked_by, keys[0], keys[-1])))
    return asked_by


def end(cache: ModelCache) -> None:
    """Every range was served: the next request is another one."""
    cache.storage.delete(_KEY)
