"""The storage root: the database it belongs to, its tiling, and its folders.

store.json                                 identity, range width, start and stop of the tiling
songs/<key>.parquet                        snapshots
songs/looks.json                           how far exports by an updated_at column have looked
embeddings/<model>-<dimensions>/texts.json     how their texts are made
embeddings/<model>-<dimensions>/reembed.json   a request to embed songs again
embeddings/<model>-<dimensions>/<key>/         parts, bases and the manifest of a range

When to add here: another property of a whole store. Keep out: what is cached of a model (`model_cache`).
"""

import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import msgspec
import polars as pl

from songvec_assets.cache.completion import write_rows
from songvec_assets.cache.manifest import Manifest
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.texts import model_storage
from songvec_assets.errors import SettingsError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value, write_first_value, write_value
from songvec_assets.songs.ranges import Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.storage import Storage

KEY = "store.json"
_STORE_ID = "store_id"


@dataclass(frozen=True)
class Store:
    """A storage root.

    Attributes:
        storage: its objects.
        store_id: its identity, which its database records.
        bound: whether a database has recorded it.
    """

    storage: Storage
    store_id: str
    tiling: Tiling
    bound: bool = False

    @property
    def songs(self) -> Snapshots:
        """Its snapshots."""
        return Snapshots(self.storage.within("songs"))

    def embeddings(self, model: str, dimensions: int) -> ModelCache:
        """The cache of a model."""
        return ModelCache(model_storage(self.storage, model, dimensions), model, dimensions)

    def model_caches(self) -> list[ModelCache]:
        """The caches of all models that have a folder, without model ids and dimensions."""
        # the model id is in the files; ranges are found without it
        models = self.storage.within("embeddings")
        return [ModelCache(models.within(name), "", 0) for name in models.scan().prefixes]


class _Record(msgspec.Struct):
    store_id: str
    range_size: int
    song_id_stop: int
    bound: bool
    # stores of earlier versions begin at 0
    song_id_start: int = 0


def find_store(storage: Storage, tiling: Tiling) -> Store | None:
    """Look at a storage root without writing; None: it does not exist yet.

    The tiling is that of its files: if the stop was raised since, the tail is not divided yet.

    Raises:
        StoreError: its ranges have another width, its stop is higher, it holds ranges below the start, or its
            `store.json` does not parse.
    """
    read = storage.read(KEY)
    if read is None:
        return None
    try:
        found = msgspec.json.decode(read.content, type=_Record)
        divided = Tiling(found.range_size, found.song_id_stop, found.song_id_start)
        store = Store(storage, found.store_id, divided, found.bound)
    except (msgspec.DecodeError, SettingsError) as error:
        raise StoreError(
            f"{storage.describe(KEY)} does not parse ({error}): restore it, or remove it and run `songvec adopt` to "
            "bind the store again",
            "store.damaged",
        ) from error
    if store.tiling.width != tiling.width:
        raise StoreError(
            f"{storage} is divided into ranges of {store.tiling.width} song_ids, SONGVEC_RANGE_SIZE is {tiling.width}: "
            f"set it back to {store.tiling.width}, or name another folder with SONGVEC_STORAGE",
            "store.other-ranges",
        )
    if store.tiling.stop > tiling.stop:
        raise StoreError(
            f"the tail of {storage} begins at {store.tiling.stop}, SONGVEC_SONG_ID_STOP is {tiling.stop}: it may only "
            f"grow, so set it to {store.tiling.stop} or more",
            "store.other-ranges",
        )
    if store.tiling.start < tiling.start:
        held = store.songs.ranges()
        held += [song_range for cache in store.model_caches() for song_range in cache.ranges()]
        # the songs of the tail are checked when it is divided
        _check_start(storage, (each.start for each in held if each != store.tiling.tail), tiling)
    return store


def look_up(storage: Storage, tiling: Tiling, database: Database) -> Store:
    """The store at a root, or a new one, which belongs to the database or to none. Changes nothing.

    Raises:
        StoreError: see `find_store` and `check_pair`.
    """
    store = find_store(storage, tiling) or Store(storage, "", tiling)
    try:
        check_pair(store, database)
    except StoreError:
        # another first run may have bound a new store after this one had looked
        found = find_store(storage, tiling)
        if found is None or found == store:
            raise
        store = found
        check_pair(store, database)
    return store


def _check_start(storage: Storage, song_ids: Iterable[int], tiling: Tiling) -> None:
    lowest = min(song_ids, default=tiling.start)
    if lowest < tiling.start:
        raise StoreError(
            f"{storage} holds songs from song_id {lowest} on, SONGVEC_SONG_ID_START is {tiling.start}: set it to "
            f"{lowest // tiling.width * tiling.width} or less",
            "store.other-ranges",
        )


