"""What a fill finds to send: new and changed texts, each once, and none that has a vector already."""

import polars as pl
import pytest
import sqlalchemy as sa

from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import (
    ReembeddingError,
    StoreError,
)
from songvec_assets.postgres.engine import Database
from songvec_assets.songs import content, snapshots
from songvec_assets.songs.text import TextSpec, render_texts
from songvec_assets_tests.administration import execute
from songvec_assets_tests.cache.filling import (
    FIRST,
    Run,
    Songs,
    assert_stored,
    billed,
    export,
    files_of,
    fill,
    flip_bit,
    plain_songs,
    plain_texts,
    try_fill,
    vector_bytes,
)
from songvec_assets_tests.conftest import TILING
from songvec_assets_tests.provider import Provider


def test_only_the_texts_that_are_sent_are_rendered(
    songs: Songs, database: Database, run: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"range_size": 5_000, "song_id_stop": 5_000}
    pipeline = run(**wide)
    execute(
        database.adbc_uri,
        """
        CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text);
        INSERT INTO songs SELECT n, 'Song ' || n, 'Ann', 'la' FROM generate_series(0, 4999) n
        """,
    )
    fill(pipeline)
    n_rendered = 0

    def count_and_render(songs: pl.DataFrame, spec: TextSpec) -> pl.DataFrame:
        nonlocal n_rendered
        n_rendered += songs.height
        return render_texts(songs, spec)

    for module in (content, snapshots):
        monkeypatch.setattr(module, "render_texts", count_and_render)
    provider.reset_ledger()
    execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id % 180 = 7")
    export(pipeline)
    assert n_rendered == 28
    reports: list[FillReport] = []
    again = run(**wide)
    again.filler().fill_ranges(list(again.tiling), reports.append)
    assert [(each.n_songs, each.n_embedded, each.error) for each in reports] == [(5_000, 28, None)]
    assert n_rendered == 56
    assert again.estimate().n_texts == 0
    assert n_rendered == 56, "an estimate over a complete cache renders nothing"


def test_a_later_fill_reports_what_changed_came_and_went(
    songs: Songs, database: Database, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 11)))
    fill(run())
    with database.get_connection() as connection:
        connection.execute(sa.text("DELETE FROM songs WHERE id = 10"))
    songs((1, "Song 000001", "Ann", "new words"), (2, "Song 000003", "Ann", "la la la!"), (20, "Hill", "Ben", None))
    provider.reset_ledger()
    later = run()
    (report,) = fill(later)
    assert (report.n_songs, report.n_unchanged, report.n_new, report.n_changed) == (10, 7, 1, 2)
    assert (report.n_deleted, report.n_reused, report.n_embedded) == (1, 1, 2)
    assert billed(provider) == {"Song 000001 by Ann\nnew words": 1, "Hill by Ben": 1}
    expected = plain_texts(range(1, 10))
    expected |= {1: "Song 000001 by Ann\nnew words", 2: expected[3], 20: "Hill by Ben"}
    assert_stored(later, expected)


def test_songs_of_one_text_are_sent_once_and_each_gets_the_vector(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*((song_id, "Sea", "Ann", "waves") for song_id in range(1, 30)))
    pipeline = run()
    (report,) = fill(pipeline)
    assert report.n_embedded == 29
    assert billed(provider) == {"Sea by Ann\nwaves": 1}
    assert_stored(pipeline, dict.fromkeys(range(1, 30), "Sea by Ann\nwaves"))


def test_the_same_text_under_a_new_song_id_takes_the_vector_without_a_request(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 6)))
    fill(run())
    provider.reset_ledger()
    songs((50, "Song 000003", "Ann", "la la la!"), (51, "Song 000003", "Ann", "la la la!"))
    later = run()
    (report,) = fill(later)
    assert (report.n_new, report.n_reused, report.n_embedded, report.n_tokens) == (2, 2, 0, 0)
    assert provider.ledger()["requests"] == 0
    assert_stored(later, plain_texts(range(1, 6)) | dict.fromkeys((50, 51), plain_texts([3])[3]))


def test_a_song_that_gets_another_song_id_is_not_paid_for_again(
    songs: Songs, database: Database, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 6)))
    fill(run())
    provider.reset_ledger()
    with database.get_connection() as connection:
        connection.execute(sa.text("UPDATE songs SET id = 99 WHERE id = 2"))
    later = run()
    (report,) = fill(later)
    assert (report.n_new, report.n_deleted, report.n_reused) == (1, 1, 1)
    assert provider.ledger()["requests"] == 0
    texts = plain_texts(range(1, 6))
    assert_stored(later, {99: texts.pop(2)} | texts)


def test_a_lyric_that_is_changed_back_has_the_vector_of_its_old_text_again(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 21)))
    fill(run())
    songs((3, "Song 000003", "Ann", "other words"))
    fill(run())
    songs(*plain_songs([3]))
    provider.reset_ledger()
    last = run()
    (report,) = fill(last)
    assert (report.n_changed, report.n_unchanged, report.n_reused, report.n_embedded) == (1, 19, 1, 0)
    assert provider.ledger()["requests"] == 0, "the old text was paid for"
    assert_stored(last, plain_texts(range(1, 21)))
    assert fill(run())[0].n_unchanged == 20


