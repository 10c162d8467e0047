"""A range's files and manifest: what was written is there, whatever is killed; of a song's rows the last one holds."""

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.cache import upkeep
from songvec_assets.cache.manifest import Completion, Manifest, Rejection
from songvec_assets.cache.model_cache import (
    ModelCache,
    load_embeddings_from_cache,
    read_embeddings_from_file,
    write_embeddings_to_file,
)
from songvec_assets.cache.parts import CachedRows
from songvec_assets.cache.writing import PartWriter
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import hash_text
from songvec_assets.storage import Storage

RANGE = SongIdRange(0, 100)
FILLED = Completion("snapshot", "text", 0, 0, 0, "", 0, b"")
PROFILE = settings(deadline=None, max_examples=40)


@pytest.fixture
def cache(tmp_path):
    return ModelCache(Storage(tmp_path / "m-3"), "m", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For property tests: each example takes a new folder in it."""
    return tmp_path_factory.mktemp("caches")


def new_cache(folder):
    return ModelCache(Storage(Path(tempfile.mkdtemp(dir=folder))), "m", 3)


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
    upkeep.complete(cache.open(RANGE), FILLED, retention_s)


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


@dataclass
class Expected:
    """What a reader must find."""

    held: dict[int, bytes | str] = field(default_factory=dict)

    def apply(self, cache, step):
        kind, song_ids, seed = step
        song_ids = sorted({*song_ids})
        if kind == "put":
            put(cache, song_ids, seed)
            self.held |= dict(zip(song_ids, map(bytes, vectors_of(song_ids, seed)), strict=True))
        elif kind == "reject":
            reject(cache, song_ids, f"refused, grund {seed} ü")
            self.held |= dict.fromkeys(song_ids, f"refused, grund {seed} ü")
        elif kind == "complete":
            complete(cache, retention_s=float(seed))
        else:
            if kind == "delete":
                delete(cache, song_ids)
            else:
                cache.open(RANGE).discard(song_ids)
            gone = [each for each in song_ids if kind == "delete" or not isinstance(self.held.get(each), str)]
            for song_id in gone:
                self.held.pop(song_id, None)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "reject", "delete", "discard", "complete"]),
        st.lists(st.integers(0, 9), min_size=1, max_size=5),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=8,
)


@PROFILE
@given(steps=STEPS)
def test_after_any_steps_the_last_word_on_a_song_holds(folder, steps):
    cache, expected = new_cache(folder), Expected()
    for step in steps:
        expected.apply(cache, step)
        assert content_of(cache.open(RANGE)) == expected.held
    complete(cache)
    assert content_of(cache.open(RANGE)) == expected.held
    assert cache.look(RANGE).done is not None


class KilledError(BaseException):
    """Where the process ends."""


@pytest.mark.parametrize("survives", range(12))
def test_a_death_before_any_write_or_removal_of_a_merge_loses_nothing(cache, monkeypatch, survives):
    for seed in range(4):
        put(cache, [1, 2, 3 + seed], seed)
    delete(cache, [4])
    reject(cache, [5])
    expected, n_left = content_of(cache.open(RANGE)), survives

    def or_die(do):
        def step(self, *given):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise KilledError
            return do(self, *given)

        return step

    with monkeypatch.context() as dying:
        for name in ("write", "put_if_unchanged", "delete"):
            dying.setattr(Storage, name, or_die(getattr(Storage, name)))
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


def test_a_reader_whose_files_are_merged_meanwhile_keeps_them_and_one_that_opens_finds_the_new(cache, monkeypatch):
    put(cache, [1, 2])
    put(cache, [2, 3], 1)
    reader = cache.open(RANGE)
    expected = content_of(reader)
    read, merged = Storage.read, []

    def read_then_merge(self, key):
        found = read(self, key)
        if not merged:
            merged.append(key)
            complete(cache)
        return found

    monkeypatch.setattr(Storage, "read", read_then_merge)
    assert content_of(cache.open(RANGE)) == expected
    assert content_of(reader) == expected


def test_of_two_writers_of_one_version_of_a_range_one_is_told(cache):
    """As when the database that holds the lock restarts: two runs fill one range."""
    put(cache, [1])
    one, other = cache.open(RANGE), cache.open(RANGE)
    write_embeddings_to_file(one, [2], hashes_of([2]), vectors_of([2]))
    with pytest.raises(StoreError, match="changed by another process"):
        write_embeddings_to_file(other, [3], hashes_of([3]), vectors_of([3]))
    assert sorted(content_of(cache.open(RANGE))) == [1, 2]


def test_what_two_writers_have_stored_is_kept(cache):
    one, other = cache.open(RANGE), cache.open(RANGE)
    for cached, song_id in ((one, 1), (other, 2)):
        write_embeddings_to_file(cached, [song_id], hashes_of([song_id]), vectors_of([song_id]))
    complete(cache)
    assert sorted(content_of(cache.open(RANGE))) == [1, 2]


def test_a_complete_range_says_what_it_holds_without_a_file_being_opened(cache, monkeypatch):
    put(cache, [1, 2])
    reject(cache, [3])
    complete(cache)
    rows = cache.open(RANGE).rows
    monkeypatch.setattr(Storage, "open", None)
    done = cache.look(RANGE).done
    assert done is not None
    assert (done.n_vectors, done.digest) == (2, upkeep.digest_rows(rows))


def test_it_is_no_longer_complete_when_anything_is_written_or_lost(cache):
    put(cache, [1, 2])
    complete(cache)
    before = cache.digest()
    put(cache, [3])
    assert cache.look(RANGE).done is None
    complete(cache)
    assert cache.digest() != before
    cache.open(RANGE).discard([1])
    assert cache.look(RANGE).done is None
    complete(cache)
    (cache.storage.root / RANGE.key / cache.read_manifest(RANGE).files[0].name).unlink()
    assert cache.look(RANGE).done is None


def test_many_small_parts_are_merged_and_a_few_beside_a_base_are_not(tmp_path):
    cache = ModelCache(Storage(tmp_path), "m", 2_000)

    def put_each(song_ids):
        for song_id in song_ids:
            write_embeddings_to_file(cache.open(RANGE), [song_id], [bytes(16)], np.ones((1, 2_000), np.float32))
        complete(cache)
        return [each.is_base for each in cache.read_manifest(RANGE).files]

    assert put_each(range(60)) == [True]
    assert put_each([60]) == [True, False]
    assert put_each(range(64)) == [True]
    assert cache.open(RANGE).rows.height == 64


def test_a_few_large_parts_are_not_written_twice(cache):
    wide = SongIdRange(0, 10_000)
    for start in (0, 2_000):
        song_ids = list(range(start, start + 2_000))
        write_embeddings_to_file(cache.open(wide), song_ids, hashes_of(song_ids), np.ones((2_000, 3), np.float32))
    upkeep.complete(cache.open(wide), FILLED, 0.0)
    assert [each.is_base for each in cache.read_manifest(wide).files] == [False, False]


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


def test_a_song_that_came_back_is_not_deleted_any_more(cache):
    put(cache, range(3))
    delete(cache, [0, 1])
    put(cache, [0], 9)
    assert sorted(content_of(cache.open(RANGE))) == [0, 2]
    assert [*cache.open(RANGE).manifest.deleted_at] == [1]


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
    assert (cached.manifest.files[0].is_base, cached.damaged) == (True, {})
    assert cached.find_sound(cached.rows)["song_id"].to_list() == [1, 3]


def test_a_merge_of_many_pieces_keeps_every_vector_with_its_song(cache):
    """More rows than one batch holds, in an order that is not the song_ids'."""
    wide = SongIdRange(0, 10_000)
    song_ids = np.random.default_rng(0).permutation(5_000)
    embeddings = np.stack([song_ids + 1, song_ids * 2, song_ids % 7], axis=1).astype(np.float32)
    for start in range(0, 5_000, 500):
        ids = song_ids[start : start + 500].tolist()
        write_embeddings_to_file(cache.open(wide), ids, hashes_of(ids), embeddings[start : start + 500])
    cached = cache.open(wide)
    upkeep.complete(cached, FILLED, 0.0)
    cached = cache.open(wide)
    assert len(cached.manifest.files) == 1
    found = {}
    for rows in cached.iter_vectors(cached.rows["row"]):
        assert not rows.embeddings.flags.owndata, "whole batches are not copied"
        found |= dict(zip(rows.song_ids.tolist(), rows.embeddings.tolist(), strict=True))
    assert found == {each: [each + 1.0, each * 2.0, each % 7] for each in range(5_000)}
    assert list(found) == list(range(5_000)), "a base is ordered by song_id"


def test_reading_some_rows_gives_those_and_no_others(cache):
    put(cache, [1, 2, 3])
    put(cache, [4, 5])
    cached = cache.open(RANGE)
    wanted = cached.rows.filter(pl.col("song_id").is_in([2, 4, 5]))["row"]
    assert [rows.song_ids.tolist() for rows in cached.iter_vectors(wanted)] == [[2], [4, 5]]
    np.testing.assert_array_equal(cached.embeddings_at(wanted.reverse()), vectors_of([5, 4, 2]))
    assert list(cached.iter_vectors(wanted.head(0))) == []


def test_small_parts_of_one_writer_become_one(cache):
    writer = cache.open(RANGE).writer
    for song_id in range(64):
        writer.write([CachedRows.of([song_id], hashes_of([song_id]), vectors_of([song_id]))])
    assert len(names(cache)) == len(writer.files) == 1
    assert sorted(content_of(cache.open(RANGE))) == list(range(64))


def test_without_its_manifest_a_range_still_has_its_vectors(cache):
    put(cache, range(10))
    put(cache, [3], 1)
    complete(cache)
    put(cache, [4], 1)
    expected = content_of(cache.open(RANGE))
    (cache.storage.root / RANGE.key / "manifest.json").unlink()
    assert content_of(cache.open(RANGE)) == expected
    complete(cache)
    assert content_of(cache.open(RANGE)) == expected


@pytest.mark.parametrize(
    "embeddings",
    [
        np.ones((2, 4), np.float32),
        np.ones((1, 3), np.float32),
        np.float32([[1, 1, 1], [0, 0, 0]]),
        np.float32([[1, 1, 1], [1, np.nan, 1]]),
        np.float32([[np.inf, 1, 1], [1, 1, 1]]),
    ],
)
def test_vectors_that_no_search_could_use_are_refused_before_anything_is_written(cache, embeddings):
    with pytest.raises(ValueError, match=r"expected (2 vectors|finite vectors .* shape \(2, 3\))"):
        write_embeddings_to_file(cache.open(RANGE), [1, 2], [bytes(16)] * 2, embeddings)
    assert cache.ranges() == []


def test_no_rows_are_no_write(cache):
    write_embeddings_to_file(cache.open(RANGE), [], [], np.empty((0, 3), np.float32))
    assert not cache.storage.root.exists()


def test_a_write_that_the_disk_refuses_is_told_and_the_next_one_goes_on(cache, monkeypatch):
    put(cache, [1, 2])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StoreError, match=r"No space left.*make room"):
            put(cache, [3])
    put(cache, [3])
    assert sorted(content_of(cache.open(RANGE))) == [1, 2, 3]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_part_is_whole_and_synced_before_a_write_returns(cache, monkeypatch):
    """Looks at fsync itself: no test can cut the power."""
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)))

    monkeypatch.setattr(os, "fsync", fsync)
    put(cache, [1, 2])
    (_, written), (folder, _) = synced
    (path,) = (cache.storage.root / RANGE.key).iterdir()
    assert (written.st_ino, written.st_size) == (path.stat().st_ino, path.stat().st_size)
    assert folder == path.parent, "a new file's name must be on disk too"


