"""Filling ranges from a real database, with a real provider that misbehaves: what is sent, stored, paid and refused."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa

from songvec_assets.cache import fill as fill_module
from songvec_assets.cache.fill import MAX_OPEN_RANGES
from songvec_assets.cache.model_cache import lock_name
from songvec_assets.cache.plan import FillReport
from songvec_assets.cache.rejections import MAX_REFUSALS_IN_A_ROW
from songvec_assets.embedding import contact as contact_module
from songvec_assets.errors import (
    BudgetExceededError,
    DatabaseError,
    ProviderError,
    ProviderUnavailableError,
    ReembeddingError,
    SongvecError,
    StoppedError,
    StoreError,
    TableMismatchError,
)
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import hold_lock
from songvec_assets.progress import Progress
from songvec_assets.songs import content, snapshots
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.text import TextSpec, hash_text, render_texts
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import TILING, make_pipeline
from songvec_assets_tests.provider import Provider, running_provider, vector_of
from songvec_assets_tests.vectors.conftest import upload

FIRST = SongIdRange(0, 100)

Songs = Callable[..., None]
Run = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def server() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


@pytest.fixture
def provider(server: Provider) -> Provider:
    """The module's provider, well-behaved and with an empty ledger."""
    server.control()
    server.reset_ledger()
    return server


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 0.02)


@pytest.fixture
def run(database: Database, provider: Provider, tmp_path: Path) -> Run:
    """Begins a run over the test's database and store, with some settings: a pipeline of its own."""

    def begin(**settings: object) -> Pipeline:
        return make_pipeline(database, provider, tmp_path / "store", **settings)

    return begin


@pytest.fixture
def one_range_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No range begins before the one before it has all its answers: what is done in between has its place."""
    monkeypatch.setattr(fill_module, "MAX_OPEN_RANGES", 1)


def export(pipeline: Pipeline) -> None:
    """Bring the snapshots to the state of the songs table."""
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, pipeline.tiling)


def fill(pipeline: Pipeline, max_usd: float | None = None, confirm_reembedding: bool = False) -> list[FillReport]:
    """Export and fill all ranges; the reports of those that hold anything, none of them failed."""
    reports, error = try_fill(pipeline, max_usd, confirm_reembedding=confirm_reembedding)
    assert error is None
    assert [report.error for report in reports] == [None] * len(reports)
    return reports


def try_fill(
    pipeline: Pipeline,
    max_usd: float | None = None,
    report: Callable[[FillReport], None] | None = None,
    confirm_reembedding: bool = False,
) -> tuple[list[FillReport], SongvecError | None]:
    """Export and fill all ranges; the reports, and what ended the run."""
    export(pipeline)
    reports: list[FillReport] = []

    def keep(filled: FillReport) -> None:
        reports.append(filled)
        if report:
            report(filled)

    try:
        if max_usd is not None:
            pipeline.settings = pipeline.settings.model_copy(update={"max_usd": max_usd})
        pipeline.filler(confirm_reembedding=confirm_reembedding).fill_ranges(list(pipeline.tiling), keep)
    except SongvecError as error:
        return reports, error
    return reports, None


def stored(pipeline: Pipeline) -> dict[int, np.ndarray | str]:
    """What the cache answers for each song: its vector, or why there is none."""
    found: dict[int, np.ndarray | str] = {}
    for song_range in pipeline.cache.ranges():
        cached = pipeline.cache.open(song_range)
        found |= dict(zip(cached.rows["song_id"], cached.embeddings_at(cached.rows["row"]), strict=True))
        found |= dict(cached.rejected.select("song_id", "reason").iter_rows())
    return found


def files_of(pipeline: Pipeline, song_range: SongIdRange = FIRST) -> list[Path]:
    """The files with vectors that a range's manifest names, in order."""
    folder = pipeline.cache.storage.root / song_range.key
    return [folder / each.name for each in pipeline.cache.read_manifest(song_range).files]


def flip_bit(path: Path, value: bytes, last: bool = False) -> None:
    """Change a bit of a value that is in a file."""
    content = bytearray(path.read_bytes())
    content[content.rindex(value) if last else content.index(value)] ^= 4
    path.write_bytes(content)


def vector_bytes(pipeline: Pipeline, song_id: int) -> bytes:
    """A song's vector as it is stored."""
    cached = pipeline.cache.open(FIRST)
    return bytes(cached.embeddings_at(cached.rows.filter(pl.col("song_id") == song_id)["row"]).tobytes())


