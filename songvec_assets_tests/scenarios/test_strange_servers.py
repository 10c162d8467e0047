"""Fills against servers with the oddities of real ones: what is kept, billed and rejected, and what stops a run.

A scenario across embedding and cache. The oddities are named in `provider/faults.py`, with their sources.
"""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from songvec_assets.cache import fill as fill_module
from songvec_assets.embedding import client as client_module
from songvec_assets.embedding import contact as contact_module
from songvec_assets.embedding.health import MAX_BAD_TEXTS
from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.embedding.reservation import Reservation
from songvec_assets.errors import (
    BudgetExceededError,
    DatabaseError,
    ProviderError,
    ProviderUnavailableError,
    ServerFailingError,
    StoppedError,
)
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.administration import execute, free_port
from songvec_assets_tests.cache.conftest import run
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
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow

__all__ = ["run"]

IMPORTANCE = "Importance by Ann\nla"
PAID = {"usd_per_million_tokens": 1e6}
"""A dollar a token."""


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 0.02)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that hang up after a second."""
    monkeypatch.setattr(client_module, "BASE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(client_module, "TOKENS_PER_SECOND", 1e9)


def songs_but(bad: dict[int, tuple[str, str, str]], n_songs: int) -> list[tuple[int, str, str, str]]:
    """Plain songs from 1 on, some of them replaced."""
    return [(song_id, *bad[song_id]) if song_id in bad else song for song_id, *_ in plain_songs(range(1, n_songs + 1))
            for song in plain_songs([song_id])]  # fmt: skip


class TestATextThatGetsNoVector:
    def test_is_rejected_by_name_and_its_neighbours_are_paid_once(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        bad = {17: ("Importance", "Ann", "la"), 205: ("Importance", "Ben", "lo")}
        songs(*songs_but(bad, 299))
        provider.control(nan=["Importance"])
        pipeline = run()
        reports = fill(pipeline)
        assert sorted(song_id for report in reports for song_id, _ in report.rejected) == [17, 205]
        assert all("zero, null or not finite" in reason for report in reports for _, reason in report.rejected)
        found = stored(pipeline)
        assert len(found) == 299
        assert {song_id for song_id, answer in found.items() if isinstance(answer, str)} == {17, 205}
        neighbours = plain_texts(sorted(set(range(1, 300)) - {17, 205}))
        times = billed(provider)
        assert {times[text] for text in neighbours.values()} == {1}
        assert times[IMPORTANCE] == 3, "with others, without them, and alone once more"
        requests = provider.ledger()["requests"]
        fill(run())
        assert provider.ledger()["requests"] == requests, "the next run does not send it again"

    @pytest.mark.parametrize("as_floats", [False, True])
    def test_that_spoils_its_whole_answer_is_found_by_halving(
        self, songs: Songs, run: Run, provider: Provider, as_floats: bool
    ) -> None:
        songs(*songs_but({33: ("Importance", "Ann", "la")}, 64))
        provider.control(nan=["Importance"], nan_spoils=True, refuse_base64=as_floats)
        pipeline = run()
        (report,) = fill(pipeline)
        assert [song_id for song_id, _ in report.rejected] == [33]
        assert sum(not isinstance(answer, str) for answer in stored(pipeline).values()) == 63
        n_probes = provider.texts()["probe"] + (1 if as_floats else 0)
        assert provider.ledger()["requests"] - n_probes <= 2 + 2 * math.log2(64) + 1

    @pytest.mark.parametrize("status", [500, 503, 0])
    def test_but_an_error_each_time_is_rejected_with_the_servers_words(
        self, songs: Songs, run: Run, provider: Provider, status: int
    ) -> None:
        songs(*songs_but({117: ("Epic", "Ann", "la")}, 299))
        provider.control(fail=["Epic"], fail_status=status)
        pipeline = run()
        reports = fill(pipeline)
        ((song_id, reason),) = [each for report in reports for each in report.rejected]
        assert song_id == 117
        assert reason.startswith(f"{provider.base_url} ")
        assert ("too large to process" in reason) == bool(status)
        neighbours = set(plain_texts(sorted(set(range(1, 300)) - {117})).values())
        assert billed(provider) == dict.fromkeys(neighbours, 1)

    def test_is_refused_inside_a_200_as_outside_of_it(self, songs: Songs, run: Run, provider: Provider) -> None:
        songs(*songs_but({5: ("POISON", "Ann", "la")}, 40))
        provider.control(poison=["POISON"], poison_inside=True)
        (report,) = fill(run(**PAID))
        ((song_id, reason),) = report.rejected
        assert song_id == 5
        assert "text refused by the content filter" in reason
        assert report.n_tokens == provider.ledger()["tokens_billed"], "an error object is not billed"

    def test_is_sent_again_to_another_server_or_when_somebody_asks_for_it(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*songs_but({5: ("POISON", "Ann", "la")}, 40))
        provider.control(poison=["POISON"])
        fill(run())
        provider.reset_ledger()
        (report,) = fill(run())
        assert (report.n_rejected, provider.ledger()["requests"]) == (1, 0)
        again = run()
        again.filler(retry_rejected=True).fill_ranges([SongIdRange(0, 100)], lambda _: None)
        assert provider.ledger()["requests_by_status"]["400"] == 1
        assert isinstance(stored(again)[5], str)
        provider.control()
        other = run(fireworks_base_url=provider.base_url.replace("127.0.0.1", "localhost"))
        assert other.read_inventory(with_table=False, with_source=False).behind == [SongIdRange(0, 100)]
        (report,) = fill(other)
        assert (report.n_embedded, report.n_rejected) == (1, 0)
        assert not isinstance(stored(other)[5], str)


class TestAServerThatIsSick:
    @pytest.mark.parametrize("max_request_texts", [1, 16])
    def test_with_nan_for_everything_ends_the_run_and_rejects_nothing(
        self, songs: Songs, run: Run, provider: Provider, max_request_texts: int
    ) -> None:
        song_ids = range(1, 161)
        songs(*plain_songs(song_ids))
        pipeline = run(max_request_texts=max_request_texts, concurrency=4)
        sick = threading.Event()

        def fall_sick(progress: Progress) -> None:
            # after it was found to understand what it is asked
            if progress.done and not sick.is_set():
                provider.control(nan=["Song", "probe"])
                sick.set()

        export(pipeline)
        with pytest.raises(ProviderError, match="the fault is the server's"):
            pipeline.filler(progress=fall_sick).fill_ranges([SongIdRange(0, 100)], lambda _: None)
        assert not any(isinstance(answer, str) for answer in stored(pipeline).values())
        n_twice = sum(count - 1 for text, count in billed(provider).items())
        assert n_twice <= 4 * max_request_texts, "what was in flight when a good answer came, and nothing else"
        provider.control()
        last = run()
        fill(last)
        assert_stored(last, plain_texts(song_ids))

    def test_with_500_for_everything_ends_when_patience_does_and_rejects_nothing(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*plain_songs([*range(1, 41), *range(101, 141)]))
        provider.control(statuses=[{"status": 500, "after": 3}])
        _, error = try_fill(run(max_request_texts=8, patience_s=1.0))
        assert isinstance(error, ProviderUnavailableError)
        assert not any(isinstance(answer, str) for answer in stored(run()).values())
        provider.control()
        fill(run())
        assert set(billed(provider).values()) == {1}

    def test_for_more_texts_than_can_be_at_fault_rejects_none_of_them(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        bad = {song_id: (f"Importance {song_id}", "Ann", "la") for song_id in range(10, 10 + MAX_BAD_TEXTS + 1)}
        songs(*songs_but(bad, 99))
        provider.control(nan=["Importance"])
        for _ in range(2):
            (report,), _ = try_fill(run())
            assert type(report.error) is ServerFailingError
            assert "too many for the songs to be at fault" in str(report.error)
            assert set(stored(run())) == set(range(1, 100)) - set(bad), "the good ones are kept, no other is rejected"

    def test_for_a_handful_in_one_range_is_not_sick_once_the_others_show_it(
        self, songs: Songs, run: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Four of a range's 99 may be the server; four of 899 are not."""
        monkeypatch.setattr(fill_module, "MAX_OPEN_RANGES", 1)
        bad = {song_id: (f"Importance {song_id}", "Ann", "la") for song_id in range(10, 14)}
        songs(*songs_but(bad, 899))
        provider.control(nan=["Importance"])
        reports, error = try_fill(run())
        assert error is None
        assert [type(report.error) for report in reports] == [ServerFailingError, *[type(None)] * 8]
        assert sum(report.n_rejected for report in fill(run())) == 4

    def test_for_a_while_rejects_no_text_that_was_sent_alone(self, songs: Songs, run: Run, provider: Provider) -> None:
        """One song changed; the server is away for all the tries that a text gets, and back at the next plain text."""
        songs(*plain_songs(range(1, 41)))
        fill(run())
        songs((7, "Another", "Ann", "la"))
        provider.control(statuses=[{"status": 503, "count": client_module.MAX_ALIKE + 1, "after": 2}])
        pipeline = run()
        (report,) = fill(pipeline)
        assert (report.n_embedded, report.n_rejected) == (1, 0)
        assert_stored(pipeline, plain_texts(range(1, 41)) | {7: "Another by Ann\nla"})

    def test_by_nothing_but_few_texts_is_not_sick(self, songs: Songs, run: Run, provider: Provider) -> None:
        bad = {song_id: (f"Importance {song_id}", "Ann", "la") for song_id in range(10, 10 + MAX_BAD_TEXTS)}
        songs(*songs_but(bad, 99))
        provider.control(nan=["Importance"])
        (report,) = fill(run())
        assert report.n_rejected == MAX_BAD_TEXTS


