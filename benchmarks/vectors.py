"""Made-up vectors in a cache's shards, about as fast as the disk takes them: for benchmarks of what follows the cache.

A thousand rows of noise come again and again; a vector's first two values tell its song and version. They form no
clusters: no index built on them says anything about recall.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from songvec_assets.cache.shards import ModelCache, load_embeddings_from_cache, write_embeddings_to_file
from songvec_assets.cache.upkeep import compact_if_worth_it
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
    """Append songs of one range to its shard as a fill does, and compact it where that is worth it.

    Returns:
        Bytes written.
    """
    shard, _ = load_embeddings_from_cache(cache, song_range)
    n_bytes = shard.n_bytes
    for start in range(0, len(song_ids), _BATCH_ROWS):
        ids = song_ids[start : start + _BATCH_ROWS]
        hashes = [song_id.tobytes() + (version + 1).to_bytes(TEXT_HASH_BYTES - 4, "little") for song_id in ids]
        write_embeddings_to_file(shard, ids.tolist(), hashes, make_vectors(ids, cache.dimensions, version))
    n_written = shard.n_bytes - n_bytes
    return n_written + (shard.n_bytes if compact_if_worth_it(shard) else 0)


def fill_shards(cache: ModelCache, tiling: Tiling, n_songs: int) -> int:
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
