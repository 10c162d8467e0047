"""Cached ranges of made-up vectors, and the table as an administrator sees it."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from songvec_assets.cache import completion
from songvec_assets.cache.manifest import Completion, Rejection
from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import ReportProgress, RunContext, StopSignal, ignore_progress
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.load import RangeLoad, upload_cached_embeddings_to_database
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute

DIMENSIONS = 8
SPEC = TableSpec("model-a", DIMENSIONS)
TILING = Tiling(width=100, stop=1_000)
FIRST, SECOND, TAIL = SongIdRange(0, 100), SongIdRange(100, 200), TILING.tail


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    """An empty cache of SPEC's model."""
    return ModelCache(LocalStorage(tmp_path / "embeddings"), SPEC.model, SPEC.dimensions)


def make_vector(song_id: int, version: int = 0, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """A unit vector that differs for each song and version."""
    vector = np.random.default_rng((song_id, version)).standard_normal(dimensions, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def put(cache: ModelCache, song_ids: Iterable[int], version: int = 0, tiling: Tiling = TILING) -> None:
    """Store songs' vectors of a version, each in its range."""
    by_range: dict[SongIdRange, list[int]] = {}
    for song_id in song_ids:
        by_range.setdefault(tiling.range_of(song_id), []).append(song_id)
    for song_range, ids in by_range.items():
        cached, _ = load_embeddings_from_cache(cache, song_range)
        hashes = [hash_text(f"{song_id} {version}") for song_id in ids]
        vectors = np.stack([make_vector(song_id, version, cache.dimensions) for song_id in ids])
        write_embeddings_to_file(cached, ids, hashes, vectors)


def forget(cache: ModelCache, song_ids: Iterable[int]) -> None:
    """Record that songs were deleted."""
    for song_id in song_ids:
        cached = cache.open(TILING.range_of(song_id))
        cached.save(cached.manifest.delete([song_id], time.time()))


def reject(cache: ModelCache, song_ids: Iterable[int], reason: str) -> None:
    """Record that the provider rejected songs of one range."""
    song_ids = list(song_ids)
    cached = cache.open(TILING.range_of(song_ids[0]))
    cached.save(cached.manifest.reject([Rejection(song_id, bytes(16), reason) for song_id in song_ids]))


def complete(cache: ModelCache, song_range: SongIdRange) -> None:
    """End a fill of a range."""
    cached = cache.open(song_range)
    n_songs = cached.rows.height
    completion.complete(cached, Completion("digest", "identity", n_songs, 0, 0, ""), 0.0)


def files_of(cache: ModelCache, song_range: SongIdRange) -> list[Path]:
    """The files of a range, in their order."""
    folder = cache.storage.root / song_range.key
    return [folder / each.name for each in cache.open(song_range).manifest.files]


def file_with(cache: ModelCache, song_id: int, version: int = 0) -> Path:
    """The file that holds a song's vector of a version."""
    vector = make_vector(song_id, version, cache.dimensions).tobytes()
    return next(path for path in files_of(cache, TILING.range_of(song_id)) if vector in path.read_bytes())


def damage(cache: ModelCache, song_id: int, version: int = 0) -> None:
    """Flip a bit in a song's stored vector."""
    path = file_with(cache, song_id, version)
    content = bytearray(path.read_bytes())
    content[content.index(make_vector(song_id, version, cache.dimensions).tobytes()) + 5] ^= 0x10
    path.write_bytes(content)


def source_of(cache: ModelCache, tiling: Tiling = TILING) -> LoadSource:
    """A cache with the snapshots beside it: none, unless a test writes some."""
    return LoadSource(cache, tiling, Snapshots(LocalStorage(cache.storage.root.parent / "songs")))


def load(database: Database, cache: ModelCache, spec: TableSpec = SPEC) -> dict[str, tuple[int, int, int]]:
    """Load the cache; each range's rows, rows written and rows deleted."""
    return reported(upload(database, cache, spec))


def upload(
    database: Database,
    cache: ModelCache,
    spec: TableSpec = SPEC,
    tiling: Tiling = TILING,
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
    **options: int,
) -> list[RangeLoad]:
    """Load the cache into the serving table."""
    run = RunContext(progress, stop or StopSignal())
    return upload_cached_embeddings_to_database(VectorTable(database), source_of(cache, tiling), spec, run, **options)


class CallingStop(StopSignal):
    """Calls something whenever a step asks whether to stop."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call

    def check(self) -> None:
        """Call, then check as usual."""
        self._call()
        super().check()


def reported(loads: Iterable[RangeLoad]) -> dict[str, tuple[int, int, int]]:
    """What loads report: rows, written and deleted, by range."""
    return {each.range.key: (each.n_rows, each.n_written, each.n_deleted) for each in loads}


def read_vectors(database: Database) -> dict[int, list[float]]:
    """The table's vectors."""
    rows = execute(database.adbc_uri, "SELECT song_id, embedding::text FROM song_embeddings")
    return {song_id: np.array(text[1:-1].split(","), dtype=np.float32).tolist() for song_id, text in rows}


def read_writers(database: Database) -> dict[int, str]:
    """The transaction that wrote each row."""
    return dict(execute(database.adbc_uri, "SELECT song_id, xmin::text FROM song_embeddings"))


def vectors_of(versions: Mapping[int, int] | Iterable[int]) -> dict[int, list[float]]:
    """The vectors that the table must hold: of songs in their version, or in the first one."""
    if not isinstance(versions, Mapping):
        versions = dict.fromkeys(versions, 0)
    return {song_id: make_vector(song_id, version).tolist() for song_id, version in versions.items()}


def assert_ledger_fits_table(database: Database) -> None:
    """Every ledger row names just the song_ids that the table holds in its range."""
    rows = execute(database.adbc_uri, "SELECT range_start, range_stop, n_songs, song_ids FROM songvec.loaded_ranges")
    in_table = sorted(song_id for (song_id,) in execute(database.adbc_uri, "SELECT song_id FROM song_embeddings"))
    for start, stop, n_songs, song_ids in rows:
        held = [song_id for song_id in in_table if start <= song_id < stop]
        assert sorted(np.frombuffer(song_ids, dtype="<i4").tolist()) == held
        assert n_songs == len(held)
