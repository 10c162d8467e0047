"""The texts of a range in requests: divided if refused, stored as answers arrive."""

import asyncio
from collections.abc import Coroutine

import numpy as np
import pytest

from songvec_assets.cache import fill as fill_module
from songvec_assets.errors import (
    ProviderError,
)
from songvec_assets_tests.cache.filling import (
    Run,
    Songs,
    assert_stored,
    billed,
    export,
    fill,
    plain_songs,
    plain_texts,
    stored,
    try_fill,
)
from songvec_assets_tests.provider import Provider, vector_of


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


def test_requests_that_are_abandoned_in_flight_count_as_billed(
    songs: Songs, run: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that are cancelled, as at the end of an event loop: the provider bills what it has received."""
    songs(*plain_songs(range(1, 21)))
    provider.control(hold_after=1)
    pipeline = run(max_request_texts=5)
    export(pipeline)

    def run_until_in_flight(work: Coroutine[object, object, None]) -> None:
        async def interrupt() -> None:
            filling = asyncio.create_task(work)
            while await asyncio.to_thread(provider.count_in_flight) < 4:
                await asyncio.sleep(0.01)
            abandoned = asyncio.all_tasks() - {asyncio.current_task()}
            for task in abandoned:
                task.cancel()
            await asyncio.wait(abandoned)
            await filling

        asyncio.run(interrupt())

    monkeypatch.setattr(fill_module, "run_event_loop", run_until_in_flight)
    with pytest.raises(asyncio.CancelledError):
        pipeline.embed()
    spent = pipeline.month_spending()
    assert pipeline.price.usd(20 * 6) < spent.billed < pipeline.price.usd(20 * 12), "20 texts of about 7 tokens"
    assert spent.reserved == 0


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


@pytest.mark.slow
def test_an_answer_that_ends_the_run_ends_it_for_the_requests_that_wait_too(
    songs: Songs, run: Run, provider: Provider
) -> None:
    songs(*plain_songs(range(1, 91)))
    provider.control(statuses=[{"status": 402, "after": 3}])
    _, error = try_fill(run(max_request_texts=4, concurrency=32, requests_per_minute=240))
    assert type(error) is ProviderError
    # the bucket is four requests deep: those may be on their way when the first 402 comes
    assert provider.ledger()["requests_by_status"]["402"] <= 4


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
