"""Rows of made-up vectors in one range of a cache, and what a reader finds there."""

import tempfile
import time
from pathlib import Path

import numpy as np

from songvec_assets.cache import completion
from songvec_assets.cache.manifest import Completion, Rejection
from songvec_assets.cache.model_cache import (
    ModelCache,
    read_embeddings_from_file,
    write_embeddings_to_file,
)
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage

RANGE = SongIdRange(0, 100)


FILLED = Completion("snapshot", "text", 0, 0, 0, "")


def new_cache(folder):
    return ModelCache(LocalStorage(Path(tempfile.mkdtemp(dir=folder))), "m", 3)


def vectors_of(song_ids, seed=0):
    return np.stack([np.random.default_rng((seed, song_id)).normal(size=3) for song_id in song_ids]).astype(np.float32)


def hashes_of(song_ids, seed=0):
    return [hash_text(f"{seed} {song_id}") for song_id in song_ids]


def put(cache, song_ids, seed=0, song_range=RANGE):
    """Store songs in a part of their own, as a fill that is killed afterwards."""
    write_embeddings_to_file(cache.open(song_range), song_ids, hashes_of(song_ids, seed), vectors_of(song_ids, seed))


def delete(cache, song_ids, at=None):
    cached = cache.open(RANGE)
    cached.save(cached.manifest.delete(song_ids, time.time() if at is None else at))


def reject(cache, song_ids, reason="refused"):
    cached = cache.open(RANGE)
    cached.save(cached.manifest.reject([Rejection(song_id, bytes(16), reason) for song_id in song_ids]))


def complete(cache, retention_s=0.0):
    completion.complete(cache.open(RANGE), FILLED, retention_s)


def names(cache):
    return sorted(path.name for path in (cache.storage.root / RANGE.key).iterdir())


def content_of(cached):
    """Vectors by song, by both ways of reading them, and reasons."""
    assert cached.rows["song_id"].to_list() == sorted({*cached.rows["song_id"]})
    assert cached.find_sound(cached.rows).equals(cached.rows)
    backwards = cached.rows.reverse()
    by_place = dict(zip(backwards["song_id"], map(bytes, cached.embeddings_at(backwards["row"])), strict=True))
    by_batch = {}
    for piece in read_embeddings_from_file(cached, cached.rows["row"]):
        assert piece.find_sound().all()
        by_batch |= dict(zip(piece.song_ids.tolist(), map(bytes, piece.embeddings), strict=True))
    assert by_batch == by_place
    return by_place | dict(cached.rejected.select("song_id", "reason").iter_rows())
