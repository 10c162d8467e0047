"""The end of a fill: which files are merged, and that no merge loses or blesses anything."""

import time

import numpy as np
import pytest

from songvec_assets.cache import completion
from songvec_assets.cache.manifest import is_base
from songvec_assets.cache.model_cache import (
    ModelCache,
    write_embeddings_to_file,
)
from songvec_assets.cache.parts import SMALL_ROWS, CachedRows
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.kills import KilledError, killed_after
from songvec_assets_tests.cache.rows import (
    FILLED,
    RANGE,
    complete,
    content_of,
    delete,
    hashes_of,
    names,
    put,
    reject,
    vectors_of,
)


@pytest.mark.parametrize("survives", range(12))
def test_a_death_before_any_write_or_removal_of_a_merge_loses_nothing(cache, survives):
    for seed in range(4):
        put(cache, [1, 2, 3 + seed], seed)
    delete(cache, [4])
    reject(cache, [5])
    expected = content_of(cache.open(RANGE))
    with killed_after(survives, ("write", "put_if_unchanged", "_remove")):
        try:
            complete(cache, retention_s=60.0)
        except KilledError:
            pass
        else:
            assert survives > 5, "every moment of the merge was one to die at"
    assert content_of(cache.open(RANGE)) == expected
    complete(cache, retention_s=60.0)
    assert content_of(cache.open(RANGE)) == expected
    assert cache.open(RANGE).deleted_rows(0.0)["song_id"].to_list() == [4]
    assert [name.rpartition("-")[2] for name in names(cache)] == ["base.arrow", "manifest.json"]


def test_a_damaged_row_that_was_embedded_again_is_not_kept(cache):
    put(cache, range(1, 9))
    complete(cache)
    [base] = [cache.storage.root / RANGE.key / name for name in names(cache) if name.endswith("arrow")]
    content, vector = bytearray(base.read_bytes()), vectors_of([5]).tobytes()
    content[content.index(vector)] ^= 1
    base.write_bytes(content)
    cache.open(RANGE).discard([5])
    put(cache, [5])
    complete(cache)
    opened = cache.open(RANGE)
    assert opened.find_sound(opened.all_rows)["song_id"].to_list() == opened.all_rows["song_id"].to_list()
    assert sorted(opened.all_rows["song_id"]) == list(range(1, 9))


def test_many_small_parts_are_merged_and_a_few_beside_a_base_are_not(tmp_path):
    cache = ModelCache(LocalStorage(tmp_path), "m", 2_000)

    def put_each(song_ids):
        for song_id in song_ids:
            write_embeddings_to_file(cache.open(RANGE), [song_id], [bytes(16)], np.ones((1, 2_000), np.float32))
        complete(cache)
        return [is_base(each.name) for each in cache.read_manifest(RANGE).files]

    assert put_each(range(60)) == [True]
    assert put_each([60]) == [True, False]
    assert put_each(range(64)) == [True]
    assert cache.open(RANGE).rows.height == 64


@pytest.mark.parametrize(("n_parts", "n_rows"), [(2, 2_000), (100, SMALL_ROWS)])
def test_parts_that_are_not_small_are_not_written_twice(cache, n_parts, n_rows):
    wide = SongIdRange(0, 100_000)
    writer = cache.open(wide).open_writer()
    for start in range(0, n_parts * n_rows, n_rows):
        song_ids = list(range(start, start + n_rows))
        writer.write([CachedRows.of(song_ids, hashes_of(song_ids), np.ones((n_rows, 3), np.float32))])
    completion.complete(cache.open(wide), FILLED, 0.0)
    assert [is_base(each.name) for each in cache.read_manifest(wide).files] == [False] * n_parts


def test_older_texts_serve_again_until_over_a_fifth_of_the_rows_is_dead(cache):
    put(cache, range(10))
    put(cache, [0, 1], 1)
    complete(cache)
    assert cache.open(RANGE).n_rows == 12
    put(cache, [2, 3], 1)
    complete(cache)
    assert cache.open(RANGE).n_rows == 10


def test_vectors_of_deleted_songs_outlive_merges_within_the_retention_time(cache):
    put(cache, range(10))
    delete(cache, range(5), at=time.time() - 100)
    put(cache, [20])
    complete(cache, retention_s=200.0)
    cached = cache.open(RANGE)
    assert cached.rows["song_id"].to_list() == [*range(5, 10), 20]
    kept = cached.deleted_rows(0.0)
    assert kept["song_id"].to_list() == list(range(5)) == sorted(cached.manifest.deleted_at)
    assert cached.find_sound(kept).height == 5
    put(cache, [21])
    complete(cache, retention_s=50.0)
    assert cache.open(RANGE).all_rows["song_id"].to_list() == [*range(5, 10), 20, 21]
    assert cache.read_manifest(RANGE).deleted_at == {}


def test_a_merge_does_not_bless_what_a_disk_changed(cache):
    """A checksum computed over a damaged vector would never find it."""
    put(cache, [1, 2])
    put(cache, [3])
    cached = cache.open(RANGE)
    path = cache.storage.root / RANGE.key / cached.manifest.files[0].name
    content, vector = bytearray(path.read_bytes()), vectors_of([2]).tobytes()
    content[content.index(vector) + 5] ^= 1
    path.write_bytes(content)
    complete(cache)
    cached = cache.open(RANGE)
    assert (is_base(cached.manifest.files[0].name), cached.damaged) == (True, {})
    assert cached.find_sound(cached.rows)["song_id"].to_list() == [1, 3]


def test_a_merge_of_many_pieces_keeps_every_vector_with_its_song(cache):
    """More rows than one batch holds, in an order that is not the song_ids'."""
    wide = SongIdRange(0, 10_000)
    song_ids = np.random.default_rng(0).permutation(5_000)
    embeddings = np.stack([song_ids + 1, song_ids * 2, song_ids % 7], axis=1).astype(np.float32)
    for start in range(0, 5_000, 200):
        ids = song_ids[start : start + 200].tolist()
        write_embeddings_to_file(cache.open(wide), ids, hashes_of(ids), embeddings[start : start + 200])
    cached = cache.open(wide)
    completion.complete(cached, FILLED, 0.0)
    cached = cache.open(wide)
    assert len(cached.manifest.files) == 1
    found = {}
    for rows in cached.iter_vectors(cached.rows["row"]):
        assert not rows.embeddings.flags.owndata, "whole batches are not copied"
        found |= dict(zip(rows.song_ids.tolist(), rows.embeddings.tolist(), strict=True))
    assert found == {each: [each + 1.0, each * 2.0, each % 7] for each in range(5_000)}
    assert list(found) == list(range(5_000)), "a base is ordered by song_id"
