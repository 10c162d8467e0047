"""The cache of one model: a folder per range, with the vectors that were paid for.

A folder holds parts and bases (`parts`), which are never changed, and the manifest that names them (`manifest`).
When to add here: another question about a model's ranges. Keep out: a range's rows (`cached_range`), and file formats
(`parts`, `manifest`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl
import xxhash

from songvec_assets.cache import manifest as manifests
from songvec_assets.cache.cached_range import CachedRange, RangeFiles
from songvec_assets.cache.manifest import Completion, Manifest
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows, PartIdentity, read_identity
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import StoreError, describe
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage import Storage

_TRIES = 5
"""How often opening a range is tried if a merge replaces its files meanwhile."""


@dataclass(frozen=True)
class ModelCache:
    """All that is cached of a model.

    Attributes:
        storage: of this model alone; need not exist yet.
        model: the model id.
        dimensions: values per vector.
    """

    storage: Storage
    model: str
    dimensions: int

    def identity(self, song_range: SongIdRange) -> PartIdentity:
        """The identity of a range's files."""
        return PartIdentity(self.model, self.dimensions, song_range)

    def ranges(self) -> list[SongIdRange]:
        """The ranges that have a folder, in order.

        Raises:
            StoreError: a folder has another name, or there are files of an earlier format.
        """
        listed = self.storage.scan()
        old = [name for name in listed.objects if name.endswith(".arrow")]
        if old:
            raise StoreError(
                f"{self.storage} holds {len(old):,} files of an earlier format ({old[0]}, …): copy what they hold with "
                "`python tools/import_old_cache.py STORAGE_FOLDER`, which pays nothing, then start the same command "
                "again",
                "store.other-version",
            )
        try:
            return sorted(SongIdRange.from_key(name) for name in listed.prefixes)
        except ValueError as error:
            raise StoreError(
                f"a folder that is not ours lies in {self.storage}: {error}; move it away", "store.foreign-file"
            ) from error

    def read_manifest(self, song_range: SongIdRange) -> Manifest:
        """The manifest of a range; an empty one if the range was never filled.

        Raises:
            StoreError: it does not parse.
        """
        key = manifests.key_of(song_range)
        read = self.storage.read(key)
        name, identity = self.storage.describe(key), self.identity(song_range)
        return manifests.decode(read.content, name, identity) if read else Manifest()

    def look_all(self, ranges: Sequence[SongIdRange]) -> dict[SongIdRange, RangeFiles]:
        """`look` at each of some ranges."""
        return dict(zip(ranges, self.storage.map(self.look, ranges), strict=True))

    def look(self, song_range: SongIdRange) -> RangeFiles:
        """The manifest and the file sizes of a range: one read and one listing."""
        key = manifests.key_of(song_range)
        read = self.storage.read(key)
        manifest = error = None
        try:
            if read:
                manifest = manifests.decode(read.content, self.storage.describe(key), self.identity(song_range))
        except StoreError as caught:
            error = caught
        objects = self.storage.scan(song_range.key).objects
        sizes = {name: size for name, size in objects.items() if manifests.generation_of(name) is not None}
        return RangeFiles(manifest, read.version if read else None, sizes, error)

    def open(self, song_range: SongIdRange, generation: int | None = None) -> CachedRange:
        """Open a range in its current state.

        Args:
            generation: a later one than the range has: only its files are read, and when it is saved, it replaces the
                earlier one. None: the current generation.

        Raises:
            StoreError: its manifest does not parse, or a file is of another model, size or range.
        """
        identity = self.identity(song_range)
        for tries_left in reversed(range(_TRIES)):
            files = self.look(song_range)
            if files.error:
                raise files.error
            opened = CachedRange(self.storage, identity, files)
            if not opened.damaged or not tries_left or self.look(song_range).version == files.version:
                break
        return opened if generation is None else CachedRange(self.storage, identity, files, opened, generation)

    def open_as_found(self, song_range: SongIdRange) -> CachedRange:
        """As `open`, with the model that its files name: it does not follow from a folder's name."""
        key = manifests.key_of(song_range)
        read = self.storage.read(key)
        found = manifests.decode(read.content, self.storage.describe(key)).identity if read else None
        for name in () if found else self.look(song_range).sizes:
            found = found or read_identity(self.storage.open(f"{song_range.key}/{name}").file())
        cache = ModelCache(self.storage, found.model_id, found.dimensions) if found else self
        return cache.open(song_range)

    def summarize(self, song_range: SongIdRange, opens_files: bool = False) -> "RangeSummary":
        """Summarize what is cached of a range.

        Args:
            opens_files: whether to open the files, which finds damage to all but vectors, even if the last fill was
                complete and their sizes are unchanged.
        """
        try:
            done = None if opens_files else self.look(song_range).done
            if done is not None:
                return RangeSummary(done.n_vectors, done.digest, IdSums(*done.ids), done)
            opened = self.open(song_range)
        except StoreError as error:
            return RangeSummary(error=describe(error))
        rows, is_damaged = opened.rows, bool(opened.damaged)
        return RangeSummary(rows.height, manifests.digest_rows(rows), IdSums.of(rows["song_id"]), None, is_damaged)

    def digest(self) -> str:
        """A digest of all that is cached; opens no file with vectors."""
        state = xxhash.xxh3_128(f"{self.model} {self.dimensions}".encode())
        for song_range, files in self.look_all(self.ranges()).items():
            names = [] if files.manifest and files.manifest.complete else sorted(files.sizes)
            state.update(f"{song_range.key} {files.version} {names}\n".encode())
        return state.hexdigest()


