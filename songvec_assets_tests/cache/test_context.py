"""What all requests of a run share: the requests in flight, the budget, and what is reported."""

import pytest

from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import (
    BudgetExceededError,
)
from songvec_assets.progress import Progress
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.cache.filling import FIRST, Run, Songs, export, fill, plain_songs, try_fill
from songvec_assets_tests.conftest import TILING
from songvec_assets_tests.provider import Provider


def test_all_ranges_together_keep_to_the_requests_in_flight(songs: Songs, run: Run, provider: Provider) -> None:
    song_ids = [*range(1, 25), *range(101, 125), *range(201, 225)]
    songs(*plain_songs(song_ids))
    provider.control(latency_s=0.1)
    fill(run(max_request_texts=4, concurrency=3))
    assert provider.ledger()["max_in_flight"] == 3


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
