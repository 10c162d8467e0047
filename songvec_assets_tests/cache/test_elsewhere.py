"""Songs that get other song_ids take the vectors of their texts along, into whichever range they come."""

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa

from songvec_assets.cache import elsewhere
from songvec_assets.cache import fill as fill_module
from songvec_assets.cache.elsewhere import OtherRanges
from songvec_assets.cache.model_cache import ModelCache, write_embeddings_to_file
from songvec_assets.cache.plan import FillReport
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.cache.filling import (
    Run,
    Songs,
    assert_stored,
    billed,
    fill,
    flip_bit,
    plain_songs,
    plain_texts,
    try_fill,
    vector_bytes,
)
from songvec_assets_tests.cache.rows import RANGE, complete, hashes_of, put
from songvec_assets_tests.provider import Provider

SECOND = SongIdRange(100, 200)


def renumber(database: Database, expression: str) -> None:
    """Give each song another song_id."""
    with database.get_connection() as connection:
        connection.execute(sa.text(f"UPDATE songs SET id = -1 - ({expression})"))
        connection.execute(sa.text("UPDATE songs SET id = -1 - id"))


def follow(pipeline: Pipeline) -> list[FillReport]:
    """Export, deletions included, and fill; the reports."""
    pipeline.export(confirm_deletions=True)
    reports: list[FillReport] = []
    pipeline.filler().fill_ranges(list(pipeline.tiling), reports.append)
    return reports


def songs_of(song_ids: list[int]) -> pl.DataFrame:
    """Songs as `OtherRanges` takes them."""
    schema = {"song_id": pl.Int32, "text_hash": pl.Binary}
    return pl.DataFrame({"song_id": song_ids, "text_hash": hashes_of(song_ids)}, schema)


def moved(song_ids: list[int], n: int) -> dict[int, str]:
    """The texts of `plain_songs` whose ids were raised by n."""
    return {song_id + n: text for song_id, text in plain_texts(song_ids).items()}


def test_a_catalogue_that_is_renumbered_into_other_ranges_is_not_paid_for_again(
    songs: Songs, database: Database, run: Run, provider: Provider
) -> None:
    """Its old songs count as deleted: the vectors that are kept of them are the source."""
    ids = [*range(1, 41), *range(101, 141)]
    songs(*plain_songs(ids))
    fill(run())
    provider.reset_ledger()
    renumber(database, "id + 530")
    later = run()
    later.export(confirm_deletions=True)
    estimate = later.estimate()
    assert (estimate.n_texts, estimate.n_reused, estimate.usd) == (0, 80, 0.0)
    assert any("80 songs take the stored vector" in line for line in later.dry_run().describe())
    reports = follow(later)
    assert [(each.n_deleted, each.n_new, each.n_reused) for each in reports] == [
        (40, 0, 0),
        (40, 0, 0),
        (0, 40, 40),
        (0, 40, 40),
    ]
    assert provider.ledger()["requests"] == 0
    assert_stored(later, moved(ids, 530))
    assert later.estimate().n_reused == 0


def test_ranges_that_change_places_take_each_others_vectors(
    songs: Songs, database: Database, run: Run, provider: Provider
) -> None:
    """The first one that is filled gets other texts, and the last one needs those that it had."""
    ids = [*range(1, 41), *range(101, 141), *range(201, 241)]
    songs(*plain_songs(ids))
    fill(run())
    provider.reset_ledger()
    for n_times in (1, 2, 3):
        renumber(database, "(id + 100) % 300")
        later = run()
        reports = fill(later)
        assert [(each.n_changed, each.n_reused, each.n_embedded) for each in reports] == [(40, 40, 0)] * 3
        texts = plain_texts(ids)
        assert_stored(later, {(song_id + 100 * n_times) % 300: text for song_id, text in texts.items()})
    assert provider.ledger()["requests"] == 0
    assert later.cache.open(SECOND).n_rows <= 80, "no more than one change is kept"


@pytest.mark.usefixtures("one_range_at_a_time")
def test_ranges_that_change_places_may_be_interrupted(
    songs: Songs, database: Database, run: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*range(1, 41), *range(101, 141)]
    songs(*plain_songs(ids))
    fill(run())
    provider.reset_ledger()
    renumber(database, "(id + 100) % 200")

    def die(*_: object) -> None:
        raise RuntimeError("killed before the range is complete")

    with monkeypatch.context() as patched:
        patched.setattr(fill_module.completion, "complete", die)
        with pytest.raises(RuntimeError):
            try_fill(run())
    later = run()
    fill(later)
    assert provider.ledger()["requests"] == 0
    texts = plain_texts(ids)
    assert_stored(later, {(song_id + 100) % 200: text for song_id, text in texts.items()})


