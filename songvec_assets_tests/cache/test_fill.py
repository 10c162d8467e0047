"""Filling ranges from a real database, with a real provider that misbehaves: what is sent, stored, paid and refused."""

import asyncio
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.cache.fill import MAX_OPEN_RANGES
from songvec_assets.cache.model_cache import lock_name
from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import (
    BudgetExceededError,
    DatabaseError,
    ProviderError,
    ProviderUnavailableError,
    SongvecError,
    StoppedError,
    TableMismatchError,
)
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import Progress
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets_tests.cache.filling import (
    FIRST,
    Run,
    Songs,
    assert_stored,
    billed,
    down,
    export,
    fill,
    plain_songs,
    plain_texts,
    stored,
    try_fill,
)
from songvec_assets_tests.conftest import TILING
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.vectors.conftest import upload


@pytest.mark.slow
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


def test_a_fill_works_inside_a_running_event_loop(songs: Songs, run: Run) -> None:
    """As in a notebook."""
    songs(*plain_songs(range(1, 9)))

    async def begin() -> list[FillReport]:
        return fill(run())

    assert asyncio.run(begin())[0].n_embedded == 8


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


def test_a_key_that_is_wrong_ends_the_run_at_the_first_range(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs([1, 101]))
    reports, error = try_fill(run(fireworks_api_key="wrong"))
    assert type(error) is ProviderError
    assert "FIREWORKS_API_KEY" in str(error)
    assert [report.error for report in reports] == [error]
    assert provider.ledger()["requests"] == 1


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
