"""The tool that takes over a store in the format before parts and manifests.

`old_store` was written by that format's own code: two ranges of `a/model` with three values, a vector whose bits were
changed, rejections, deletions with and without a time, a song found damaged, and an end that a crash tore.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import hash_text
from songvec_assets.storage.local import LocalStorage

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[2] / "tools" / "import_old_cache.py"
FIRST, TAIL = SongIdRange(0, 100), SongIdRange(1_000, 2**31)


@pytest.fixture
def cache(tmp_path):
    shutil.copytree(Path(__file__).parent / "old_store", tmp_path / "embeddings")
    return ModelCache(LocalStorage(tmp_path / "embeddings" / "a--model-3"), "a/model", 3)


def take_over(cache):
    command = [sys.executable, str(TOOL), str(cache.storage.root.parents[1])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_copies_every_sound_vector_with_what_was_known_of_the_songs(cache):
    with pytest.raises(StoreError, match=r"earlier format .*tools/import_old_cache\.py"):
        cache.ranges()
    words = take_over(cache)
    assert "7 songs, 1 damaged rows left out" in words
    assert cache.ranges() == [FIRST, TAIL]
    cached = cache.open(FIRST)
    texts = {0: "0", 1: "1", 2: "2", 3: "3b", 4: "4b", 8: "8c", 30: "30"}
    assert dict(cached.rows.select("song_id", "text_hash").iter_rows()) == {
        song_id: hash_text(text) for song_id, text in texts.items()
    }
    assert cached.find_sound(cached.rows).equals(cached.rows)
    expected = np.float32([[song_id + 1, -song_id, 0.5] for song_id in texts])
    np.testing.assert_array_equal(cached.embeddings_at(cached.rows["row"]), expected)
    assert {song_id: reason for song_id, _, reason in cached.rejected.iter_rows()} == dict.fromkeys(
        [5, 20], "http://server refuses it"
    )
    assert sorted(cached.manifest.deleted_at) == [6, 7]
    assert all(at > 1_700_000_000 for at in cached.manifest.deleted_at.values())
    assert cached.manifest.damaged == (9,)
    assert cache.open(TAIL).rows["song_id"].to_list() == [1000]


def test_it_is_started_again_after_a_crash_and_does_nothing_twice(cache):
    take_over(cache)
    before = {path: path.read_bytes() for path in cache.storage.root.rglob("*") if path.is_file()}
    assert take_over(cache) == ""
    assert {path: path.read_bytes() for path in cache.storage.root.rglob("*") if path.is_file()} == before
    imported = cache.storage.root / f"{FIRST.key}.arrow.imported"
    imported.rename(imported.with_suffix(""))
    take_over(cache)
    assert cache.open(FIRST).rows.height == 7