def refusals(provider: Provider) -> int:
    """How many requests were refused."""
    by_status = provider.ledger()["requests_by_status"]
    return sum(by_status.get(status, 0) for status in ("400", "413", "422"))


class TestAServerThatTakesFewTexts:
    @pytest.mark.parametrize(
        ("mode", "most", "learned"),
        [("tei", 32, 32), ("dashscope", 10, 10), ("siliconflow", 64, 64), ("litellm", 10, 6)],
    )
    def test_is_refused_for_it_by_the_first_requests_and_then_once_in_a_while(
        self, songs: Songs, run: Run, provider: Provider, mode: str, most: int, learned: int
    ) -> None:
        """Each request of each range would else be divided again and again."""
        song_ids = [start + song_id for start in range(0, 900, 100) for song_id in range(1, 100)]
        songs(*plain_songs(song_ids))
        provider.control(mode=mode, every=None)
        pipeline, notes = run(concurrency=4), list[Progress]()
        export(pipeline)
        pipeline.filler(progress=notes.append).fill_ranges(list(pipeline.tiling), lambda _: None)
        assert_stored(pipeline, plain_texts(song_ids))
        assert provider.ledger()["texts_billed_twice"] == 0
        # five steps down at most, and then a larger one tried after 16, 32, 64, … accepted ones
        assert refusals(provider) <= 5 + 4, provider.ledger()
        assert provider.ledger()["requests_by_status"]["200"] <= 2 * len(song_ids) / most + 9
        (note,) = [each.note for each in notes if "SONGVEC_MAX_REQUEST_TEXTS" in each.note]
        assert f"Set SONGVEC_MAX_REQUEST_TEXTS={learned} " in note

    def test_is_not_what_one_bad_text_makes_of_it(self, songs: Songs, run: Run, provider: Provider) -> None:
        songs(*songs_but({5: ("POISON", "Ann", "la")}, 299))
        provider.control(mode="openrouter")
        pipeline, notes = run(concurrency=1), list[Progress]()
        export(pipeline)
        pipeline.filler(progress=notes.append).fill_ranges(list(pipeline.tiling), lambda _: None)
        assert [note for note in notes if "SONGVEC_MAX_REQUEST_TEXTS" in note.note] == []
        assert provider.ledger()["max_texts_in_request"] >= 99
        assert isinstance(stored(pipeline)[5], str)

    def test_and_has_a_bad_text_besides(self, songs: Songs, run: Run, provider: Provider) -> None:
        songs(*songs_but({5: ("POISON", "Ann", "la"), 150: ("POISON", "Ben", "lo")}, 299))
        provider.control(mode="litellm", poison=["POISON"])
        reports = fill(run(concurrency=2))
        assert sorted(song_id for report in reports for song_id, _ in report.rejected) == [5, 150]
        neighbours = set(plain_texts(sorted({*range(1, 300)} - {5, 150})).values())
        assert billed(provider) == dict.fromkeys(neighbours, 1)


