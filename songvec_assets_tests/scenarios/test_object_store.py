"""A catalogue whose store is a bucket: the whole graph, what it costs in requests, and two writers without a lock."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from songvec_assets.cache.manifest import Completion
from songvec_assets.cache.model_cache import ModelCache, write_embeddings_to_file
from songvec_assets.errors import StorageError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.storage import open_storage
from songvec_assets_tests.administration import execute
from songvec_assets_tests.cache.filling import assert_stored, billed, fill, plain_songs, plain_texts
from songvec_assets_tests.cache.rows import RANGE, hashes_of, vectors_of
from songvec_assets_tests.conftest import TILING, make_pipeline
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.s3 import S3

Songs = Callable[..., None]


def test_a_catalogue_goes_from_songs_to_hits_and_a_rerun_writes_nothing(
    songs: Songs, database: Database, provider: Provider, s3: S3, bucket: str
) -> None:
    songs(*plain_songs(range(1, 80)), *plain_songs(range(1000, 1030)))
    first = make_pipeline(database, provider, bucket)
    report = first.run()
    assert [each.n_embedded for each in report.embed] == [79, 30]
    assert first.search("Song 000005", 1)
    s3.requests()
    make_pipeline(database, provider, bucket).run()
    assert {*s3.count()} <= {"GET", "HEAD", "LIST"}
    songs((5, "Another", "Ann", "la"))
    execute(database.url, "DELETE FROM songs WHERE id = 7")
    [changed] = [each for each in make_pipeline(database, provider, bucket).run().embed if each.n_embedded]
    assert (changed.n_embedded, changed.n_deleted, changed.n_unchanged) == (1, 1, 77)
    # the tail is divided
    again = make_pipeline(database, provider, bucket, song_id_stop=1_300).run()
    assert [(each.range.start, each.n_embedded) for each in again.embed] == [(0, 0), (1000, 0)]
    assert sum(each.n_rows for each in again.load.loads) == 108


def test_requests_of_a_range_are_bounded(
    songs: Songs, database: Database, provider: Provider, s3: S3, bucket: str
) -> None:
    songs(*plain_songs(range(1, 90)))

    def count(step: Callable[[Pipeline], Any]) -> Counter[str]:
        """What a step asks of the range; `GET` has HEAD, too."""
        pipeline = make_pipeline(database, provider, bucket, max_request_texts=10)
        s3.requests()
        step(pipeline)
        found = [each for each in s3.requests() if "000000000-000000100" in each["path"]]
        kinds = {"HEAD": "GET", "POST": "DELETE"}
        return Counter(
            "LIST" if "list-type" in each["path"] else kinds.get(each["method"], each["method"]) for each in found
        )

    assert count(lambda it: it.export()) == {"GET": 3, "PUT": 1, "LIST": 1}
    filled = count(lambda it: it.embed())
    # a part per answer at most, the base, the manifest at the begin and at the end
    assert filled["PUT"] <= 9 + 3
    assert filled["GET"] <= 20 + 9
    assert filled["LIST"] <= 3
    loaded = count(lambda it: it.load())
    assert (loaded["PUT"], loaded["LIST"]) == (0, 2)
    assert loaded["GET"] <= 4
    for step in (lambda it: it.export(), lambda it: it.embed(), lambda it: it.load()):
        nothing = count(step)
        assert nothing["PUT"] == 0
        assert nothing["LIST"] <= 1
        assert nothing["GET"] <= 6


def test_of_writers_without_a_lock_one_wins_each_time_and_what_all_stored_is_kept(bucket: str) -> None:
    cache, n_writers = ModelCache(open_storage(bucket), "m", 3), 6
    for number in range(3):
        at_once = threading.Barrier(n_writers)
        song_ids = range(number * n_writers, (number + 1) * n_writers)

        def write(song_id: int, at_once: threading.Barrier = at_once) -> str:
            cached = cache.open(RANGE)
            manifest = replace_complete(cached.manifest, song_id)
            at_once.wait()
            write_embeddings_to_file(cached, [song_id], hashes_of([song_id]), vectors_of([song_id]))
            try:
                cached.save(manifest)
            except StoreError as error:
                assert "another run writes this range" in str(error)
                return error.code
            return "won"

        with ThreadPoolExecutor(n_writers) as pool:
            outcomes = Counter(pool.map(write, song_ids))
        assert outcomes == {"won": 1, "store.lock-lost": n_writers - 1}
        adopting = cache.open(RANGE)
        assert adopting.rows["song_id"].to_list() == list(range((number + 1) * n_writers))
        adopting.save(adopting.manifest)


def replace_complete(manifest: Any, song_id: int) -> Any:
    """A manifest that no other writer makes."""
    import msgspec

    return msgspec.structs.replace(manifest, complete=Completion(str(song_id), "text", 0, 0, 0, "", 0, b""))


def test_of_two_fills_without_a_lock_one_wins_and_no_vector_that_was_paid_for_is_lost(
    songs: Songs, database: Database, provider: Provider, bucket: str
) -> None:
    songs(*plain_songs(range(1, 90)))
    make_pipeline(database, provider, bucket).export()
    provider.control(latency_s=(0.01, 0.2))
    opened = threading.Barrier(2)

    def fill_unlocked(_: int) -> list[str]:
        filler = make_pipeline(database, provider, bucket, max_request_texts=8).filler()
        unlocked = replace(
            filler,
            lock_range=lambda *_: contextlib.nullcontext(lambda: None),
            # each has opened the range before either pays
            before_payment=lambda: opened.wait(60),
        )
        found: list[str] = []
        unlocked.fill_ranges(list(TILING), lambda each: found.append(getattr(each.error, "code", "")))
        return found

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(fill_unlocked, range(2)))
    assert sorted(outcomes) == [[""], ["store.lock-lost"]]
    provider.control()
    provider.reset_ledger()
    pipeline = make_pipeline(database, provider, bucket)
    fill(pipeline)
    assert not billed(provider), "both had paid for everything, and it was kept"
    assert_stored(pipeline, plain_texts(range(1, 90)))


def test_a_store_that_breaks_down_ends_the_run_before_the_next_range_is_paid_for(
    songs: Songs, database: Database, provider: Provider, s3: S3, bucket: str
) -> None:
    songs(*plain_songs(range(1, 90)), *plain_songs(range(100, 190)), *plain_songs(range(200, 290)))
    make_pipeline(database, provider, bucket).export()
    denied = {"do": "answer", "method": "PUT", "match": "arrow$", "status": 403}
    s3.spoil(denied | {"body": "<Error><Code>AccessDenied</Code></Error>", "after": 2})
    pipeline = make_pipeline(database, provider, bucket, max_request_texts=10, concurrency=2)
    with pytest.raises(StorageError) as caught:
        pipeline.embed()
    assert caught.value.code == "storage.denied", caught.value
    n_lost = len(billed(provider))
    assert n_lost <= 20 + 2 * 20 + 40, "what was stored, and what was in flight"
    s3.spoil()
    fill(make_pipeline(database, provider, bucket))
    assert_stored(pipeline, plain_texts([*range(1, 90), *range(100, 190), *range(200, 290)]))


def test_a_store_that_would_let_two_writers_win_is_refused_before_anything_is_paid_for(
    songs: Songs, database: Database, provider: Provider, s3: S3, bucket: str
) -> None:
    songs(*plain_songs(range(1, 10)))
    s3.spoil({"do": "drop", "method": "PUT", "header": "If-Match"})
    with pytest.raises(StorageError) as caught:
        make_pipeline(database, provider, bucket).run()
    assert caught.value.code == "storage.unconditional"
    assert not list(open_storage(bucket).list_keys())
    s3.spoil()
    make_pipeline(database, provider, bucket).export()
    # another server took its place
    s3.spoil({"do": "drop", "method": "PUT", "header": "If-Match"})
    with pytest.raises(StorageError) as caught:
        make_pipeline(database, provider, bucket).run()
    assert caught.value.code == "storage.unconditional"
    assert not billed(provider)
