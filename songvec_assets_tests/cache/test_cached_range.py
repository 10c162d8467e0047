"""An opened range: its valid rows, what two writers and a later generation leave, and what damage costs."""

import numpy as np
import polars as pl
import pytest

from songvec_assets.cache import completion
from songvec_assets.cache.model_cache import (
    write_embeddings_to_file,
)
from songvec_assets.errors import (
    StoreError,
)
from songvec_assets.songs.text import hash_text
from songvec_assets_tests.cache.filling import (
    FIRST,
    Run,
    Songs,
    assert_stored,
    billed,
    files_of,
    fill,
    plain_songs,
    plain_texts,
)
from songvec_assets_tests.cache.rows import (
    FILLED,
    RANGE,
    complete,
    content_of,
    delete,
    hashes_of,
    names,
    put,
    vectors_of,
)
from songvec_assets_tests.provider import Provider


def test_a_part_that_is_lost_is_sent_again_and_nothing_else(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 81)))
    fill(run(max_request_texts=32, concurrency=1))
    songs(*plain_songs(range(81, 85)))
    first = run(max_request_texts=32, concurrency=1)
    fill(first)
    _, part = files_of(first)
    part.unlink()
    provider.reset_ledger()
    second = run()
    (report,) = fill(second)
    assert (report.n_new, report.n_unchanged, report.n_embedded) == (4, 80, 4)
    assert report.n_bytes_damaged > 0
    assert set(billed(provider)) == set(plain_texts(range(81, 85)).values())
    assert_stored(second, plain_texts(range(1, 85)))
    assert fill(run())[0].n_bytes_damaged == 0


@pytest.mark.parametrize(("kind", "n_lost"), [("footer", 0), ("narrow", 1), ("cut", 0), ("half", 4), ("empty", 4)])
def test_the_songs_that_a_damaged_file_lost_are_sent_again_and_no_others(
    songs: Songs, run: Run, provider: Provider, kind: str, n_lost: int
) -> None:
    songs(*plain_songs(range(1, 81)))
    fill(run(max_request_texts=32, concurrency=1))
    songs(*plain_songs(range(81, 85)))
    first = run()
    fill(first)
    _, path = files_of(first)
    content = bytearray(path.read_bytes())
    if kind == "footer":
        content[content.rindex(b"digest")] ^= 4  # the footer's
    elif kind == "narrow":
        content[content.index(hash_text(plain_texts([82])[82]))] ^= 1
    path.write_bytes(content[: {"cut": -1, "half": len(content) // 2, "empty": 0}.get(kind, len(content))])
    damage = first.cache.open(FIRST)
    damage.discard([])  # as a load does, which finds it
    provider.reset_ledger()
    (report,) = fill(run())
    assert (report.n_bytes_damaged, report.n_embedded) == (len(content), n_lost)
    assert set(billed(provider)) <= set(plain_texts(range(81, 85)).values())
    assert first.cache.open(FIRST).damaged == {}
    assert not path.exists()
    assert_stored(first, plain_texts(range(1, 85)))


def test_a_range_whose_files_are_deleted_is_filled_again_though_it_was_complete(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    fill(run())
    for path in files_of(first):
        path.unlink()
    second = run()
    (report,) = fill(second)
    assert (report.n_new, report.n_embedded) == (8, 8)
    assert_stored(second, plain_texts(range(1, 9)))


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


def test_a_song_that_came_back_is_not_deleted_any_more(cache):
    put(cache, range(3))
    delete(cache, [0, 1])
    put(cache, [0], 9)
    assert sorted(content_of(cache.open(RANGE))) == [0, 2]
    assert [*cache.open(RANGE).manifest.deleted_at] == [1]


def test_reading_some_rows_gives_those_and_no_others(cache):
    put(cache, [1, 2, 3])
    put(cache, [4, 5])
    cached = cache.open(RANGE)
    wanted = cached.rows.filter(pl.col("song_id").is_in([2, 4, 5]))["row"]
    assert [rows.song_ids.tolist() for rows in cached.iter_vectors(wanted)] == [[2], [4, 5]]
    np.testing.assert_array_equal(cached.embeddings_at(wanted.reverse()), vectors_of([5, 4, 2]))
    assert list(cached.iter_vectors(wanted.head(0))) == []


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
    completion.complete(later, FILLED, 0.0)
    assert content_of(cache.open(RANGE)) == dict(zip([1, 2], map(bytes, vectors_of([1, 2], 7)), strict=True))
    assert {name.split("-")[0] for name in names(cache)} == {"5", "manifest.json"}


def test_a_later_generation_keeps_the_vectors_of_deleted_songs_and_not_of_those_that_came_back(cache):
    put(cache, [1, 2, 3])
    delete(cache, [1, 2])
    later = cache.open(RANGE, 1)
    write_embeddings_to_file(later, [1, 3], hashes_of([1, 3]), vectors_of([1, 3], 7))
    completion.complete(later, FILLED, 60.0)
    cached = cache.open(RANGE)
    assert content_of(cached) == dict(zip([1, 3], map(bytes, vectors_of([1, 3], 7)), strict=True))
    assert cached.deleted_rows(0.0)["song_id"].to_list() == [2]
    assert bytes(cached.embeddings_at(cached.deleted_rows(0.0)["row"])[0]) == bytes(vectors_of([2])[0])
