"""Moving a store to another folder or bucket: each object is copied, and checked where it arrived; nothing is paid for.

Until all is there, `moving.json` at the target names the store, which has no `store.json` yet; a move that was
interrupted goes on from what has arrived. At the end `store.json` changes places: the source is no store any more, but
keeps its objects. When to add here: another check of what arrived. Keep out: what objects contain.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import xxhash

from songvec_assets.cache.model_cache import lock_name
from songvec_assets.cache.parts import DamagedPartError, read_identity
from songvec_assets.cache.slices import open_stored
from songvec_assets.cache.store import KEY, check_pair, find_store
from songvec_assets.errors import SettingsError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.ranges import Tiling
from songvec_assets.storage import Storage

_MOVING, _PART = "moving.json", ".arrow"
_PIECE_BYTES = 1 << 24


@dataclass
class MoveReport:
    """What a move did.

    Attributes:
        n_objects, n_bytes: of the store.
        n_copied: objects that were copied by this call; the others had arrived before.
        damaged: parts that are damaged at the source; they are copied as they are, and the next fill embeds what they
            lack.
    """

    n_objects: int = 0
    n_bytes: int = 0
    n_copied: int = 0
    damaged: list[str] = field(default_factory=list)


def move_store(source: Storage, target: Storage, tiling: Tiling, database: Database, run: RunContext) -> MoveReport:
    """Move a store; see the module. Its ranges are locked meanwhile, so that no fill writes to them.

    Raises:
        StoreError: there is no store, it is another database's, the target holds another one, or what arrived differs.
    """
    if f"{target.location}/".startswith(f"{source.location}/") or f"{source.location}/".startswith(
        f"{target.location}/"
    ):
        raise SettingsError(f"expected two places apart from each other, got {source.location} and {target.location}")
    store = find_store(source, tiling)
    if store is None:
        raise StoreError(
            f"{source} holds no store: name the folder or bucket that SONGVEC_STORAGE names. If an earlier move from "
            "there was complete, there is nothing left to move",
            "store.missing",
        )
    check_pair(store, database)
    ranges = {*store.tiling, *(each for cache in store.model_caches() for each in cache.ranges())}
    locks = [lock_name(each) for each in sorted(ranges)]
    waiting = Progress("wait for fills", 0, 0, note="another run fills ranges of this store: waiting for it")
    with hold_lock(database, locks, lambda: run.report(waiting), run.check_stop) as check_held:
        _claim(target, store.store_id)
        report = _copy_all(source, target, run)
        check_held()
        record = source.read(KEY)
        assert record is not None
        target.put(KEY, record.content)
        source.delete(KEY)
        target.delete(_MOVING)
    return report


def _claim(target: Storage, store_id: str) -> None:
    """Refuse a target that is another store, or is becoming one."""
    target.check_writes()
    target.put_if_unchanged(_MOVING, msgspec.json.encode({"store_id": store_id}), None)
    for key in (_MOVING, KEY):
        read = target.read(key)
        if read is not None and msgspec.json.decode(read.content)["store_id"] != store_id:
            raise StoreError(
                f"{target.describe(key)} is of another store than the one to move: name a folder or prefix that is "
                "empty, or remove what an earlier move began there",
                "store.occupied",
            )


def _copy_all(source: Storage, target: Storage, run: RunContext) -> MoveReport:
    """Bring the target's objects to the state of the source's."""
    wanted = {key: size for key, size in source.list_keys() if "/" in key}
    arrived = {key: size for key, size in target.list_keys() if "/" in key}
    if stale := arrived.keys() - wanted.keys():  # merged away since an earlier try
        target.delete(*stale)
    report = MoveReport(len(wanted), sum(wanted.values()))
    n_done = 0
    # manifests last, so that what they name is there
    for key in sorted(wanted, key=lambda key: (key.endswith(".json"), key)):
        run.check_stop()
        run.report(Progress("move the store", n_done >> 20, report.n_bytes >> 20, unit="MB", note=key))
        is_there = arrived.get(key) == wanted[key] and key.endswith(_PART)
        if not is_there or _find_damage(target, key):
            _copy(source, target, key, report)
        n_done += wanted[key]
    run.report(Progress("move the store", n_done >> 20, n_done >> 20, unit="MB"))
    return report


def _copy(source: Storage, target: Storage, key: str, report: MoveReport) -> None:
    """Copy an object, and compare what arrived."""
    sent, got = xxhash.xxh3_128(), xxhash.xxh3_128()
    with target.write(key) as file:
        for piece in _read(source, key):
            sent.update(piece)
            file.write(piece)
    report.n_copied += 1
    problem = _find_damage(target, key) if key.endswith(_PART) else "it has no checksums"
    if not problem:
        return
    for piece in _read(target, key):
        got.update(piece)
    if sent.digest() != got.digest():
        raise StoreError(
            f"{target.describe(key)} differs from what was sent: check the disk or the server, then start the same "
            "command again, which copies it once more",
            "store.damaged",
        )
    if key.endswith(_PART):
        report.damaged.append(f"{source.describe(key)}: {problem}")


def _read(storage: Storage, key: str) -> Iterator[bytes]:
    file = storage.open(key).file()
    while piece := file.read(_PIECE_BYTES):
        yield piece


def _find_damage(storage: Storage, key: str) -> str:
    """What is wrong with a part, by the checksums that were recorded when its vectors were paid for."""
    content = storage.open(key)
    identity = read_identity(content.file())
    if identity is None:
        return "it does not open"
    try:
        batches = open_stored(content, identity, key)
    except DamagedPartError as error:
        return str(error)
    n_damaged = sum(int((~each.load().find_sound()).sum()) for each in batches)
    return f"{n_damaged} of its vectors do not match their checksums" if n_damaged else ""