def assert_stored(pipeline: Pipeline, texts: dict[int, str]) -> None:
    """The cache holds these songs with the vectors of these texts, and no others."""
    found = stored(pipeline)
    assert set(found) == set(texts)
    for song_id, text in texts.items():
        answer = found[song_id]
        assert isinstance(answer, np.ndarray), f"{song_id}: {answer}"
        np.testing.assert_allclose(answer, vector_of(text, 64), rtol=0, atol=1e-6, err_msg=str(song_id))


def plain_songs(song_ids: Sequence[int]) -> list[tuple[int, str, str, str]]:
    """Songs with a text of 28 characters, 7 tokens, each its own."""
    return [(song_id, f"Song {song_id:06d}", "Ann", "la la la!") for song_id in song_ids]


def plain_texts(song_ids: Sequence[int]) -> dict[int, str]:
    """The texts of `plain_songs`."""
    return {song_id: f"Song {song_id:06d} by Ann\nla la la!" for song_id in song_ids}


def billed(provider: Provider) -> dict[str, int]:
    """How often each song's text was billed."""
    texts = provider.texts()
    texts.pop("probe", None)
    return texts


def down(count: int | None = None, after: int = 1) -> dict[str, object]:
    """A provider that answers 503."""
    return {"statuses": [{"status": 503, "count": count, "after": after}]}


# What is sent, and what it costs


def test_the_next_ranges_begin_while_the_last_answers_of_one_are_awaited(
    songs: Songs, run: Run, provider: Provider
) -> None:
    song_ids = [1, *range(101, 800, 100)]
    songs(*plain_songs(song_ids))
    provider.control(latency_s=1.0)
    pipeline = run()
    assert sorted(report.range.start for report in fill(pipeline)) == list(range(0, 800, 100))
    assert provider.ledger()["max_in_flight"] == MAX_OPEN_RANGES
    assert_stored(pipeline, plain_texts(song_ids))


def test_all_ranges_together_keep_to_the_requests_in_flight(songs: Songs, run: Run, provider: Provider) -> None:
    song_ids = [*range(1, 25), *range(101, 125), *range(201, 225)]
    songs(*plain_songs(song_ids))
    provider.control(latency_s=0.1)
    fill(run(max_request_texts=4, concurrency=3))
    assert provider.ledger()["max_in_flight"] == 3


def test_one_range_finds_out_whether_the_provider_answers_at_all(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([1, 101, 201]))
    provider.control(statuses=[{"status": 402, "after": 2}], latency_s=0.3)
    reports, error = try_fill(run())
    assert [report.error for report in reports] == [error]
    assert provider.ledger()["requests"] == 2, "the probe and one range's request"


def test_a_range_is_filled_and_its_report_counts_what_was_done(songs: Songs, run: Run, provider: Provider) -> None:
    song_ids = [*range(1, 41), 250]
    songs(*plain_songs(song_ids))
    first = run(max_request_texts=8)
    one, other = fill(first)
    assert one.range == FIRST
    assert (one.n_songs, one.n_new, one.n_embedded) == (40, 40, 40)
    assert (one.n_changed, one.n_deleted, one.n_reused, one.n_unchanged, one.n_rejected, one.n_truncated) == (0,) * 6
    assert (other.range.key, other.n_songs, other.n_embedded) == ("000000200-000000300", 1, 1)
    assert one.seconds > 0
    assert one.n_bytes_damaged == 0
    assert_stored(first, plain_texts(song_ids))
    assert billed(provider) == dict.fromkeys(plain_texts(song_ids).values(), 1)
    assert provider.ledger()["max_texts_in_request"] == 8


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


def test_the_tokens_and_dollars_reported_are_those_the_provider_billed(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs([*range(1, 60), *range(200, 230)]), (230, "POISON", "Ann", "x"))
    provider.control(poison=["POISON"], statuses=[{"status": 503, "share": 0.2, "after": 2}])
    reports = fill(run(max_request_texts=8, usd_per_million_tokens=50.0))
    tokens_billed = provider.ledger()["tokens_billed"]
    assert sum(report.n_tokens for report in reports) == tokens_billed
    assert sum(report.usd for report in reports) == pytest.approx(tokens_billed * 50e-6)
    assert all(report.usd > 0 for report in reports)


def test_progress_tells_songs_up_to_all_and_dollars(songs: Songs, run: Run) -> None:
    songs(*plain_songs(range(1, 41)))
    told: list[Progress] = []
    pipeline = run(max_request_texts=8, concurrency=2, usd_per_million_tokens=1e6)
    export(pipeline)
    pipeline.filler(progress=told.append).fill_ranges([FIRST], lambda _: None)
    assert (told[0].done, told[-1].done) == (0, 40)
    assert {each.total for each in told} == {40}
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert "$282.0000" in told[-1].note, "40 songs of 7 tokens and a probe of 2"


