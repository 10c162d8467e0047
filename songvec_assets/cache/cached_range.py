"""A range of the cache, as listed and as opened: its valid rows, their vectors, its writer and its manifest.

Of a song's rows the last one is valid, in the order of the files, unless the manifest says that it was rejected or
deleted. Many processes may read a range; only the holder of its lock writes. Embeddings are float32, (n, dimensions).
When to add here: another way to read cached rows. Keep out: file formats, and decisions of a fill or a load.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property, partial

import numpy as np
import polars as pl
import pyarrow as pa
from msgspec.structs import replace
from numpy.typing import NDArray

from songvec_assets.cache import manifest as manifests
from songvec_assets.cache.manifest import Completion, DataFile, Manifest
from songvec_assets.cache.parts import (
    PIECE_ROWS,
    CachedRows,
    DamagedPartError,
    PartIdentity,
    Rows,
    StoredRows,
    join_rows,
)
from songvec_assets.cache.slices import open_stored, read_ahead
from songvec_assets.cache.writing import PartWriter
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TEXT_HASH_BYTES
from songvec_assets.storage import Storage


@dataclass(frozen=True)
class RangeFiles:
    """The manifest and the file sizes of a range, read without opening a file with vectors.

    Attributes:
        manifest: the stored one; None if there is none or it does not parse.
        version: of the stored manifest.
        sizes: in bytes, of all files with vectors, by name.
        error: why the manifest does not parse.
    """

    manifest: Manifest | None = None
    version: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    error: StoreError | None = None

    @property
    def done(self) -> Completion | None:
        """The last fill, if it was complete and the folder has exactly its files, with their sizes."""
        manifest = self.manifest
        if manifest is None or manifest.find_unnamed(self.sizes) or manifest.find_garbage(self.sizes):
            return None
        is_whole = {each.name: each.n_bytes for each in manifest.files}.items() <= self.sizes.items()
        return manifest.complete if is_whole else None

    @property
    def generation(self) -> int:
        """The generation of the manifest; 0 if there is none."""
        return self.manifest.generation if self.manifest else 0

    @property
    def last_generation(self) -> int:
        """The highest generation of the files, complete or not."""
        return max(self.generation, *(manifests.generation_of(name) or 0 for name in self.sizes), 0)


@dataclass
class CachedRange:
    """A range in the state in which it was opened; the holder of the range's lock writes through it.

    Attributes:
        storage: of the model.
        identity: of the range and its model.
        files: its manifest and file sizes.
        replaces: for a later generation, the range that stays valid until this one is saved; see `ModelCache.open`.
        generation: for a later generation, its number.
        manifest: the stored manifest, updated by the parts that are newer.
        damaged: damaged or missing files, and what is wrong with each. Their intact rows are read.
        n_unnamed: files that the stored manifest does not name.
        had_damaged: songs with a damaged row, even if a newer part has another: that part may be lost in its turn.
    """

    storage: Storage
    identity: PartIdentity
    files: RangeFiles
    replaces: "CachedRange | None" = None
    generation: InitVar[int] = 0
    manifest: Manifest = field(init=False)
    damaged: dict[str, str] = field(default_factory=dict)
    n_unnamed: int = 0
    had_damaged: Collection[int] = ()
    _batches: list[StoredRows] = field(default_factory=list)
    _writer: PartWriter | None = None

    def __post_init__(self, generation: int) -> None:
        sizes, is_read = self.files.sizes, self.files.manifest is not None
        # without a manifest it is not known which generation is valid: if any is complete, it is the lowest
        lowest = min((manifests.generation_of(name) or 0 for name in sizes), default=0)
        manifest = self.files.manifest or Manifest(generation=lowest)
        if self.replaces is not None:
            manifest, is_read = self.replaces.manifest.begin_generation(generation), True
        self._open(manifest.files)
        self.had_damaged = manifest.damaged
        unnamed = manifest.find_unnamed(sizes, is_read)
        self.n_unnamed = len(unnamed)
        self.manifest = self._add(manifest, unnamed)

    @property
    def range(self) -> SongIdRange:
        """The range of song_ids."""
        return self.identity.range

    @property
    def folder(self) -> str:
        """Where its files are, for messages."""
        return self.storage.describe(self.range.key)

    @property
    def n_rows(self) -> int:
        """Rows of all files, including those that are no longer valid."""
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
        rows = join_rows(self._batches)
        hashes = pa.Array.from_buffers(pa.binary(TEXT_HASH_BYTES), len(rows), [None, pa.py_buffer(rows.text_hashes)])
        text_hash = pl.Series(hashes, dtype=pl.Binary)
        columns = {"song_id": rows.song_ids, "text_hash": text_hash, "checksum": rows.checksums}
        return pl.DataFrame(columns).with_columns(row=pl.int_range(pl.len()))

    @cached_property
    def rows(self) -> pl.DataFrame:
        """The songs that have a vector: the columns of `all_rows`, ordered by song_id. Reads no vector."""
        rejected = (each.song_id for each in self.manifest.rejected)
        without = [*rejected, *self.manifest.deleted_at, *self.manifest.damaged]
        return self.last_rows().filter(~pl.col("song_id").is_in(without))

    def deleted_rows(self, since_s: float) -> pl.DataFrame:
        """The last rows of songs deleted at this time or later; the columns of `all_rows`."""
        ids = [song_id for song_id, at in self.manifest.deleted_at.items() if at >= since_s]
        return self.last_rows().filter(pl.col("song_id").is_in(ids))

    def last_rows(self) -> pl.DataFrame:
        """Each song's last row, valid or not, ordered by song_id; the columns of `all_rows`."""
        ordered = self.all_rows.sort("song_id", maintain_order=True)
        return ordered.filter(pl.col("song_id").ne_missing(pl.col("song_id").shift(-1)))

    def find_sound(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of the rows whose vector is usable and matches its checksum. Reads the vectors."""
        sound = [pl.Series([], dtype=pl.Boolean)]
        for piece in rows.iter_slices(PIECE_ROWS):
            narrow, embeddings = Rows.of_frame(piece), self.embeddings_at(piece["row"])
            read = CachedRows(narrow.song_ids, narrow.text_hashes, narrow.checksums, embeddings)
            sound.append(pl.Series(read.find_sound()))
        return rows.filter(pl.concat(sound))

    def embeddings_at(self, rows: pl.Series | Sequence[int]) -> Float32Matrix:
        """The vectors of a few rows, by row number, in the given order."""
        wanted = np.asarray(rows, dtype=np.int64)
        embeddings = np.empty((len(wanted), self.identity.dimensions), dtype=np.float32)
        places = np.searchsorted(self._starts, wanted, side="right") - 1

        def read(place: int) -> None:
            here = places == place
            embeddings[here] = self._batches[place].vectors_at(wanted[here] - self._starts[place])

        # large batches one after the other: each may be read as a whole
        are_small = self.n_rows < self.n_batches * PIECE_ROWS // 4
        [*(self.storage.map if are_small else map)(read, np.unique(places).tolist())]
        return embeddings

    def iter_vectors(self, rows: pl.Series) -> Iterator[CachedRows]:
        """Read vectors, one stored batch at a time, in the order of the files; whole batches are not copied.

        Args:
            rows: row numbers.
        """
        return read_ahead(self._pick(np.sort(rows.to_numpy())))

    def _pick(self, wanted: NDArray[np.int64]) -> Iterator[Callable[[], CachedRows]]:
        for first, batch in zip(self._starts, self._batches, strict=True):
            begin, end = np.searchsorted(wanted, (first, first + len(batch)))
            if end - begin == len(batch):
                yield batch.load
            elif begin < end:  # picking rows copies
                yield partial(batch.take, wanted[begin:end] - first)

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
                f"{self.storage.describe(key)} was changed by another process while this one filled it: another run "
                "writes this range, because this one's lock was lost, as when the database restarts, or because two "
                "databases share the store. Start the same command again; what both have stored is kept",
                "store.lock-lost",
            )
        self.files = RangeFiles(manifest, version, self.files.sizes)
        self.manifest, self.replaces, self.n_unnamed = manifest, None, 0
        self.__dict__.pop("rows", None)

    def open_writer(self) -> PartWriter:
        """What writes parts of this range.

        The first call saves a manifest that names all existing parts, so that unnamed parts have a single writer.
        """
        if self._writer is None:
            if self.n_unnamed and self.replaces is None:
                self.save(self.manifest)
            self._writer = PartWriter(self.storage, self.identity, self.manifest.generation)
        return self._writer

    def add_written(self) -> None:
        """Read the parts written since, as if the range were opened again."""
        files = self._writer.files if self._writer else ()
        written = {each.name: each.n_bytes for each in files if each.name not in self.files.sizes}
        self.files.sizes.update(written)
        self.manifest = self._add(self.manifest, [*written])
        for name in ("all_rows", "rows", "_starts"):
            self.__dict__.pop(name, None)

    def discard(self, song_ids: Collection[int]) -> None:
        """Record that songs' rows are damaged, so that the next fill embeds these songs again."""
        damaged = sorted({*self.manifest.damaged, *song_ids})
        self.save(replace(self.manifest, damaged=tuple(damaged), complete=None))

    def delete_garbage(self) -> None:
        """Delete files that the durable manifest no longer needs."""
        garbage = self.manifest.find_garbage(self.files.sizes) if self.files.manifest else []
        if garbage:
            self.storage.delete(*(f"{self.range.key}/{name}" for name in garbage))
        for name in garbage:
            del self.files.sizes[name]
        self.storage.delete_leftovers(self.range.key)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self._batches)], dtype=np.int64)[:-1]

    def _add(self, manifest: Manifest, names: Sequence[str]) -> Manifest:
        """Read the rows of newer files, and return the manifest that adopts them."""
        files = [DataFile(name, self.files.sizes[name]) for name in names]
        n_before = len(self._batches)
        self._open(files)
        return manifest.adopt(files, (int(song_id) for rows in self._batches[n_before:] for song_id in rows.song_ids))

    def _open(self, files: Sequence[DataFile]) -> None:
        for each, (batches, problem) in zip(files, self.storage.map(self._read, files), strict=True):
            self._batches += batches
            if problem:
                self.damaged[each.name] = problem

    def _read(self, file: DataFile) -> tuple[Sequence[StoredRows], str]:
        """The intact rows of a file, and what is wrong with it."""
        key = f"{self.range.key}/{file.name}"
        try:
            content = self.storage.open(key)
            batches = open_stored(content, self.identity, self.storage.describe(key))
            if content.size != file.n_bytes:
                raise DamagedPartError(f"it has {content.size:,} bytes, expected {file.n_bytes:,}", batches)
        except FileNotFoundError:
            return [], "it is missing"
        except DamagedPartError as error:
            return error.sound, str(error)
        return batches, ""
