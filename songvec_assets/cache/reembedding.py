"""Requests to re-embed songs: each is paid for once, and a stopped one is resumed.

A request has a generation later than that of every file. Each range embeds its songs into files of that generation,
which replace the older ones once they are complete.
When to add here: something else to record of a request. Keep out: the progress of a range, which its files show.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage import Storage

_KEY = "reembed.json"


class _Request(msgspec.Struct, frozen=True):
    requested_by: str
    ranges: tuple[str, str]
    generation: int
    is_ended: bool = False


def begin(storage: Storage, ranges: Sequence[SongIdRange], requested_by: str, generations: Iterable[int]) -> int:
    """The generation of a request; a new request is recorded.

    An earlier request of the same requester, or an unfinished one of the same ranges, is resumed.

    Args:
        storage: of the model.
        ranges: to embed again; at least one.
        requested_by: identifies the requester.
        generations: of the files in these ranges.

    Raises:
        StoreError: the recorded requests do not parse.
    """
    first_and_last = min(ranges).key, max(ranges).key
    generation = 1 + max(generations, default=0)
    while True:
        requests, version = _read(storage)
        known = [each for each in requests if each.requested_by == requested_by]
        known = known or [each for each in requests if each.ranges == first_and_last and not each.is_ended]
        generation = max([generation, *(1 + each.generation for each in requests)])
        found = known[-1] if known else _Request(requested_by, first_and_last, generation)
        request = replace(found, requested_by=requested_by)
        if request in requests or _write(storage, [*requests, request], version):
            return request.generation


def end(storage: Storage, generation: int) -> None:
    """Record that every range was served: the next request over the same ranges is a new one."""
    is_written = False
    while not is_written:
        requests, version = _read(storage)
        ended = [replace(each, is_ended=each.is_ended or each.generation == generation) for each in requests]
        is_written = ended == requests or _write(storage, ended, version)


def _read(storage: Storage) -> tuple[list[_Request], str | None]:
    read = storage.read(_KEY)
    try:
        return (msgspec.json.decode(read.content, type=list[_Request]), read.version) if read else ([], None)
    except msgspec.DecodeError as error:
        raise StoreError(
            f"{storage.describe(_KEY)} does not parse ({error}): remove it, and songs that were embedded again "
            "before are embedded once more",
            "store.damaged",
        ) from error


def _write(storage: Storage, requests: Sequence[_Request], version: str | None) -> bool:
    return storage.put_if_unchanged(_KEY, msgspec.json.encode(requests), version) is not None