def test_progress_counts_the_songs_of_all_ranges_and_those_that_need_nothing(songs: Songs, run: Run) -> None:
    songs(*plain_songs([*range(1, 11), *range(201, 206)]))
    fill(run())
    songs(*plain_songs([300, 301]), (5, "Another", "Ann", "song"))
    told: list[Progress] = []
    pipeline = run()
    export(pipeline)
    pipeline.filler(progress=told.append).fill_ranges(list(TILING), lambda _: None)
    assert {each.total for each in told} == {17}
    assert (told[0].done, told[-1].done) == (9, 17)
    assert (told[0].n_free, told[-1].n_free) == (9, 14), "three songs are embedded"


def test_rejected_songs_and_vectors_taken_over_are_free_and_a_refused_song_is_not(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs((1, "Song", "Artist", "la"), (2, None, "Artist", "no name"))
    fill(run())
    songs((3, "Song", "Artist", "la"), (4, "Other", "Artist", "la"), (5, "Refused", "Artist", "POISON"))
    provider.control(poison=["POISON"])
    told: list[Progress] = []
    pipeline = run()
    export(pipeline)
    pipeline.filler(progress=told.append).fill_ranges([FIRST], lambda _: None)
    assert (told[-1].total, told[-1].done, told[-1].n_free) == (5, 5, 3)


def test_what_the_provider_answers_wrong_is_told_while_it_is_tried_again_and_counted(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 5)))
    failing = [{"status": 503, "count": 2, "after": 2}, {"status": 429, "count": 1, "after": 4, "retry_after_s": 0.1}]
    provider.control(statuses=failing)
    notes: list[str] = []
    pipeline = run()
    export(pipeline)
    reports: list[FillReport] = []
    pipeline.filler(progress=lambda told: notes.append(told.note)).fill_ranges([FIRST], reports.append)
    assert ["answered 503" in note for note in notes[-4:]] == [True, True, False, False]
    assert "answered 429" in notes[-2]
    assert "next try in" in notes[-2]
    assert "of the quota used, 3 retries, 1 of them after 429" in notes[-1]
    assert (reports[0].n_retries, reports[0].n_limited) == (3, 1)


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


def test_a_run_with_nothing_to_do_sends_nothing_and_writes_nothing(
    songs: Songs, run: Run, provider: Provider, tmp_path: Path
) -> None:
    songs(*plain_songs([*range(1, 20), 500]), (20, "POISON", "Ann", None), (21, None, "Ann", None))
    provider.control(poison=["POISON"])
    fill(run())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    provider.reset_ledger()
    reports = fill(run())
    assert [(report.n_unchanged, report.n_rejected) for report in reports] == [(19, 2), (1, 0)]
    assert provider.ledger()["requests"] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


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


@pytest.mark.parametrize("content", ["", "5", "{}", '{"counts": [1]}', "\x00", '{"version": 1, "files": 3}', "flip"])
def test_a_manifest_that_does_not_parse_is_named_and_costs_no_request(
    songs: Songs, run: Run, provider: Provider, content: str
) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    path = first.cache.storage.root / FIRST.key / "manifest.json"
    good = path.read_text()
    flipped = good.replace('"n_songs":8', '"n_songs":9')
    assert flipped != good
    path.write_text(flipped if content == "flip" else content)
    provider.reset_ledger()
    reports: list[FillReport] = []
    run().filler().fill_ranges([FIRST], reports.append)
    assert str(path) in str(reports[0].error)
    assert "does not parse" in str(reports[0].error)
    path.unlink()
    (report,) = fill(run())
    assert report.n_unchanged == 8
    assert provider.ledger()["requests"] == 0
    assert path.read_text() == good


def test_a_manifest_of_another_version_is_refused_by_its_name(songs: Songs, run: Run) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    path = first.cache.storage.root / FIRST.key / "manifest.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    reports: list[FillReport] = []
    run().filler().fill_ranges([FIRST], reports.append)
    assert type(reports[0].error) is StoreError
    assert "has version 2, expected 1" in str(reports[0].error)


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