def test_a_damaged_vector_is_not_copied_and_its_text_is_sent(
    songs: Songs, database: Database, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 21)))
    first = run()
    fill(first)
    provider.reset_ledger()
    (path,) = (first.cache.storage.root / "000000000-000000100").glob("*.arrow")
    flip_bit(path, vector_bytes(first, 7))
    renumber(database, "id + 300")
    later = run()
    report = follow(later)[-1]
    assert (report.n_reused, report.n_embedded) == (19, 1)
    assert billed(provider) == {plain_texts([7])[7]: 1}
    assert_stored(later, moved([*range(1, 21)], 300))


def test_a_range_that_cannot_be_read_fails_alone(
    songs: Songs, database: Database, run: Run, provider: Provider
) -> None:
    songs(*plain_songs([1, 101]))
    first = run()
    fill(first)
    provider.reset_ledger()
    (first.cache.storage.root / "000000000-000000100" / "manifest.json").write_bytes(b"{")
    renumber(database, "id + 200")
    reports = follow(run())
    assert [each.error is not None for each in reports] == [True, False, False, False]
    assert billed(provider) == {plain_texts([1])[1]: 1}


@pytest.mark.usefixtures("one_range_at_a_time")
def test_a_text_that_several_ranges_have_is_sent_by_the_first_one(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*((song_id, "Sea", "Ann", "waves") for song_id in (1, 2, 101, 950, 1_500)))
    pipeline = run()
    assert [(each.n_embedded, each.n_reused) for each in fill(pipeline)] == [(2, 0), (0, 1), (0, 1), (0, 1)]
    assert billed(provider) == {"Sea by Ann\nwaves": 1}
    assert_stored(pipeline, dict.fromkeys((1, 2, 101, 950, 1_500), "Sea by Ann\nwaves"))


@pytest.mark.usefixtures("one_range_at_a_time")
def test_songs_that_are_embedded_again_on_request_do_not_take_vectors_of_other_ranges(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*((song_id, "Sea", "Ann", "waves") for song_id in (1, 101)))
    pipeline = run()
    fill(pipeline)
    provider.reset_ledger()
    assert pipeline.estimate(reembed=True).n_texts == 2
    again = run()
    again.filler(reembed="one").fill_ranges(list(again.tiling), lambda _: None)
    assert billed(provider) == {"Sea by Ann\nwaves": 2}


def test_what_other_runs_fill_meanwhile_is_found(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "LOOK_AGAIN_S", 0.0)
    others = OtherRanges(cache)
    songs = songs_of([1, 2])
    assert others.find(SECOND, songs).is_empty()
    put(cache, [1])
    assert others.find(SECOND, songs)["song_id"].to_list() == [1]
    put(cache, [2])
    complete(cache)
    assert others.find(SECOND, songs)["song_id"].to_list() == [1, 2]
    assert others.find(SongIdRange(0, 100), songs).is_empty(), "the range's own texts are not elsewhere"


def test_a_range_is_looked_at_once_until_it_changed(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, [1])
    others, songs, looked = OtherRanges(cache), songs_of([1, 2]), []
    look = ModelCache.look
    monkeypatch.setattr(ModelCache, "look", lambda self, each: looked.append(each) or look(self, each))
    for _ in range(3):
        assert others.find(SECOND, songs)["song_id"].to_list() == [1]
    assert looked == [RANGE, RANGE], "once to see that it changed, once to open it"
    put(cache, [2])
    assert others.find(SECOND, songs)["song_id"].to_list() == [1], "of another process: it is found a minute later"
    others.forget(RANGE)
    assert others.find(SECOND, songs)["song_id"].to_list() == [1, 2]


def test_a_text_whose_first_half_alone_is_stored_is_not_taken(cache):
    others, wanted = OtherRanges(cache), b"12345678" + b"abcdefgh"
    write_embeddings_to_file(cache.open(SongIdRange(0, 100)), [1], [b"12345678" * 2], np.ones((1, 3), np.float32))
    songs = pl.DataFrame({"song_id": [101], "text_hash": [wanted]}, {"song_id": pl.Int32, "text_hash": pl.Binary})
    assert others.copy(cache.open(SECOND), songs, lambda: None).is_empty()
    assert cache.open(SECOND).n_rows == 0