@dataclass(frozen=True)
class RangeSummary:
    """A summary of what is cached of a range: by its last fill if that was complete, else by the rows of its files.

    Attributes:
        n_vectors: songs with a vector.
        digest: of their song_ids and checksums.
        ids: of their song_ids alone.
        complete: the last fill, if it was complete and its files are unchanged.
        is_damaged: whether a file is damaged, even if all its rows could be read.
        error: why the range cannot be read; empty if it can.
    """

    n_vectors: int = 0
    digest: bytes = b""
    ids: IdSums = field(default_factory=IdSums)
    complete: Completion | None = None
    is_damaged: bool = False
    error: str = ""


def load_embeddings_from_cache(cache: ModelCache, song_range: SongIdRange) -> tuple[CachedRange, pl.DataFrame]:
    """Open a range; returns it and its `rows`."""
    opened = cache.open(song_range)
    return opened, opened.rows


def write_embeddings_to_file(
    cached: CachedRange, song_ids: Sequence[int], text_hashes: Sequence[bytes], embeddings: Float32Matrix
) -> None:
    """Write songs with their vectors as one part of a range; it is durable when this returns.

    Raises:
        ValueError: a vector is zero, not finite, or of another size: nothing is written.
    """
    if len(embeddings) != len(song_ids):
        raise ValueError(f"expected {len(song_ids)} vectors, got {len(embeddings)}")
    if len(song_ids):
        cached.open_writer().write([CachedRows.of(song_ids, text_hashes, embeddings)])


def copy_vectors(source: CachedRange, rows: pl.DataFrame, cached: CachedRange) -> None:
    """Write vectors of a range as parts of a range, the same or another; they are durable when this returns.

    Args:
        source: the range that has them.
        rows: song_id and text_hash to write, and the row number in `source`.
        cached: the range to write.
    """
    for piece in rows.iter_slices(PIECE_ROWS):
        embeddings = source.embeddings_at(piece["row"])
        write_embeddings_to_file(cached, piece["song_id"].to_list(), piece["text_hash"].to_list(), embeddings)


def read_embeddings_from_file(cached: CachedRange, rows: pl.Series) -> Iterator[CachedRows]:
    """Read vectors of a range; see `CachedRange.iter_vectors`."""
    return cached.iter_vectors(rows)


def lock_name(song_range: SongIdRange) -> str:
    """The name of the lock that a process holds to write a range."""
    return f"fill {song_range.key}"