def test_a_range_without_a_folder_holds_nothing(cache):
    cached, rows = load_embeddings_from_cache(cache, RANGE)
    assert rows.is_empty()
    assert rows.columns == ["song_id", "text_hash", "checksum", "row"]
    assert (cached.damaged, cached.manifest, cache.ranges()) == ({}, Manifest(), [])
    assert cache.read_manifest(RANGE) == Manifest()
    assert not cache.storage.root.exists()


def test_a_model_cache_knows_its_ranges_in_their_order(cache):
    ranges = [RANGE, SongIdRange(100, 200), SongIdRange(1000, 2**31)]
    for song_range in reversed(ranges):
        put(cache, [song_range.start], song_range=song_range)
    assert cache.ranges() == ranges
    assert cache.open(ranges[2]).rows["song_id"].to_list() == [1000]
    (cache.storage.root / "mine").mkdir()
    with pytest.raises(StoreError, match=r"not ours lies in .*move it away"):
        cache.ranges()


def test_files_of_the_format_before_are_refused_with_the_name_of_the_tool(cache):
    cache.storage.put(f"{RANGE.key}.arrow", b"rows")
    with pytest.raises(StoreError, match=r"1 files of an earlier format .*tools/import_old_cache\.py"):
        cache.ranges()


def test_a_later_generation_is_apart_from_what_holds_until_it_is_complete(cache):
    put(cache, [1, 2, 3])
    expected = content_of(cache.open(RANGE))
    write_embeddings_to_file(cache.open(RANGE, 5), [1, 2], hashes_of([1, 2]), vectors_of([1, 2], 7))
    assert content_of(cache.open(RANGE)) == expected
    assert sorted(content_of(cache.open(RANGE, 5))) == [1, 2]
    complete(cache)
    assert content_of(cache.open(RANGE)) == expected
    assert cache.look(RANGE).done is not None
    later = cache.open(RANGE, 5)
    assert later.rows["song_id"].to_list() == [1, 2], "another fill keeps them"
    upkeep.complete(later, FILLED, 0.0)
    assert content_of(cache.open(RANGE)) == dict(zip([1, 2], map(bytes, vectors_of([1, 2], 7)), strict=True))
    assert {name.split("-")[0] for name in names(cache)} == {"5", "manifest.json"}


def test_a_later_generation_keeps_the_vectors_of_deleted_songs_and_not_of_those_that_came_back(cache):
    put(cache, [1, 2, 3])
    delete(cache, [1, 2])
    later = cache.open(RANGE, 1)
    write_embeddings_to_file(later, [1, 3], hashes_of([1, 3]), vectors_of([1, 3], 7))
    upkeep.complete(later, FILLED, 60.0)
    cached = cache.open(RANGE)
    assert content_of(cached) == dict(zip([1, 3], map(bytes, vectors_of([1, 3], 7)), strict=True))
    assert cached.deleted_rows(0.0)["song_id"].to_list() == [2]
    assert bytes(cached.embeddings_at(cached.deleted_rows(0.0)["row"])[0]) == bytes(vectors_of([2])[0])


def test_a_writer_names_its_files_after_their_generation(cache):
    writer = PartWriter(cache.storage, cache.identity(RANGE), 3)
    writer.write([CachedRows.of([1], hashes_of([1]), vectors_of([1]))])
    assert writer.files[0].name.startswith("3-")
    assert writer.files[0].n_bytes == cache.look(RANGE).sizes[writer.files[0].name]
