"""Which cached songs a server is compared with; what follows is in `scenarios/test_moves`."""

import numpy as np
import pytest

from songvec_assets.cache import comparison
from songvec_assets.cache.comparison import CachedSong, find_songs
from songvec_assets.pipeline import Pipeline
from songvec_assets_tests.cache.filling import (
    Run,
    Songs,
    export,
    files_of,
    fill,
    flip_bit,
    plain_songs,
    plain_texts,
    vector_bytes,
)
from songvec_assets_tests.provider import vector_of


def find(pipeline: Pipeline) -> list[CachedSong]:
    """The songs, each with its own text and vector."""
    found = find_songs(pipeline.cache, pipeline.store.songs, pipeline.text_spec)
    for each in found:
        assert each.text == plain_texts([each.song_id])[each.song_id]
        np.testing.assert_allclose(each.embedding, vector_of(each.text, 64), atol=1e-6)
    return found


def ids_of(pipeline: Pipeline) -> list[int]:
    return sorted(each.song_id for each in find(pipeline))


def test_a_model_that_runs_here_is_not_compared(songs: Songs, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[CachedSong]:
        raise AssertionError

    monkeypatch.setattr(comparison, "find_songs", fail)
    songs(*plain_songs(range(1, 4)))
    assert fill(run(embedding_model="offline-v1"))[0].n_embedded == 3


def test_they_are_spread_over_the_ranges_and_within_each(songs: Songs, run: Run) -> None:
    songs(*plain_songs([*range(1, 41), *range(101, 141), 250]))
    pipeline = run()
    fill(pipeline)
    found = ids_of(pipeline)
    assert len(found) == 20
    assert 250 in found
    for first in (1, 101):
        here = [song_id for song_id in found if first <= song_id < first + 40]
        assert len(here) >= 9
        assert max(here) - min(here) >= 10


def test_of_many_ranges_some_are_read_and_more_only_if_these_have_too_few(
    songs: Songs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "N_SONGS", 4)
    songs(*plain_songs(range(1, 1000, 100)))
    pipeline = run()
    fill(pipeline)
    assert ids_of(pipeline) == [1, 301, 601, 901]
    songs(*((song_id, "Other", "Ann", f"{song_id}") for song_id in (1, 301, 601, 901)))
    export(pipeline)
    assert ids_of(pipeline) == [101, 201, 401, 701]


def test_of_few_songs_all_are_compared_whose_text_and_vector_are_what_they_were(songs: Songs, run: Run) -> None:
    songs(*plain_songs([*range(1, 6), 101]))
    pipeline = run()
    assert find(pipeline) == [], "nothing is cached"
    fill(pipeline)
    assert ids_of(pipeline) == [1, 2, 3, 4, 5, 101]
    flip_bit(files_of(pipeline)[0], vector_bytes(pipeline, 2))
    songs((3, "Other", "Ann", "la"))
    export(pipeline)
    assert ids_of(pipeline) == [1, 4, 5, 101]
    (pipeline.cache.storage.root / "000000000-000000100" / "manifest.json").write_bytes(b"{")
    assert ids_of(pipeline) == [101], "a range that cannot be read is left out"
