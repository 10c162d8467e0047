"""Made-up vectors in a cache, about as fast as the disk takes them: for benchmarks of what follows the cache.

A thousand rows of noise are repeated; a vector's first two values encode its song and version. They form no
clusters: no index built on them says anything about recall.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from songvec_assets.cache import completion
from songvec_assets.cache.manifest import Completion, is_base
from songvec_assets.cache.model_cache import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.text import TEXT_HASH_BYTES

MODEL = "made-up"
_BATCH_ROWS = 512
_N_NOISE = 1024


@cache
def _noise(dimensions: int) -> Float32Matrix:
    return np.random.default_rng(0).standard_normal((_N_NOISE, dimensions), dtype=np.float32)


def make_vectors(song_ids: NDArray[np.int32], dimensions: int, version: int = 0) -> Float32Matrix:
    """The vectors of songs, (n, dimensions); another version's differ."""
    vectors = _noise(dimensions)[song_ids % _N_NOISE]
    vectors[:, 0], vectors[:, 1] = song_ids, version + 1
    return vectors


def put_songs(cache: ModelCache, song_range: SongIdRange, song_ids: NDArray[np.int32], version: int = 0) -> int:
    """Store songs of one range as a fill does, its files merged if that is worth it.

    Returns:
        Bytes written.
    """
    cached, _ = load_embeddings_from_cache(cache, song_range)
    before = set(cached.files.sizes)
    for start in range(0, len(song_ids), _BATCH_ROWS):
        ids = song_ids[start : start + _BATCH_ROWS]
        hashes = [song_id.tobytes() + (version + 1).to_bytes(TEXT_HASH_BYTES - 4, "little") for song_id in ids]
        write_embeddings_to_file(cached, ids.tolist(), hashes, make_vectors(ids, cache.dimensions, version))
    n_written = sum(each.n_bytes for each in cached.open_writer().files)
    cached.add_written()
    completion.complete(cached, Completion(None, "", len(song_ids), 0, 0, "", 0, b""), 0.0)
    merged = [each.n_bytes for each in cached.manifest.files if is_base(each.name) and each.name not in before]
    return n_written + sum(merged)


def fill_ranges(cache: ModelCache, tiling: Tiling, n_songs: int) -> int:
    """Give the first songs, from song_id 0 on, their first vectors; bytes written."""
    return sum(put_songs(cache, song_range, song_ids) for song_range, song_ids in _tiles(tiling, n_songs))


def change_songs(cache: ModelCache, tiling: Tiling, n_songs: int, share: float, version: int) -> int:
    """Give a share of each range's songs, drawn by chance, a new version's vectors; bytes written."""
    n_bytes = 0
    for song_range, song_ids in _tiles(tiling, n_songs):
        draw = np.random.default_rng((version, song_range.start))
        changed = np.sort(draw.choice(song_ids, round(share * len(song_ids)), replace=False))
        n_bytes += put_songs(cache, song_range, changed, version)
    return n_bytes


def _tiles(tiling: Tiling, n_songs: int) -> Iterator[tuple[SongIdRange, NDArray[np.int32]]]:
    for song_range in tiling:
        if song_range.start >= n_songs:
            return
        yield song_range, np.arange(song_range.start, min(song_range.stop, n_songs), dtype=np.int32)
