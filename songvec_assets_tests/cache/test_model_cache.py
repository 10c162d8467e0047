"""A range's files and manifest: what was written is there, whatever is killed; of a song's rows the last one holds."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.cache.manifest import Manifest, digest_rows
from songvec_assets.cache.model_cache import (
    load_embeddings_from_cache,
    write_embeddings_to_file,
)
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.rows import RANGE, complete, content_of, delete, new_cache, put, reject, vectors_of

PROFILE = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For property tests: each example takes a new folder in it."""
    return tmp_path_factory.mktemp("caches")


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


def test_a_reader_whose_files_are_merged_meanwhile_keeps_them_and_one_that_opens_finds_the_new(cache, monkeypatch):
    put(cache, [1, 2])
    put(cache, [2, 3], 1)
    reader = cache.open(RANGE)
    expected = content_of(reader)
    read, merged = LocalStorage.read, []

    def read_then_merge(self, key):
        found = read(self, key)
        if not merged:
            merged.append(key)
            complete(cache)
        return found

    monkeypatch.setattr(LocalStorage, "read", read_then_merge)
    assert content_of(cache.open(RANGE)) == expected
    assert content_of(reader) == expected


def test_a_complete_range_says_what_it_holds_without_a_file_being_opened(cache, monkeypatch):
    put(cache, [1, 2])
    reject(cache, [3])
    complete(cache)
    rows = cache.open(RANGE).rows
    monkeypatch.setattr(LocalStorage, "open", None)
    done = cache.look(RANGE).done
    assert done is not None
    assert (done.n_vectors, done.digest) == (2, digest_rows(rows))


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
