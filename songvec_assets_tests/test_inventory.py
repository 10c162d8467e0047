"""One row per range, and what is read for it."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from songvec_assets.pipeline import Pipeline
from songvec_assets.songs import snapshots
from songvec_assets.storage.local import LocalStorage

Songs = Callable[..., None]
COUNTS = ["key", "n_source", "n_songs", "n_unexported", "n_cached", "n_rejected", "n_loaded", "n_rows"]
DIFFERENCES = ["key", "n_missing", "n_orphans", "is_answered", "is_loaded"]


@pytest.fixture
def filled(pipeline: Pipeline, songs: Songs) -> Pipeline:
    """Songs 1 to 3 and 101 are loaded; song 4 has no name."""
    songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in (1, 2, 3, 101)), (4, None, "Ann", "la"))
    pipeline.export()
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    pipeline.load()
    return pipeline


def change(pipeline: Pipeline, statement: str) -> None:
    with pipeline.database.get_connection() as connection:
        connection.execute(sa.text(statement))


def read(pipeline: Pipeline, columns: list[str]) -> list[tuple[object, ...]]:
    return pipeline.read_inventory().frame.select(columns).rows()


def test_a_row_has_what_each_place_holds_of_a_range(filled: Pipeline) -> None:
    assert read(filled, COUNTS) == [
        ("000000000-000000100", 4, 4, 0, 3, 1, 3, 3),
        ("000000100-000000200", 1, 1, 0, 1, 0, 1, 1),
    ]
    assert read(filled, DIFFERENCES) == [
        ("000000000-000000100", 0, 0, True, True),
        ("000000100-000000200", 0, 0, True, True),
    ]


def test_songs_are_missing_until_they_are_loaded_and_orphans_until_their_rows_are_removed(
    filled: Pipeline, songs: Songs
) -> None:
    songs((5, "Song 5", "Ann", "la"), (901, "Song 901", "Ann", "la"))
    change(filled, "DELETE FROM songs WHERE id = 2")
    expected = {"000000000-000000100": 0, "000000100-000000200": 0, "000000900-000001000": 1}
    assert {key: n_missing for key, n_missing, *_ in read(filled, DIFFERENCES)} == expected, (
        "by count, before an export"
    )
    filled.export()
    first, second, last = read(filled, DIFFERENCES)
    assert first == ("000000000-000000100", 1, 1, False, True)
    assert second == ("000000100-000000200", 0, 0, True, True)
    assert last == ("000000900-000001000", 1, 0, False, False)
    filled.filler().fill_ranges(list(filled.tiling), lambda _: None)
    assert read(filled, DIFFERENCES)[0] == ("000000000-000000100", 1, 1, True, False)
    filled.load()
    assert all(row[1:] == (0, 0, True, True) for row in read(filled, DIFFERENCES))


def test_rows_that_somebody_else_removed_leave_a_range_not_loaded(filled: Pipeline) -> None:
    change(filled, "DELETE FROM song_embeddings WHERE song_id = 3")
    assert [row[-1] for row in read(filled, DIFFERENCES)] == [False, True]


def test_each_range_is_in_one_state(filled: Pipeline, songs: Songs) -> None:
    assert filled.read_inventory().states == {"loaded": 2}
    songs((5, "Song 5", "Ann", "la"), (201, "Song 201", "Ann", "la"))
    change(filled, "DELETE FROM song_embeddings WHERE song_id = 101")
    assert filled.read_inventory().states == {"behind": 2, "cached": 1}
    (filled.cache.storage.root / "000000100-000000200" / "manifest.json").write_text("{")
    assert filled.read_inventory().states == {"behind": 2, "unreadable": 1}


def test_status_and_estimate_of_a_complete_catalogue_open_no_file_with_vectors_and_render_no_text(
    filled: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("opened or rendered")

    def refuse_vectors(storage: LocalStorage, key: str) -> object:
        return refuse() if "embeddings" in str(storage) else open_file(storage, key)

    open_file = LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", refuse_vectors)
    monkeypatch.setattr(snapshots, "render_texts", refuse)
    assert filled.status().total["n_missing"] == 0
    estimate = filled.estimate()
    assert (estimate.n_songs, estimate.n_texts, estimate.usd) == (5, 0, 0)
    assert filled.read_inventory(with_table=False, with_source=False).behind == []


def test_a_run_with_nothing_to_do_opens_each_file_with_vectors_at_most_once(
    filled: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_file = LocalStorage.open

    def note(storage: LocalStorage, key: str) -> object:
        if "embeddings" in str(storage):
            opened.append(key)
        return open_file(storage, key)

    monkeypatch.setattr(LocalStorage, "open", note)
    filled.export()
    filled.filler().fill_ranges(list(filled.tiling), lambda _: None)
    filled.load()
    assert len(opened) == len({*opened})