def test_a_range_without_a_snapshot_is_left_as_it_is(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    for snapshot in first.store.songs.storage.root.glob("*.parquet"):
        snapshot.unlink()
    reports: list[FillReport] = []
    run().filler().fill_ranges(list(TILING), reports.append)
    assert [type(report.error) for report in reports] == [StoreError]
    assert "songs_parquet" in str(reports[0].error)
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


def test_a_fill_works_inside_a_running_event_loop(songs: Songs, run: Run) -> None:
    """As in a notebook."""
    songs(*plain_songs(range(1, 9)))

    async def begin() -> list[FillReport]:
        return fill(run())

    assert asyncio.run(begin())[0].n_embedded == 8


def test_a_song_without_lyrics_and_one_with_empty_lyrics_share_a_text(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs((1, "Sea", "Ann", None), (2, "Sea", "Ann", ""))
    pipeline = run()
    fill(pipeline)
    assert billed(provider) == {"Sea by Ann": 1}
    assert_stored(pipeline, {1: "Sea by Ann", 2: "Sea by Ann"})


# Refused songs


def test_a_poison_song_is_rejected_with_its_reason_and_its_neighbours_are_paid_once(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 41)), (17, "POISON", "Ann", "x"), (18, "Two", "POISON", "x"), (40, "N", "A", "POISON"))
    provider.control(poison=["POISON"])
    pipeline = run(max_request_texts=32)
    (report,) = fill(pipeline)
    assert (report.n_songs, report.n_embedded, report.n_rejected) == (40, 37, 3)
    assert sorted(song_id for song_id, _ in report.rejected) == [17, 18, 40]
    assert all("400" in reason and "content filter" in reason for _, reason in report.rejected)
    found = stored(pipeline)
    assert {song_id for song_id, answer in found.items() if isinstance(answer, str)} == {17, 18, 40}
    assert found[17] == dict(report.rejected)[17]
    neighbours = plain_texts(sorted(set(range(1, 40)) - {17, 18}))
    assert billed(provider) == dict.fromkeys(neighbours.values(), 1)
    for song_id, text in neighbours.items():
        np.testing.assert_allclose(found[song_id], vector_of(text, 64), atol=1e-6)


def test_a_refused_song_is_sent_again_only_when_its_text_changes(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)), (5, "POISON", "Ann", "x"))
    provider.control(poison=["POISON"])
    fill(run())
    provider.reset_ledger()
    (report,) = fill(run())
    assert (report.n_unchanged, report.n_rejected, report.rejected) == (7, 1, [])
    assert provider.ledger()["requests"] == 0
    songs((5, "Cured", "Ann", "x"))
    last = run()
    (report,) = fill(last)
    assert (report.n_changed, report.n_embedded, report.n_rejected) == (1, 1, 0)
    assert billed(provider) == {"Cured by Ann\nx": 1}
    assert_stored(last, plain_texts(range(1, 9)) | {5: "Cured by Ann\nx"})


def test_a_song_that_becomes_poison_loses_its_old_vector(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)))
    provider.control(poison=["POISON"])
    fill(run())
    songs((5, "POISON", "Ann", "x"))
    last = run()
    (report,) = fill(last)
    assert (report.n_changed, report.n_rejected, report.n_embedded) == (1, 1, 0)
    assert isinstance(stored(last)[5], str)


def test_all_songs_of_a_refused_text_are_rejected(songs: Songs, run: Run, provider: Provider) -> None:
    songs((1, "POISON", "Ann", "x"), (2, "Sea", "Ann", "x"), (3, "POISON", "Ann", "x"))
    provider.control(poison=["POISON"])
    (report,) = fill(run())
    assert report.n_rejected == 2
    assert sorted(song_id for song_id, _ in report.rejected) == [1, 3]


def test_a_request_that_is_too_large_is_halved_until_it_fits(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 41)))
    provider.control(max_request_tokens=60)
    pipeline = run()
    (report,) = fill(pipeline)
    assert (report.n_embedded, report.n_rejected) == (40, 0)
    assert provider.ledger()["texts_billed_twice"] == 0
    assert_stored(pipeline, plain_texts(range(1, 41)))


def test_after_a_request_that_was_too_large_the_next_ones_are_smaller(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs([*range(1, 81), *range(101, 181)]))
    provider.control(max_request_tokens=60)
    pipeline = run(concurrency=1, max_request_texts=32)
    fill(pipeline)
    # 27 texts of 7 tokens are halved to 13 and to 6; all others begin with what was accepted
    assert provider.ledger()["requests_by_status"]["413"] == 2
    assert_stored(pipeline, plain_texts([*range(1, 81), *range(101, 181)]))


def test_one_text_that_is_too_large_does_not_make_the_other_requests_small(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs((1, "Epic", "Ann", "la " * 200), *plain_songs(range(101, 200)))
    provider.control(max_request_tokens=140)
    (_, report) = fill(run(concurrency=1, max_request_texts=20))
    assert report.n_embedded == 99
    assert provider.ledger()["max_texts_in_request"] == 20


def test_a_single_text_that_is_too_large_is_rejected(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 9)), (4, "Epic", "Ann", "la " * 200))
    provider.control(max_request_tokens=60)
    (report,) = fill(run())
    assert (report.n_embedded, report.n_rejected) == (7, 1)
    ((song_id, reason),) = report.rejected
    assert song_id == 4
    assert "413" in reason


