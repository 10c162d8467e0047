"""Forgetting songs: nothing of them is left in the cache, and nothing else is lost or paid for again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets.cache import completion
from songvec_assets.cache.model_cache import ModelCache, write_embeddings_to_file
from songvec_assets.errors import SettingsError, StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute
from songvec_assets_tests.cache.rows import RANGE, complete, content_of, delete, hashes_of, put, reject, vectors_of
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider


def stored_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


class TestOfARange:
    def test_files_and_manifest_lose_the_songs_and_keep_the_rest(self, cache: ModelCache) -> None:
        put(cache, [1, 2, 3], seed=1)
        put(cache, [1, 4])
        reject(cache, [5, 6])
        delete(cache, [1, 2])
        complete(cache, retention_s=60.0)
        before, done = content_of(cache.open(RANGE)), cache.read_manifest(RANGE).complete
        assert completion.erase(cache.open(RANGE), {1, 5, 77}) == 2, "its older vector, too"
        cached, stored = cache.open(RANGE), stored_bytes(cache.storage.root)
        assert content_of(cached) == {song_id: kept for song_id, kept in before.items() if song_id != 5}
        assert cached.deleted_rows(0.0)["song_id"].to_list() == [2]
        assert cached.manifest.complete == done, "songs that count did not change"
        assert vectors_of([1], 1).tobytes() not in stored
        assert vectors_of([1]).tobytes() not in stored
        assert hashes_of([1])[0] not in stored
        assert vectors_of([2], 1).tobytes() in stored

    def test_the_next_fill_counts_what_is_left_of_songs_that_were_not_deleted_yet(self, cache: ModelCache) -> None:
        put(cache, [1, 2])
        complete(cache)
        assert completion.erase(cache.open(RANGE), {1}) == 1
        assert cache.read_manifest(RANGE).complete is None
        assert cache.open(RANGE).rows["song_id"].to_list() == [2]
        assert completion.erase(cache.open(RANGE), {2}) == 1
        cached = cache.open(RANGE)
        assert (cached.manifest.files, cached.all_rows.height) == ((), 0)

    def test_songs_of_which_there_is_nothing_change_nothing(self, cache: ModelCache) -> None:
        put(cache, [1])
        complete(cache)
        before = stored_bytes(cache.storage.root)
        assert completion.erase(cache.open(RANGE), {2}) == 0
        assert stored_bytes(cache.storage.root) == before

    def test_while_songs_are_embedded_again_it_is_refused(self, cache: ModelCache) -> None:
        put(cache, [1, 2])
        delete(cache, [1])
        later = cache.open(RANGE, generation=1)
        write_embeddings_to_file(later, [1, 2], hashes_of([1, 2]), vectors_of([1, 2], 9))
        with pytest.raises(StoreError, match="embedded again") as raised:
            completion.erase(cache.open(RANGE), {1})
        assert raised.value.code == "cache.unfinished"


def test_a_song_is_forgotten_once_the_source_has_lost_it_and_the_rest_costs_nothing(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Road", "Bob", "dust"), (250, "Rain", "Cy", "drops"))
    with make_pipeline(database, provider, tmp_path) as pipeline:
        pipeline.run()
        vector = bytes(pipeline.embeddings([1])["embedding"].to_numpy())
        with pytest.raises(SettingsError, match="still had 1, 250 at the last export"):
            pipeline.forget([1, 250, 999])
        execute(database.url, "DELETE FROM songs WHERE id IN (1, 250)")
        pipeline.run()
        assert vector in stored_bytes(tmp_path / "embeddings")
        assert pipeline.forget([1, 250, 999]) == 2
        assert vector not in stored_bytes(tmp_path)
        assert pipeline.forget([1, 250, 999]) == 0
        report = pipeline.run()
        assert sum(each.n_embedded for each in report.embed) == 0
        assert pipeline.embeddings([1, 2, 250])["song_id"].to_list() == [2]
