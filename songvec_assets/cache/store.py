"""The storage root: which database it belongs to, how it cuts song_ids, where its folders are.

store.json                                 identity, range width, stop of the tiling
songs/<key>.parquet                        snapshots
embeddings/<model>-<dimensions>/<key>.arrow    shards
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from songvec_assets.cache.shards import ModelCache, Shard, ShardIdentity, write_shard
from songvec_assets.errors import StoreError
from songvec_assets.files import replace_atomically
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_fact, write_fact
from songvec_assets.songs.ranges import Tiling

_FACT = "store_id"


@dataclass(frozen=True)
class Store:
    """A storage root.

    Attributes:
        root: its folder.
        store_id: what the database knows it by.
        tiling: how it cuts song_ids.
    """

    root: Path
    store_id: str
    tiling: Tiling

    @property
    def songs(self) -> Path:
        """The folder of snapshots."""
        return self.root / "songs"

    def embeddings(self, model: str, dimensions: int) -> ModelCache:
        """A model's shards."""
        folder = self.root / "embeddings" / f"{model.replace('/', '--')}-{dimensions}"
        return ModelCache(folder, model, dimensions)


def open_store(root: Path, tiling: Tiling) -> Store:
    """Open a storage root, or make one; cut its tail anew where the stop was raised.

    Raises:
        StoreError: it is cut into ranges of another width, or its stop is higher.
    """
    path = root / "store.json"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        store = Store(root, str(uuid.uuid4()), tiling)
        _write(store)
        return store
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        store = Store(root, found["store_id"], Tiling(found["range_size"], found["song_id_stop"]))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} does not parse ({error}): restore it, or remove it and run `songvec adopt` to bind the store anew"
        ) from error
    if store.tiling.width != tiling.width:
        raise StoreError(
            f"{root} is cut into ranges of {store.tiling.width} song_ids, SONGVEC_RANGE_SIZE is {tiling.width}: set it "
            f"back to {store.tiling.width}, or name another folder with SONGVEC_STORAGE"
        )
    if store.tiling.stop > tiling.stop:
        raise StoreError(
            f"the tail of {root} begins at {store.tiling.stop}, SONGVEC_SONG_ID_STOP is {tiling.stop}: it may only grow"
        )
    if store.tiling.stop < tiling.stop:
        _cut_tails(store, tiling)
        store = Store(root, store.store_id, tiling)
        _write(store)
    return store


def bind_store(store: Store, database: Database) -> None:
    """Let a new database and store know each other; refuse a pair that does not belong together.

    Raises:
        StoreError: the database knows another store.
    """
    with database.get_connection() as connection:
        known = read_fact(connection, _FACT)
        if known is None:
            write_fact(connection, _FACT, store.store_id)
        elif known != store.store_id:
            raise StoreError(
                f"the storage folder {store.root} belongs to another database than {database.describe()}: set "
                "SONGVEC_STORAGE or POSTGRES_URL to the pair that belongs together, or run `songvec adopt` to bind "
                "this folder to this database"
            )


def adopt_store(store: Store, database: Database) -> None:
    """Bind a store to a database, whatever that knew before."""
    with database.get_connection() as connection:
        write_fact(connection, _FACT, store.store_id)


def _write(store: Store) -> None:
    content = {
        "store_id": store.store_id,
        "range_size": store.tiling.width,
        "song_id_stop": store.tiling.stop,
    }
    with replace_atomically(store.root / "store.json") as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _cut_tails(store: Store, tiling: Tiling) -> None:
    """Divide every model's tail shard into the new ranges. A crash leaves the old tail, and this is done again."""
    for tail in sorted(store.root.glob(f"embeddings/*/{store.tiling.tail.key}.arrow")):
        with pa.memory_map(str(tail)) as source:
            metadata = pa.ipc.open_stream(source).schema.metadata
        model, dimensions = metadata[b"model"].decode(), int(metadata[b"dimensions"])
        shard = Shard(tail, ShardIdentity(model, dimensions, store.tiling.tail))
        cache = store.embeddings(model, dimensions)
        live = shard.live_rows()
        for song_range in (tile for tile in tiling if tile.start >= store.tiling.stop):
            rows = live.filter(pl.col("song_id").is_between(song_range.start, song_range.stop - 1))
            if rows.height:
                write_shard(cache.path_of(song_range), ShardIdentity(model, dimensions, song_range), [(shard, rows)])
        tail.unlink()