def test_too_many_refusals_in_a_row_end_the_run(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 61)), *plain_songs(range(101, 103)))
    provider.control(poison=["Song"])
    reports, error = try_fill(run())
    assert type(error) is ProviderError
    assert "refused" in str(error)
    assert "content filter" in str(error)
    assert [report.range for report in reports] == [FIRST], "the next range is not tried"
    assert reports[0].error is error
    assert provider.ledger()["requests_by_status"]["400"] < 3 * MAX_REFUSALS_IN_A_ROW


def test_a_provider_that_refuses_all_songs_and_a_plain_text_too_sets_no_song_aside(
    songs: Songs, run: Run, provider: Provider
) -> None:
    song_ids = [*range(1, 6), *range(101, 106)]
    songs(*plain_songs(song_ids))
    provider.control(statuses=[{"status": 400, "after": 2}])
    _, error = try_fill(run())
    assert type(error) is ProviderError
    assert "so is a plain one" in str(error)
    assert stored(run()) == {}
    provider.control()
    pipeline = run()
    fill(pipeline)
    assert_stored(pipeline, plain_texts(song_ids))


def test_refusals_are_counted_over_ranges(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([start + song_id for start in range(0, 600, 100) for song_id in range(10)]))
    provider.control(poison=["Song"])
    reports, error = try_fill(run())
    assert type(error) is ProviderError
    assert f"{MAX_REFUSALS_IN_A_ROW} texts in a row" in str(error)
    assert len(stored(run())) <= MAX_REFUSALS_IN_A_ROW
    assert len(reports) < 6


def test_songs_that_were_refused_for_no_fault_of_theirs_are_sent_again(
    songs: Songs, run: Run, provider: Provider
) -> None:
    """The run ended because the fault was found not to be the songs': none of them may stay rejected for it."""
    songs(*plain_songs(range(1, 61)))
    provider.control(poison=["Song"])
    _, error = try_fill(run())
    assert isinstance(error, ProviderError)
    provider.control()
    last = run()
    fill(last)
    assert_stored(last, plain_texts(range(1, 61)))


def test_many_refused_songs_between_good_ones_do_not_end_the_run(songs: Songs, run: Run, provider: Provider) -> None:
    n_poison = 2 * MAX_REFUSALS_IN_A_ROW // 2 + 10
    bad = list(range(1, 2 * n_poison, 2))
    songs(*plain_songs(range(1, 2 * n_poison)), *((song_id, f"POISON {song_id}", "Ann", "x") for song_id in bad))
    provider.control(poison=["POISON"])
    (report,) = fill(run(max_request_texts=16))
    assert report.n_rejected == n_poison > MAX_REFUSALS_IN_A_ROW
    assert report.n_embedded == n_poison - 1


# Limits and refusals before payment


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_budget_stops_before_it_is_exceeded_and_a_higher_one_pays_only_for_the_rest(
    songs: Songs, run: Run, provider: Provider, concurrency: int
) -> None:
    song_ids = [*range(1, 41), *range(101, 141)]
    songs(*plain_songs(song_ids))
    provider.control(latency_s=0.02)
    # a dollar a token: 7 a song, 28 a request, 2 for the probe
    settings = {"max_request_texts": 4, "concurrency": concurrency, "usd_per_million_tokens": 1e6}
    first = run(**settings)
    reports, error = try_fill(first, max_usd=400)
    assert isinstance(error, BudgetExceededError)
    assert "SONGVEC_MAX_USD" in str(error)
    assert {report.range.start: report.error for report in reports} == {0: None, 100: error}
    paid = provider.ledger()["tokens_billed"]
    assert 400 - 28 * 2 < paid <= 400
    assert len(stored(first)) == len(billed(provider)) == (paid - 2) // 7, "all that is paid for is kept"
    assert sum(report.n_tokens for report in reports) == paid
    second = run(**settings)
    fill(second, max_usd=400)
    assert billed(provider) == dict.fromkeys(plain_texts(song_ids).values(), 1)
    assert_stored(second, plain_texts(song_ids))