def open_store(
    storage: Storage, tiling: Tiling, guard: Callable[[Store], AbstractContextManager[object]] = nullcontext
) -> Store:
    """Open a storage root to write to it, or create it; divide its tail if the stop was raised.

    Args:
        storage: its objects.
        tiling: how song_ids are to be divided into ranges.
        guard: entered while the tail is divided; keeps others from filling it.

    Raises:
        StoreError: see `find_store`; or the folder cannot be created or written to.
    """
    store = find_store(storage, tiling)
    if store is None:
        try:
            # another process may be first: concurrent first starts create one store
            storage.check_writes()
            storage.put_if_unchanged(KEY, _encode(Store(storage, str(uuid.uuid4()), tiling)), None)
        except StoreError as error:
            reason = getattr(error.__cause__, "strerror", error)
            raise StoreError(
                f"cannot write to the storage folder {storage.location}: {reason}. "
                "Work in a folder that you may write to, or set SONGVEC_STORAGE to one",
                "store.not-writable",
            ) from error
        store = find_store(storage, tiling)
        assert store is not None
    if store.tiling != tiling:
        with guard(store):
            for cache in store.model_caches() if tiling.stop != store.tiling.stop else ():
                if store.tiling.tail in cache.ranges():
                    _divide_tail(cache, store, tiling)
            store = replace(store, tiling=tiling)
            _write(store)
    return store


def bind_store(store: Store, database: Database) -> None:
    """Bind a new store and its database to each other; refuse a pair that does not belong together.

    Raises:
        StoreError: see `check_pair`.
    """
    check_pair(store, database)
    if not store.bound:
        with database.get_connection() as connection:
            write_first_value(connection, _STORE_ID, store.store_id)
        # another store may have been first
        check_pair(replace(store, bound=True), database)
        _write(replace(store, bound=True))


def check_pair(store: Store, database: Database) -> None:
    """Refuse a pair that does not belong together. Changes nothing; if neither is bound, the pair passes.

    Raises:
        StoreError: the database is bound to another store, or it is unbound and the store is bound.
    """
    with database.get_connection() as connection:
        known = read_value(connection, _STORE_ID)
    if known != store.store_id and (known is not None or store.bound):
        raise StoreError(
            f"the storage folder {store.storage} belongs to another database than {database.describe()}: set "
            "SONGVEC_STORAGE or POSTGRES_URL to the pair that belongs together, or run `songvec adopt` to bind "
            "this folder to this database"
        )


def adopt_store(store: Store, database: Database) -> None:
    """Bind a store to a database, even if that was bound to another store."""
    with database.get_connection() as connection:
        write_value(connection, _STORE_ID, store.store_id)
    _write(replace(store, bound=True))


def _write(store: Store) -> None:
    store.storage.put(KEY, _encode(store))


def _encode(store: Store) -> bytes:
    tiling = store.tiling
    record = _Record(store.store_id, tiling.width, tiling.stop, store.bound, tiling.start)
    return msgspec.json.format(msgspec.json.encode(record)) + b"\n"


def _divide_tail(cache: ModelCache, store: Store, tiling: Tiling) -> None:
    """Divide the tail of a model's cache among the new ranges. A crash keeps the tail: it is divided again."""
    tail = cache.open_as_found(store.tiling.tail)
    if tail.damaged:
        named = ", ".join(f"{name}: {why}" for name, why in tail.damaged.items())
        raise StoreError(
            f"{tail.folder} is damaged, so that it cannot be divided ({named}): restore it from a backup; or set "
            f"SONGVEC_SONG_ID_STOP back to {store.tiling.stop}, run all ranges, which embeds what is lost, and raise "
            "it again",
            "store.damaged",
        )
    kept = pl.concat([tail.rows, tail.deleted_rows(0.0)])
    manifest = tail.manifest
    _check_start(store.storage, [*kept["song_id"], *(each.song_id for each in manifest.rejected)], tiling)
    for song_range in (each for each in tiling if each.start >= store.tiling.stop):
        rows = kept.filter(pl.col("song_id").is_between(song_range.start, song_range.stop - 1))
        rejected = tuple(each for each in manifest.rejected if each.song_id in song_range)
        if rows.height or rejected:
            deleted_at = {song_id: at for song_id, at in manifest.deleted_at.items() if song_id in song_range}
            damaged = tuple(song_id for song_id in manifest.damaged if song_id in song_range)
            found = Manifest(generation=manifest.generation, rejected=rejected, deleted_at=deleted_at, damaged=damaged)
            write_rows(tail, rows, song_range, found)
    # once this is saved, nothing is left to divide, even if files remain
    names = tuple(tail.files.sizes)
    tail.save(Manifest(generation=manifest.generation, consumed=names))
    tail.storage.delete_all(tail.range.key)
