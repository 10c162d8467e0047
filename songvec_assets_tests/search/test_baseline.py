"""BM25 over the snapshots, as a baseline."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from songvec_assets.errors import SearchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.search import baseline
from songvec_assets.search.baseline import search_bm25
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec
from songvec_assets.storage.local import LocalStorage


def test_songs_with_the_rarest_words_come_first_and_others_are_left_out(pipeline: Pipeline) -> None:
    found = search_bm25(pipeline.store.songs, pipeline.text_spec, ["song 42", "Ann", "nothing of it", "!"])
    assert found[0][0] == 42
    assert len(found[1]) == 10
    assert {song_id % 3 for song_id in found[1]} == {0}
    assert found[2:] == [[], []]


def test_what_keeps_it_from_ranking_is_said(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SearchError, match="the snapshots hold 0"):
        search_bm25(Snapshots(LocalStorage(tmp_path)), TextSpec(), ["x"])
    monkeypatch.setattr(baseline, "MOST_SONGS", 59)
    with pytest.raises(SearchError, match="takes 1 to 59 songs, the snapshots hold 60"):
        search_bm25(pipeline.store.songs, pipeline.text_spec, ["x"])
    found = builtins.__import__

    def lacking(name: str, *arguments: Any) -> Any:
        if name == "bm25s":
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(SearchError, match=r"pip install 'songvec-assets\[evaluate\]'"):
        search_bm25(pipeline.store.songs, pipeline.text_spec, ["x"])