def test_all_processes_of_a_run_share_its_budget_and_another_run_has_its_own(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs([*range(1, 9), *range(101, 109), *range(201, 209)]))
    settings = {"max_request_texts": 4, "usd_per_million_tokens": 1e6}
    export(run(**settings))

    def spend(start: int, name: str) -> None:
        filler = run(max_usd=100, **settings).filler(run=name)
        filler.fill_ranges([SongIdRange(start, start + 100)], lambda _: None)

    # 28 a request and 2 for the probe: 58 a range
    spend(0, "one")
    with pytest.raises(BudgetExceededError, match=r"\$88\.0000 billed, \$0\.0000 reserved"):
        spend(100, "one")
    assert provider.ledger()["tokens_billed"] <= 100
    spend(200, "other")


def test_answers_that_were_spoilt_after_billing_count_against_the_budget_and_are_told(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 81)))
    provider.control(corrupt="not_json", corrupt_share=0.8, seed=3)
    reports, error = try_fill(run(max_request_texts=4, concurrency=2, usd_per_million_tokens=1e6), max_usd=400)
    assert isinstance(error, BudgetExceededError)
    billed_tokens, probe_tokens = provider.ledger()["tokens_billed"], 2 * provider.texts()["probe"]
    assert 400 - 2 * 28 < billed_tokens <= 400 + probe_tokens
    assert sum(report.n_tokens for report in reports) == pytest.approx(billed_tokens, abs=probe_tokens)


def test_a_budget_of_nothing_sends_nothing(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 5)))
    _, error = try_fill(run(), max_usd=0)
    assert isinstance(error, BudgetExceededError)
    assert provider.ledger()["requests"] == 0


def test_the_budget_of_the_settings_holds_where_a_run_names_none(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 5)))
    _, error = try_fill(run(max_usd=1e-9))
    assert isinstance(error, BudgetExceededError)
    assert provider.ledger()["requests"] == 0
    assert try_fill(run(max_usd=1e-9), max_usd=1)[1] is None


def test_a_tail_with_more_songs_than_a_range_is_refused_before_any_payment(
    songs: Songs, run: Run, provider: Provider
) -> None:
    ids = range(TILING.stop, TILING.stop + TILING.width)
    songs(*plain_songs(ids))
    fill(run())
    provider.reset_ledger()
    songs(*plain_songs([TILING.stop + 5_000_000]))
    overfull = run()
    with pytest.raises(SongvecError, match=r"101 songs.*SONGVEC_SONG_ID_STOP"):
        fill(overfull)
    assert provider.ledger()["requests"] == 0
    assert_stored(overfull, plain_texts(ids))


def test_an_overfull_tail_that_was_exported_all_the_same_is_not_paid_for(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs([1, 2]))
    pipeline = run()
    filler = pipeline.filler()  # it counts the tail, too: these songs come later
    songs(*plain_songs(range(1000, 1101)))
    wider = Tiling(width=1000, stop=TILING.stop)
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, wider)
    reports: list[FillReport] = []
    with pytest.raises(SongvecError, match=r"101 songs.*SONGVEC_SONG_ID_STOP") as caught:
        filler.fill_ranges([TILING.tail], reports.append)
    assert [(report.range, report.error) for report in reports] == [(TILING.tail, caught.value)]
    assert provider.ledger()["requests"] == 0


@pytest.mark.parametrize(
    "other",
    [{"embedding_dimensions": 32}, {"embedding_model": "accounts/fireworks/models/qwen3-embedding-8b"}],
    ids=["size", "model"],
)
def test_a_table_of_another_model_or_size_is_refused_before_any_request(
    songs: Songs, run: Run, provider: Provider, other: dict[str, object]
) -> None:
    songs(*plain_songs([*range(1, 5), 200]))
    first = run()
    fill(first)
    upload(first.database, first.cache, first.table_spec, first.tiling)
    provider.reset_ledger()
    second = run(**other)
    reports, error = try_fill(second)
    assert isinstance(error, TableMismatchError)
    assert [(report.range, report.error) for report in reports] == [(FIRST, error)]
    assert provider.ledger()["requests"] == 0
    assert second.cache.ranges() == []
    assert fill(run())[0].n_unchanged == 4


# Several runs at once


def test_of_two_runs_on_a_range_one_pays_and_the_other_waits(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 41)))
    provider.control(latency_s=0.1)
    pipelines = [run(max_request_texts=8, concurrency=1) for _ in range(2)]
    export(pipelines[0])
    reports: list[list[FillReport]] = [[], []]
    notes: list[list[str]] = [[], []]
    begin = threading.Barrier(2)

    def work(number: int) -> None:
        filler = pipelines[number].filler(progress=lambda each: notes[number].append(each.note))
        begin.wait()
        filler.fill_ranges([FIRST], reports[number].append)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((one,), (other,)) = sorted(reports, key=lambda each: each[0].n_embedded, reverse=True)
    assert (one.n_embedded, one.error) == (40, None)
    assert (other.n_embedded, other.n_unchanged, other.n_tokens, other.error) == (0, 40, 0, None)
    assert sum(any("another run fills 000000000-000000100" in note for note in told) for told in notes) == 1
    assert provider.texts() == dict.fromkeys(["probe", *plain_texts(range(1, 41)).values()], 1)
    assert provider.ledger()["max_in_flight"] == 1
    assert_stored(pipelines[0], plain_texts(range(1, 41)))