class TestAServerThatIsOdd:
    def test_as_gemini_gets_its_vectors_by_place(self, songs: Songs, run: Run, provider: Provider) -> None:
        songs(*plain_songs(range(1, 300)))
        provider.control(mode="gemini", model="gemini-embedding-001")
        pipeline = run(embedding_model="gemini-embedding-001")
        fill(pipeline)
        assert_stored(pipeline, plain_texts(range(1, 300)))

    def test_and_names_no_index_at_all_gets_its_vectors_by_place(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*plain_songs(range(1, 100)))
        provider.control(index="none")
        pipeline = run()
        fill(pipeline)
        assert_stored(pipeline, plain_texts(range(1, 100)))

    def test_as_vllm_under_an_alias_has_its_vectors_cut_where_that_is_allowed(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*plain_songs(range(1, 100)))
        provider.control(mode="vllm", model="my-embedder")
        _, error = try_fill(run(embedding_model="my-embedder"))
        assert "gives 4096" in str(error)
        assert "SONGVEC_TRUNCATE=yes" in str(error)
        assert "SONGVEC_EMBEDDING_DIMENSIONS" not in str(error), "over 4,000 values there is no column for them"
        pipeline = run(embedding_model="my-embedder", truncate=True)
        fill(pipeline)
        assert_stored(pipeline, plain_texts(range(1, 100)))

    @pytest.mark.parametrize(
        ("native", "advice"),
        [
            (1024, "set SONGVEC_EMBEDDING_DIMENSIONS=1024, or set SONGVEC_TRUNCATE=yes"),
            (3072, "set SONGVEC_EMBEDDING_DIMENSIONS=3072 and SONGVEC_VECTOR_TYPE=halfvec, or set SONGVEC_TRUNCATE"),
        ],
    )
    def test_in_its_size_gets_advice_that_can_be_followed(
        self, songs: Songs, run: Run, provider: Provider, native: int, advice: str
    ) -> None:
        songs(*plain_songs(range(1, 10)))
        provider.control(mode="vllm", model="my-embedder", native_dimensions=native)
        _, error = try_fill(run(embedding_model="my-embedder"))
        assert advice in str(error)
        followed = {"embedding_dimensions": native, "vector_type": "halfvec" if native > 2000 else "vector"}
        (report,) = fill(run(embedding_model="my-embedder", **followed))
        assert report.n_embedded == 9

    def test_in_its_size_and_is_not_to_be_cut_is_refused_though_its_model_is_known(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*plain_songs(range(1, 10)))
        provider.control(refuse_dimensions=True)
        _, error = try_fill(run(truncate=False))
        assert "is not to be truncated" in str(error)

    @pytest.mark.parametrize("status", [424, 418])
    def test_now_and_then_is_tried_again(self, songs: Songs, run: Run, provider: Provider, status: int) -> None:
        songs(*plain_songs(range(1, 300)))
        provider.control(mode="tei", every_status=status)
        pipeline = run(max_request_texts=4)
        fill(pipeline)
        assert_stored(pipeline, plain_texts(range(1, 300)))
        assert provider.ledger()["requests_by_status"][str(status)] >= 3
        assert set(billed(provider).values()) == {1}

    @pytest.mark.parametrize(
        ("faults", "status"),
        [({"fail": ["LONG"], "fail_status": 424}, 424), ({"mode": "llama.cpp"}, 500)],
        ids=["424", "llama.cpp"],
    )
    def test_for_one_text_with_a_status_of_its_own_is_divided(
        self, songs: Songs, run: Run, provider: Provider, faults: dict[str, Any], status: int
    ) -> None:
        songs(*songs_but({117: ("LONG", "Ann", "la")}, 299))
        provider.control(**faults)
        reports = fill(run())
        ((song_id, reason),) = [each for report in reports for each in report.rejected]
        assert (song_id, f"answered {status}" in reason) == (117, True)