def test_another_template_embeds_every_song_again_and_leaves_nothing_of_the_old(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 6)))
    fill(run())
    provider.reset_ledger()
    other = run(text_template="{artist}: {name}")
    reports, refusal = try_fill(other)
    assert (reports, isinstance(refusal, ReembeddingError)) == ([], True)
    assert provider.ledger()["requests"] == 0
    (report,) = fill(other, confirm_reembedding=True)
    assert (report.n_changed, report.n_embedded, report.n_unchanged) == (5, 5, 0)
    expected = {song_id: f"Ann: Song {song_id:06d}" for song_id in range(1, 6)}
    assert_stored(other, expected)
    assert set(billed(provider)) == set(expected.values())


def test_texts_above_the_limit_are_cut_and_counted_in_every_run(songs: Songs, run: Run, provider: Provider) -> None:
    songs((1, "Long", "Ann", "x" * 100), (2, "Short", "Ann", "y"), (3, "Full", "Ann", "z" * 10))
    pipeline = run(max_text_chars=22)
    (report,) = fill(pipeline)
    assert (report.n_truncated, report.n_embedded) == (1, 3)
    cut = {1: "Long by Ann\n" + "x" * 10, 2: "Short by Ann\ny", 3: "Full by Ann\n" + "z" * 10}
    assert set(billed(provider)) == set(cut.values())
    assert_stored(pipeline, cut)
    (again,) = fill(run(max_text_chars=22))
    assert (again.n_truncated, again.n_unchanged) == (1, 3)
    provider.reset_ledger()
    (longer,) = fill(run(max_text_chars=50), confirm_reembedding=True)
    assert (longer.n_truncated, longer.n_changed) == (1, 1)
    assert set(billed(provider)) == {"Long by Ann\n" + "x" * 38}, "only the text that was cut is embedded again"


def test_a_song_that_the_export_rejected_is_counted_and_its_neighbours_are_embedded(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs((1, None, "Ann", "la"), (2, "Sea", "  ", "la"), (3, "Hill", "Ben", "la"))
    first = run()
    (report,) = fill(first)
    assert (report.n_songs, report.n_rejected, report.n_embedded) == (3, 2, 1)
    assert set(billed(provider)) == {"Hill by Ben\nla"}
    assert_stored(first, {3: "Hill by Ben\nla"})
    songs((1, "Moon", "Ann", "la"), (3, None, "Ben", "la"))
    second = run()
    (report,) = fill(second)
    assert (report.n_songs, report.n_rejected, report.n_new, report.n_deleted) == (3, 2, 1, 1)
    assert_stored(second, {1: "Moon by Ann\nla"})


def test_a_range_without_a_snapshot_is_left_as_it_is(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    for snapshot in first.store.songs.storage.root.glob("*.parquet"):
        snapshot.unlink()
    reports: list[FillReport] = []
    run().filler().fill_ranges(list(TILING), reports.append)
    assert [type(report.error) for report in reports] == [StoreError]
    assert "export first, with `songvec run`" in str(reports[0].error)
    assert_stored(first, plain_texts(range(1, 9)))


def test_rows_that_were_found_damaged_are_sent_again_and_no_others(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 25)))
    first = run(max_request_texts=8, concurrency=1)
    fill(first)
    (path,) = files_of(first)
    flip_bit(path, vector_bytes(first, 24))
    cached = first.cache.open(FIRST)
    assert cached.rows.join(cached.find_sound(cached.rows), on="song_id", how="anti")["song_id"].to_list() == [24]
    cached.discard([24])
    assert first.cache.open(FIRST).rows["song_id"].to_list() == list(range(1, 24))
    provider.reset_ledger()
    second = run()
    (report,) = fill(second)
    assert (report.n_unchanged, report.n_embedded) == (23, 1)
    assert billed(provider) == {plain_texts([24])[24]: 1}
    assert_stored(second, plain_texts(range(1, 25)))
    assert not path.exists(), "merged without the damaged row"


def test_a_damaged_row_takes_the_sound_vector_that_another_song_of_its_text_has(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs((1, "Same", "Ann", "words"), (2, "Same", "Ann", "words"))
    first = run()
    fill(first)
    (path,) = files_of(first)
    flip_bit(path, vector_bytes(first, 2), last=True)
    first.cache.open(FIRST).discard([2])
    provider.reset_ledger()
    (report,) = fill(run())
    assert (report.n_reused, report.n_embedded) == (1, 0)
    assert provider.ledger()["requests"] == 0
    assert_stored(first, dict.fromkeys([1, 2], "Same by Ann\nwords"))


def test_a_song_without_lyrics_and_one_with_empty_lyrics_share_a_text(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs((1, "Sea", "Ann", None), (2, "Sea", "Ann", ""))
    pipeline = run()
    fill(pipeline)
    assert billed(provider) == {"Sea by Ann": 1}
    assert_stored(pipeline, {1: "Sea by Ann", 2: "Sea by Ann"})