def test_runs_on_different_ranges_do_not_wait_for_each_other(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([1, 150]))
    provider.control(latency_s=0.5)
    pipelines = [run(), run()]
    export(pipelines[0])
    begin = threading.Barrier(2)
    notes: list[str] = []
    reports: list[FillReport] = []

    def work(pipeline: Pipeline, song_range: SongIdRange) -> None:
        filler = pipeline.filler(progress=lambda told: notes.append(told.note))
        begin.wait()
        filler.fill_ranges([song_range], reports.append)

    ranges = [FIRST, SongIdRange(100, 200)]
    threads = [threading.Thread(target=work, args=each) for each in zip(pipelines, ranges, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.n_embedded for report in reports] == [1, 1]
    assert not any("another run" in note for note in notes)
    assert provider.ledger()["max_in_flight"] == 2


def test_a_run_that_waits_for_another_can_be_stopped(
    songs: Songs, run: Run, database: Database, provider: Provider
) -> None:
    songs(*plain_songs([1]))
    pipeline = run()
    export(pipeline)
    threading.Timer(0.3, pipeline.cancel).start()
    started = time.monotonic()
    with (
        hold_lock(database, lock_name(FIRST), on_wait=lambda: None, check=lambda: None),
        pytest.raises(StoppedError),
    ):
        pipeline.filler().fill_ranges([FIRST], lambda _: None)
    assert time.monotonic() - started < 5
    assert provider.ledger()["requests"] == 0


def test_a_run_that_loses_its_hold_on_a_range_ends_instead_of_paying_beside_another(
    songs: Songs, run: Run, database: Database, provider: Provider
) -> None:
    """A failover or a firewall breaks the session that holds the range: from then on another run may fill it."""
    songs(*plain_songs(range(1, 81)))
    provider.control(latency_s=0.1)
    first, second = (run(max_request_texts=8, concurrency=1) for _ in range(2))
    export(first)

    def break_locks_once(told: Progress) -> None:
        if told.done == 16:
            with database.get_connection() as connection:
                connection.execute(
                    sa.text("""
                        SELECT pg_terminate_backend(pid) FROM pg_locks
                        WHERE locktype = 'advisory' AND pid <> pg_backend_pid()
                          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    """)
                )

    with pytest.raises(DatabaseError):
        first.filler(progress=break_locks_once).fill_ranges([FIRST], lambda _: None)
    assert len(billed(provider)) < 40
    assert len(stored(first)) == len(billed(provider)), "what is paid for is kept"
    fill(second)
    assert set(billed(provider).values()) == {1}
    assert_stored(second, plain_texts(range(1, 81)))


# A provider that fails


@pytest.mark.usefixtures("one_range_at_a_time")
def test_a_range_whose_provider_is_down_fails_and_the_next_is_tried(songs: Songs, run: Run, provider: Provider) -> None:
    song_ids = [1, 101, 201]
    songs(*plain_songs(song_ids))

    def react(report: FillReport) -> None:
        provider.control(**(down() if report.range.start == 0 else {}))

    pipeline = run(patience_s=0.2)
    reports, error = try_fill(pipeline, report=react)
    assert error is None
    assert [type(report.error) for report in reports] == [type(None), ProviderUnavailableError, type(None)]
    assert [report.n_embedded for report in reports] == [1, 0, 1]
    assert set(stored(pipeline)) == {1, 201}
    fill(run())
    assert billed(provider) == dict.fromkeys(plain_texts(song_ids).values(), 1)


def test_two_ranges_in_a_row_without_the_provider_end_the_run(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([1, 101, 201]))
    provider.control(**down())
    reports, error = try_fill(run(patience_s=0.2))
    assert isinstance(error, ProviderUnavailableError)
    assert [type(report.error) for report in reports] == [ProviderUnavailableError] * 2
    assert reports[1].error is error


@pytest.mark.usefixtures("one_range_at_a_time")
def test_two_ranges_that_fail_with_a_good_one_between_do_not_end_the_run(
    songs: Songs, run: Run, provider: Provider
) -> None:
    song_ids = [1, 101, 201, 301]
    songs(*plain_songs(song_ids))

    def react(report: FillReport) -> None:
        provider.control(**(down() if report.range.start == 100 else {}))

    provider.control(**down())
    reports, error = try_fill(run(patience_s=0.2), report=react)
    assert error is None
    assert [report.error is None for report in reports] == [False, True, False, True]


@pytest.mark.parametrize("status", [401, 503])
def test_answers_on_their_way_when_another_request_fails_are_stored(
    songs: Songs, run: Run, provider: Provider, status: int
) -> None:
    songs(*plain_songs(range(1, 61)))
    failing = {"status": status, "after": 4, "retry_after_s": 600}
    provider.control(latency_s=0.4, statuses=[failing])
    pipeline = run(max_request_texts=8, concurrency=4, patience_s=5)
    reports, error = try_fill(pipeline)
    assert reports[0].error is not None
    assert isinstance(reports[0].error, ProviderError)
    assert (error is None) == (status == 503)
    assert set(billed(provider).values()) == {1}
    assert len(billed(provider)) == 16, "the probe, two good requests, then failures"
    assert set(stored(pipeline)) == {
        song_id for song_id, text in plain_texts(range(1, 61)).items() if text in billed(provider)
    }
    assert reports[0].n_embedded == 16
    assert provider.ledger()["requests"] <= 1 + 4, "no further request starts"


def test_an_answer_that_ends_the_run_ends_it_for_the_requests_that_wait_too(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 91)))
    provider.control(statuses=[{"status": 402, "after": 3}])
    _, error = try_fill(run(max_request_texts=4, concurrency=32, requests_per_minute=240))
    assert type(error) is ProviderError
    # the bucket is four requests deep: those may be on their way when the first 402 comes
    assert provider.ledger()["requests_by_status"]["402"] <= 4