def billed_once(provider: Provider, song_ids: range) -> bool:
    """Whether each of these plain songs, and no other, was billed, and once."""
    return billed(provider) == dict.fromkeys(plain_texts(song_ids).values(), 1)


class TestAServerOfAPublicReport:
    """Each was somebody's bug: `provider/modes.py` has where it was read."""

    @pytest.mark.parametrize(
        ("mode", "faults"),
        [("vertex", {"max_texts": 25, "max_request_tokens": 160}), ("openai", {"max_request_tokens": 160})],
    )
    def test_and_takes_few_tokens_in_a_request_gets_smaller_ones(
        self, songs: Songs, run: Run, provider: Provider, mode: str, faults: dict[str, Any]
    ) -> None:
        song_ids = range(1, 61)
        songs(*plain_songs(song_ids))
        provider.control(mode=mode, **faults)
        pipeline = run()
        fill(pipeline)
        assert_stored(pipeline, plain_texts(song_ids))
        assert billed_once(provider, song_ids)
        assert refusals(provider) == 2

    def test_and_forgets_a_connection_is_asked_again_on_another(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        song_ids = range(1, 61)
        songs(*plain_songs(song_ids))
        provider.control(mode="idle reset")
        pipeline, notes = run(max_request_texts=20, concurrency=1), list[Progress]()
        export(pipeline)
        pipeline.filler(progress=notes.append).fill_ranges([SongIdRange(0, 100)], lambda _: None)
        assert_stored(pipeline, plain_texts(song_ids))
        assert billed_once(provider, song_ids)
        assert provider.ledger()["requests_by_status"] == {"200": 4, "reset": 3}
        assert sum("Connection reset" in each.note for each in notes) == 3, "each is said"

    def test_and_answers_429_to_the_first_request_and_later_gets_whole_ones(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        song_ids = range(1, 61)
        songs(*plain_songs(song_ids))
        limited = {"status": 429, "count": 2, "retry_after_s": 0.2}
        provider.control(mode="voyage", quota=None, statuses=[limited, limited | {"after": 4}], retry_after_date=False)
        pipeline = run(max_request_texts=20)
        fill(pipeline)
        assert_stored(pipeline, plain_texts(song_ids))
        assert billed_once(provider, song_ids)
        assert provider.ledger()["requests_by_status"] == {"429": 4, "200": 1 + 3}

    def test_of_fewer_tokens_a_minute_than_a_request_has_gets_smaller_ones(
        self, songs: Songs, run: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No time to wait would ever be enough for the request, though a plain text is served at once."""
        monkeypatch.setattr(client_module, "QUOTA_WINDOW_S", 0.5)
        song_ids = range(1, 61)
        songs(*plain_songs(song_ids))
        quota = {"tokens_per_minute": 15_000, "window_s": 1, "retry_after_s": 0.1}
        provider.control(mode="voyage", quota=quota, retry_after_date=False)
        pipeline = run()
        fill(pipeline)
        assert_stored(pipeline, plain_texts(song_ids))
        assert billed_once(provider, song_ids)

    def test_and_finds_a_text_blank_has_it_rejected_with_its_words(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*songs_but({5: ("\u200b", "\u200d", "x"), 9: ("\u200b\x07", "\x01", "x")}, 60))
        provider.control(mode="tei blank")
        pipeline = run(text_template="{name}{artist}")
        (report,) = fill(pipeline)
        assert [song_id for song_id, _ in report.rejected] == [5, 9]
        assert all("`inputs` cannot be empty" in reason for _, reason in report.rejected)
        times = billed(provider)
        assert len(times) == 58
        assert set(times.values()) == {1}


@pytest.mark.usefixtures("hasty")
class TestAServerThatIsSlow:
    def test_gets_fewer_requests_until_it_answers(self, songs: Songs, run: Run, provider: Provider) -> None:
        """One lane, which computes on for clients that hung up: all at once are eleven time limits."""
        song_ids = range(1, 81)
        songs(*plain_songs(song_ids))
        provider.control(lane_tokens_per_s=50.0)
        notes: list[str] = []
        pipeline = run(max_request_texts=4, concurrency=32)
        export(pipeline)
        pipeline.filler(progress=lambda told: notes.append(told.note)).fill_ranges(
            [SongIdRange(0, 100)], lambda _: None
        )
        assert_stored(pipeline, plain_texts(song_ids))
        assert provider.ledger()["texts_billed"] <= 2 * len(song_ids)
        named = [note for note in notes if "no whole answer" in note]
        assert all("SONGVEC_CONCURRENCY" in note and "SONGVEC_MAX_REQUEST_TOKENS" in note for note in named)

    def test_for_a_whole_request_gets_smaller_ones(self, songs: Songs, run: Run, provider: Provider) -> None:
        song_ids = range(1, 33)
        songs(*plain_songs(song_ids))
        # 32 texts take 7.5 s: beyond the time limit and beyond twice that
        provider.control(lane_tokens_per_s=30.0)
        pipeline = run(max_request_texts=32)
        fill(pipeline)
        assert_stored(pipeline, plain_texts(song_ids))
        assert provider.ledger()["texts_billed"] <= 5 * len(song_ids)

    def test_has_each_try_that_it_may_bill_counted_and_never_exceeds_the_budget(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        songs(*plain_songs(range(1, 41)))
        provider.control(late=2, late_s=5.0)
        pipeline = run(max_request_texts=4, concurrency=2, **PAID)
        reports, error = try_fill(pipeline, max_usd=150)
        assert isinstance(error, BudgetExceededError)
        # what computes on is billed later
        billed_tokens = sum(report.n_tokens for report in reports)
        assert billed_tokens <= 150
        threading.Event().wait(6)
        assert provider.ledger()["tokens_billed"] <= 150
        month = pipeline.month_spending()
        # the probe's five bytes are estimated at one token in each of its two late tries, and billed two
        assert provider.ledger()["tokens_billed"] - 2 <= month.billed + month.reserved <= 150


class TestABudget:
    @pytest.mark.parametrize("concurrency", [4, 32])
    def test_is_used_to_within_one_request_over_several_ranges(
        self, songs: Songs, run: Run, provider: Provider, concurrency: int
    ) -> None:
        song_ids = [start + song_id for start in (0, 100, 200, 300) for song_id in range(1, 91)]
        songs(*plain_songs(song_ids))
        provider.control(latency_s=0.05)
        # 28 a request and 2 for the probe; estimates begin at what a text of 4 bytes a token has
        pipeline = run(max_request_texts=4, concurrency=concurrency, **PAID)
        reports, error = try_fill(pipeline, max_usd=1000)
        assert isinstance(error, BudgetExceededError)
        assert "billed" in str(error) and "reserved" in str(error)
        assert 1000 - 2 * 28 < provider.ledger()["tokens_billed"] <= 1000
        assert sum(report.n_tokens for report in reports) == provider.ledger()["tokens_billed"]
        assert pipeline.month_spending() == (provider.ledger()["tokens_billed"], 0)

    def test_that_estimates_exceed_is_used_by_what_they_give_back(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        """Four bytes a token are estimated, twelve are billed: all is reserved by a third of what fits."""
        songs(*((song_id, f"海{song_id:04d}", "海" * 30, "海" * 200) for song_id in range(1, 61)))
        provider.control(latency_s=0.05)
        pipeline = run(max_request_texts=4, concurrency=32, **PAID)
        _, error = try_fill(pipeline, max_usd=2000)
        assert isinstance(error, BudgetExceededError)
        # a text is 60 tokens, a request 240, estimated at up to 720
        assert provider.ledger()["tokens_billed"] > 2000 - 720 - 240


class TestAServerThatStops:
    def test_in_the_middle_ends_the_run_after_the_patience_and_uses_no_quota(
        self, songs: Songs, database: Database, provider: Provider, tmp_path: Path
    ) -> None:
        songs(*plain_songs(range(1, 81)))
        pipeline = make_pipeline(
            database, provider, tmp_path / "store", fireworks_base_url=f"http://127.0.0.1:{free_port()}/v1",
            patience_s=1.5, requests_per_minute=60_000, tokens_per_minute=60_000,
        )  # fmt: skip
        used: list[float] = []
        reserve = RateLimiter.reserve

        def watch(limiter: RateLimiter, n_tokens: int) -> object:
            grant = reserve(limiter, n_tokens)
            used.append(limiter.used)
            return grant

        export(pipeline)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RateLimiter, "reserve", watch)
            reports, _ = try_fill(pipeline)
        assert isinstance(reports[0].error, ProviderUnavailableError)
        assert len(used) > 3
        assert used[-1] < 0.01, "a request that never left gives its tokens back"

    def test_patience_is_that_since_the_last_good_answer_of_any_request(
        self, songs: Songs, run: Run, provider: Provider
    ) -> None:
        """One request in four fails, never twice in a row for the patience: nobody gives up."""
        songs(*plain_songs(range(1, 91)))
        provider.control(statuses=[{"status": 503, "share": 0.25, "after": 2}], latency_s=0.1)
        pipeline = run(max_request_texts=2, concurrency=4, patience_s=2.0)
        fill(pipeline)
        assert_stored(pipeline, plain_texts(range(1, 91)))


def test_trouble_is_marked_as_such(songs: Songs, run: Run, provider: Provider) -> None:
    songs(*plain_songs(range(1, 5)))
    provider.control(statuses=[{"status": 503, "count": 2, "after": 2}])
    told: list[Progress] = []
    pipeline = run()
    export(pipeline)
    pipeline.filler(progress=told.append).fill_ranges([SongIdRange(0, 100)], lambda _: None)
    assert [("answered 503" in each.note) for each in told] == [each.is_trouble for each in told]
    assert sum(each.is_trouble for each in told) == 2


def test_a_range_is_let_go_without_holding_up_the_answers_of_others(
    songs: Songs, run: Run, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs(*plain_songs([1, 101]))
    pipeline = run()
    let_go_by: list[str] = []
    lock_range = pipeline.lock_range

    @contextlib.contextmanager
    def watched(song_range: SongIdRange, *callbacks: Callable[[], None]) -> Iterator[Callable[[], None]]:
        with lock_range(song_range, *callbacks) as check_held:
            yield check_held
        let_go_by.append(threading.current_thread().name)

    monkeypatch.setattr(pipeline, "lock_range", watched)
    fill(pipeline)
    assert len(let_go_by) == 2
    assert threading.current_thread().name not in let_go_by, "the event loop's thread waits for no database"


def test_tokens_owed_survive_a_statement_that_fails(database: Database) -> None:
    limiter = RateLimiter(database.get_engine("web"), "owed", 1_000_000, 1_000_000)
    limiter.settle(limiter.reserve(10), 500_000)
    execute(database.adbc_uri, "ALTER TABLE songvec.rate_limits RENAME TO elsewhere")
    with pytest.raises(DatabaseError):
        limiter.reserve(10)
    execute(database.adbc_uri, "ALTER TABLE songvec.elsewhere RENAME TO rate_limits")
    limiter.reserve(10)
    assert limiter.reserve(10).wait_s > 10, "half a million tokens beyond the grant are still paid"


def test_a_try_that_is_called_off_leaves_the_count_of_reservations_as_it_was() -> None:
    """A count below nothing would let the next range wait for ever for a budget that nobody gives back."""

    def call_off() -> None:
        raise StoppedError("another request of the range failed")

    budget: Any = SimpleNamespace(n_held=1, n_settled=0)
    reservation = Reservation(OfflineEmbedder(4), budget, 10, call_off)
    reservation.n_reserved = reservation.n_billed = 10
    with pytest.raises(StoppedError):
        asyncio.run(reservation.before_try())
    assert budget.n_held == 1
