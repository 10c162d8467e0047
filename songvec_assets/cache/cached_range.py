"""A range of the cache as it was opened: the rows of its files that hold, and their vectors; the way to write it.

Of a song's rows the last one holds, in the order of the files, unless the manifest says that the song was rejected or
deleted. Many may read a range; one writes at a time and holds the range's lock. When to add here: another way to read
cached rows. Keep out: the bytes of a file; what a fill or a load decides. Embeddings are float32, (n, dimensions).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa
from msgspec.structs import replace
from numpy.typing import NDArray

from songvec_assets.cache import manifest as manifests
from songvec_assets.cache.manifest import Completion, DataFile, Manifest
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows, DamagedPartError, PartIdentity, Rows, open_part
from songvec_assets.cache.writing import PartWriter
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TEXT_HASH_BYTES
from songvec_assets.storage import Storage


@dataclass(frozen=True)
class RangeFiles:
    """What there is of a range; no file with vectors is opened for it.

    Attributes:
        manifest: as it is stored; None if there is none or it does not parse.
        version: of the stored manifest.
        sizes: of all files with vectors.
        error: why the manifest does not parse.
    """

    manifest: Manifest | None = None
    version: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    error: StoreError | None = None

    @classmethod
    def read(cls, storage: Storage, identity: PartIdentity) -> "RangeFiles":
        """Look at a range: one read and one listing."""
        key, manifest, error = manifests.key_of(identity.range), None, None
        read = storage.read(key)
        try:
            manifest = manifests.decode(read.content, storage.describe(key), identity) if read else None
        except StoreError as caught:
            error = caught
        objects = storage.list_objects(identity.range.key)
        sizes = {name: size for name, size in objects.items() if manifests.generation_of(name) is not None}
        return cls(manifest, read.version if read else None, sizes, error)

    @property
    def done(self) -> Completion | None:
        """The last fill, if it was complete and just its files are there, as far as their sizes tell."""
        manifest = self.manifest
        if manifest is None or manifest.find_unnamed(self.sizes) or manifest.find_garbage(self.sizes):
            return None
        is_whole = {each.name: each.n_bytes for each in manifest.files}.items() <= self.sizes.items()
        return manifest.complete if is_whole else None

    @property
    def last_generation(self) -> int:
        """The highest one of its files, begun or complete."""
        begun = [manifests.generation_of(name) or 0 for name in self.sizes]
        return max([self.manifest.generation if self.manifest else 0, *begun])


@dataclass
class CachedRange:
    """A range as it was when it was opened; the holder of its lock writes it through this.

    Attributes:
        storage: of the model.
        identity: of the range and its model.
        files: what there was of it.
        replaces: what holds until this is saved, if this is a later generation; see `ModelCache.open`.
        generation: of the files, if it is a later one.
        manifest: what holds: the stored manifest, and the parts that are newer.
        damaged: files that are not as they were written, and why. What is sound of them is read.
        n_unnamed: files that the stored manifest does not name.
    """

    storage: Storage
    identity: PartIdentity
    files: RangeFiles
    replaces: "CachedRange | None" = None
    generation: InitVar[int] = 0
    manifest: Manifest = field(init=False)
    damaged: dict[str, str] = field(default_factory=dict)
    n_unnamed: int = 0
    _batches: list[CachedRows] = field(default_factory=list)

    def __post_init__(self, generation: int) -> None:
        sizes, is_read = self.files.sizes, self.files.manifest is not None
        # without a manifest nobody says which generation holds: the lowest one is complete, if any is
        lowest = min((manifests.generation_of(name) or 0 for name in sizes), default=0)
        manifest = self.files.manifest or Manifest(generation=lowest)
        if self.replaces is not None:
            manifest, is_read = self.replaces.manifest.begin_generation(generation), True
        for each in manifest.files:
            self._open(each)
        unnamed = manifest.find_unnamed(sizes, is_read)
        self.n_unnamed = len(unnamed)
        self.manifest = self._add(manifest, unnamed)

    @property
    def range(self) -> SongIdRange:
        """Of the song_ids."""
        return self.identity.range

    @property
    def describe(self) -> str:
        """How messages name it."""
        return self.storage.describe(self.range.key)

    @property
    def n_rows(self) -> int:
        """Rows of all files, those that no longer hold among them."""
        return sum(map(len, self._batches))

    @property
    def n_batches(self) -> int:
        """Record batches of all files."""
        return len(self._batches)

    @property
    def rejected(self) -> pl.DataFrame:
        """Songs that the provider rejected: columns song_id (Int32), text_hash (Binary) and reason (String)."""
        rows = [(each.song_id, each.text_hash, each.reason) for each in self.manifest.rejected]
        schema = {"song_id": pl.Int32, "text_hash": pl.Binary, "reason": pl.String}
        return pl.DataFrame(rows, schema, orient="row").sort("song_id")

    @cached_property
    def all_rows(self) -> pl.DataFrame:
        """Every row, in the order of the files. Reads no vector.

        Returns:
            Columns song_id (Int32), text_hash (Binary), checksum (UInt64), and row (Int64, the row's number).
        """
        batches = [Rows.of((), (), np.empty((0, 0), np.float32)), *self._batches]
        hashes = np.concatenate([each.text_hashes for each in batches])
        binary = pa.Array.from_buffers(pa.binary(TEXT_HASH_BYTES), len(hashes), [None, pa.py_buffer(hashes)])
        return pl.DataFrame(
            {
                "song_id": np.concatenate([each.song_ids for each in batches]),
                "text_hash": pl.Series(binary, dtype=pl.Binary),
                "checksum": np.concatenate([each.checksums for each in batches]),
            }
        ).with_columns(row=pl.int_range(pl.len()))

    @cached_property
    def rows(self) -> pl.DataFrame:
        """The songs that have a vector: the columns of `all_rows`, ordered by song_id. Reads no vector."""
        rejected = (each.song_id for each in self.manifest.rejected)
        without = [*rejected, *self.manifest.deleted_at, *self.manifest.damaged]
        return self.last_rows().filter(~pl.col("song_id").is_in(without))

    def deleted_rows(self, since_s: float) -> pl.DataFrame:
        """The last rows of songs that were deleted at this time or later; the columns of `all_rows`."""
        ids = [song_id for song_id, at in self.manifest.deleted_at.items() if at >= since_s]
        return self.last_rows().filter(pl.col("song_id").is_in(ids))

    def last_rows(self) -> pl.DataFrame:
        """Each song's last row, ordered by song_id, whether it holds or not; the columns of `all_rows`."""
        ordered = self.all_rows.sort("song_id", maintain_order=True)
        return ordered.filter(pl.col("song_id").ne_missing(pl.col("song_id").shift(-1)))

    def find_sound(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of some rows whose vector is good and fits its checksum. Reads their vectors."""
        sound = [pl.Series([], dtype=pl.Boolean)]
        for piece in rows.iter_slices(PIECE_ROWS):
            embeddings, song_ids = self.embeddings_at(piece["row"]), piece["song_id"].to_numpy()
            hashes = np.array(piece["text_hash"].to_list(), dtype=f"V{TEXT_HASH_BYTES}")
            sound.append(pl.Series(CachedRows(song_ids, hashes, piece["checksum"].to_numpy(), embeddings).find_sound()))
        return rows.filter(pl.concat(sound))

    def embeddings_at(self, rows: pl.Series | Sequence[int]) -> Float32Matrix:
        """The vectors of a few rows, by their numbers, in the order of these."""
        wanted = np.asarray(rows, dtype=np.int64)
        embeddings = np.empty((len(wanted), self.identity.dimensions), dtype=np.float32)
        places = np.searchsorted(self._starts, wanted, side="right") - 1
        for place in np.unique(places):
            here = places == place
            embeddings[here] = self._batches[place].embeddings[wanted[here] - self._starts[place]]
        return embeddings

    def iter_vectors(self, rows: pl.Series) -> Iterator[CachedRows]:
        """Read vectors, a stored batch at a time and in the order of the files; whole batches are not copied.

        Args:
            rows: their numbers.
        """
        wanted = np.sort(rows.to_numpy())
        for first, batch in zip(self._starts, self._batches, strict=True):
            begin, end = np.searchsorted(wanted, (first, first + len(batch)))
            if end - begin == len(batch):
                yield batch
            elif begin < end:  # picking rows copies
                yield batch.take(wanted[begin:end] - first)

    def save(self, manifest: Manifest) -> None:
        """Replace the manifest.

        Raises:
            StoreError: another process replaced it since it was read. Nothing is written.
        """
        key = manifests.key_of(self.range)
        content = manifests.encode(manifest, self.identity)
        version = self.storage.put_if_unchanged(key, content, self.files.version)
        if version is None:
            raise StoreError(
                f"{self.storage.describe(key)} was changed by another process while this one filled it: its "
                "lock was lost, as when the database restarts. Start the same command again; what both have stored "
                "is kept",
                "store.lock-lost",
            )
        self.files = RangeFiles(manifest, version, self.files.sizes)
        self.manifest, self.replaces, self.n_unnamed = manifest, None, 0
        self.__dict__.pop("rows", None)

    @cached_property
    def writer(self) -> PartWriter:
        """Writes parts of this range. What others have written is named first: unnamed parts are of one writer."""
        if self.n_unnamed and self.replaces is None:
            self.save(self.manifest)
        return PartWriter(self.storage, self.identity, self.manifest.generation)

    def add_written(self) -> None:
        """Read what the writer has written since, as if the range were opened again."""
        written = {each.name: each.n_bytes for each in self.writer.files if each.name not in self.files.sizes}
        self.files.sizes.update(written)
        self.manifest = self._add(self.manifest, [*written])
        for name in ("all_rows", "rows", "_starts"):
            self.__dict__.pop(name, None)

    def discard(self, song_ids: Collection[int]) -> None:
        """Record that songs' rows were found damaged, so that the next fill embeds those songs again."""
        damaged = sorted({*self.manifest.damaged, *song_ids})
        self.save(replace(self.manifest, damaged=tuple(damaged), complete=None))

    def delete_garbage(self) -> None:
        """Remove files that nothing needs any more: the manifest that replaces them is durable."""
        for name in self.manifest.find_garbage(self.files.sizes) if self.files.manifest else ():
            self.storage.delete(f"{self.range.key}/{name}")
            del self.files.sizes[name]
        self.storage.delete_leftovers(self.range.key)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self._batches)], dtype=np.int64)[:-1]

    def _add(self, manifest: Manifest, names: Sequence[str]) -> Manifest:
        """A manifest with files adopted that are newer, their rows read."""
        files = [DataFile(name, self.files.sizes[name]) for name in names]
        n_before = len(self._batches)
        for each in files:
            self._open(each)
        return manifest.adopt(files, (int(song_id) for rows in self._batches[n_before:] for song_id in rows.song_ids))

    def _open(self, file: DataFile) -> None:
        key = f"{self.range.key}/{file.name}"
        name = self.storage.describe(key)
        try:
            content = self.storage.open(key)
            batches = open_part(content, self.identity, name)
            if content.size != file.n_bytes:
                raise DamagedPartError(f"it has {content.size:,} bytes, expected {file.n_bytes:,}", batches)
            self._batches += batches
        except FileNotFoundError:
            self.damaged[file.name] = "it is missing"
        except DamagedPartError as error:
            self.damaged[file.name] = str(error)
            self._batches += error.sound