def test_a_key_that_is_wrong_ends_the_run_at_the_first_range(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([1, 101]))
    reports, error = try_fill(run(fireworks_api_key="wrong"))
    assert type(error) is ProviderError
    assert "FIREWORKS_API_KEY" in str(error)
    assert [report.error for report in reports] == [error]
    assert provider.ledger()["requests"] == 1


def test_a_provider_that_does_everything_wrong_at_times_still_yields_every_vector(
    songs: Songs, run: Run, provider: Provider
) -> None:
    song_ids = [*range(1, 100), *range(200, 260)]
    songs(*plain_songs(song_ids), (60, "POISON", "Ann", "x"))
    provider.control(
        seed=5,
        latency_s=(0.0, 0.02),
        refuse_base64=True,
        refuse_dimensions=True,
        native_dimensions=256,
        statuses=[
            {"status": 429, "count": 4, "after": 8, "retry_after_s": 0.05},
            {"status": 502, "count": 4, "after": 16},
        ],
        reset=0.3,
        truncate=0.1,
        reorder=True,
        corrupt="duplicate_index",
        corrupt_share=0.1,
        poison=["POISON"],
        max_request_tokens=60,
    )
    pipeline = run(max_request_texts=16, concurrency=4)
    reports = fill(pipeline)
    assert [report.rejected[0][0] for report in reports if report.rejected] == [60]
    found = stored(pipeline)
    for song_id, text in plain_texts(song_ids).items():
        if song_id != 60:
            np.testing.assert_allclose(found[song_id], vector_of(text, 64), atol=1e-6, err_msg=text)
    assert {"429", "502", "reset", "413", "400"} <= set(provider.ledger()["requests_by_status"])


# Stopping


def test_a_run_that_is_stopped_keeps_what_was_on_its_way_and_a_later_one_sends_the_rest(
    songs: Songs, run: Run, provider: Provider
) -> None:
    song_ids = [*range(1, 81), 150]
    songs(*plain_songs(song_ids))
    provider.control(latency_s=0.3)
    first = run(max_request_texts=8, concurrency=2)
    export(first)
    reports: list[FillReport] = []

    def stop_once_answered(told: Progress) -> None:
        if told.done:
            first.cancel()

    with pytest.raises(StoppedError):
        first.filler(progress=stop_once_answered).fill_ranges(list(first.tiling), reports.append)
    assert [type(report.error) for report in reports] == [StoppedError]
    assert 0 < reports[0].n_embedded < 80
    assert len(stored(first)) == len(billed(provider)) == reports[0].n_embedded
    provider.control()
    second = run()
    fill(second)
    assert billed(provider) == dict.fromkeys(plain_texts(song_ids).values(), 1)
    assert_stored(second, plain_texts(song_ids))
