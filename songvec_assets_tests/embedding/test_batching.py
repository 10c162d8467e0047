"""Texts to requests within limits; halving a refused one."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.embedding.batching import LearnedLimits, bisect, pack_requests

PROFILE = settings(deadline=None)
N_BYTES = st.lists(st.integers(1, 60), max_size=80)
MAX_TEXTS = st.integers(1, 12)
MAX_BYTES = st.integers(1, 100)


def pack(n_bytes: list[int], max_texts: int, max_bytes: float) -> list[list[int]]:
    """The sizes in each request."""
    return [n_bytes[request] for request in pack_requests(n_bytes, lambda: (max_texts, max_bytes))]


@PROFILE
@given(N_BYTES, MAX_TEXTS, MAX_BYTES)
def test_requests_cover_all_texts_once_and_in_their_order(n_bytes, max_texts, max_bytes):
    requests = list(pack_requests(n_bytes, lambda: (max_texts, max_bytes)))
    positions = range(len(n_bytes))
    assert [position for request in requests for position in positions[request]] == list(positions)
    assert all(len(positions[request]) > 0 for request in requests)


@PROFILE
@given(N_BYTES, MAX_TEXTS, MAX_BYTES)
def test_only_a_lone_text_is_ever_above_a_limit(n_bytes, max_texts, max_bytes):
    for texts in pack(n_bytes, max_texts, max_bytes):
        assert len(texts) <= max_texts
        assert sum(texts) <= max_bytes or len(texts) == 1


@PROFILE
@given(st.integers(1, 300), st.integers(1, 20), MAX_TEXTS, MAX_BYTES)
def test_texts_of_one_size_go_in_as_few_requests_as_there_must_be_equally_full(n_texts, size, max_texts, max_bytes):
    requests = pack([size] * n_texts, max_texts, max_bytes)
    most = max(1, min(max_texts, max_bytes // size))
    assert len(requests) == math.ceil(n_texts / most)
    lengths = sorted(map(len, requests))
    if most == max_texts or max_bytes % size == 0:
        assert lengths[-1] - lengths[0] <= 1


@PROFILE
@given(st.lists(st.integers(1, 10), min_size=1, max_size=300), st.integers(100, 1000))
def test_small_texts_go_in_as_few_requests_as_there_must_be_about_equally_full(n_bytes, max_bytes):
    """To within one text: where the last request would be nearly full, one more may be needed."""
    requests = pack(n_bytes, 300, max_bytes)
    assert len(requests) <= math.ceil(sum(n_bytes) / (max_bytes - 10))
    sizes = [sum(request) for request in requests]
    if len(requests) == math.ceil(sum(n_bytes) / max_bytes):
        assert max(sizes) - min(sizes) <= 10 * 2


@pytest.mark.parametrize(("n_bytes", "max_texts"), [([10, 1, 1, 1], 2), ([60, 1, 1, 1, 1, 1], 3)])
def test_where_the_number_of_texts_binds_there_are_no_more_requests_than_there_must_be(n_bytes, max_texts):
    assert len(pack(n_bytes, max_texts, 10_000)) == math.ceil(len(n_bytes) / max_texts)


@PROFILE
@given(N_BYTES, MAX_TEXTS, MAX_BYTES)
def test_a_request_ends_where_the_next_text_would_break_a_limit_or_at_its_equal_share(n_bytes, max_texts, max_bytes):
    """Else a large catalogue would be sent in many more requests than it needs."""
    left, n_left = sum(n_bytes), len(n_bytes)
    for request in pack_requests(n_bytes, lambda: (max_texts, max_bytes)):
        texts, after = n_bytes[request], n_bytes[request.stop : request.stop + 1]
        n_requests = max(math.ceil(left / max_bytes), math.ceil(n_left / max_texts))
        full = len(texts) == max_texts or sum(texts + after) > max_bytes
        assert not after or full or sum(texts) * n_requests >= left
        left, n_left = left - sum(texts), n_left - len(texts)


def test_the_limit_is_asked_for_anew_before_each_request():
    """What a token is in bytes is learnt while requests are answered."""
    asked = []

    def limits():
        asked.append(len(asked))
        return 100, 10 if len(asked) < 3 else 20

    assert [request.stop - request.start for request in pack_requests([5] * 12, limits)] == [2, 2, 4, 4]
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("n_bytes", "max_texts", "max_bytes", "expected"),
    [
        ([], 3, 10, []),
        ([99], 3, 10, [[99]]),
        ([1, 1, 1, 1], 3, 10, [[1, 1], [1, 1]]),
        ([5, 5, 5], 3, 10, [[5, 5], [5]]),
        ([5, 6, 5], 3, 10, [[5], [6], [5]]),
        ([4, 99, 4, 4], 3, 10, [[4], [99], [4, 4]]),
        ([10, 10], 3, 10, [[10], [10]]),
        ([2, 2, 2], 1, 10, [[2], [2], [2]]),
        ([1] * 11, 100, 10, [[1] * 6, [1] * 5]),
        ([1] * 10, 100, 10.0, [[1] * 10]),
        ([1] * 10, 100, 9.99, [[1] * 5, [1] * 5]),
        ([1] * 9, 4, 100, [[1] * 3] * 3),
    ],
)
def test_cases(n_bytes, max_texts, max_bytes, expected):
    assert pack(n_bytes, max_texts, max_bytes) == expected


@PROFILE
@given(st.lists(st.integers(), min_size=2))
def test_halves_are_all_items_in_order_and_differ_by_one_at_most(items):
    first, second = bisect(items)
    assert [*first, *second] == items
    assert len(second) - len(first) in (0, 1)
    assert first


def ask(limits: LearnedLimits, takes, n_texts: int, size: int) -> None:
    """A request, and where it is refused its halves."""
    if takes(n_texts, n_texts * size):
        limits.count_accepted(n_texts, n_texts * size)
        return
    ask(limits, takes, n_texts // 2, size)
    ask(limits, takes, n_texts - n_texts // 2, size)
    limits.count_refused(n_texts, n_texts * size, is_for_size=False)


def test_nothing_is_limited_before_anything_was_refused():
    limits = LearnedLimits()
    limits.count_accepted(5, 500)
    assert limits.next_request() == (math.inf, math.inf)
    assert not limits.are_exceeded_by(10_000, 10**9)


@pytest.mark.slow
@PROFILE
@given(st.integers(1, 200), st.integers(2, 500), st.integers(1, 50))
def test_a_limit_of_texts_is_found_with_few_refusals(most, first, size):
    limits, n_refused = LearnedLimits(), 0
    ask(limits, lambda n, _: n <= most, first, size)
    for _ in range(2000):
        n_texts = int(min(first, *(limits.next_request()[0], limits.next_request()[1] // size or 1)))
        n_refused += n_texts > most
        ask(limits, lambda n, _: n <= most, max(1, n_texts), size)
    n_texts, _ = limits.next_request()
    assert n_refused <= 9, "a larger one is tried after 16, 32, … accepted requests"
    if first > most:
        assert n_texts == most or n_texts >= most / 2
        assert not limits.are_exceeded_by(most, most * size)


def test_texts_and_bytes_are_told_apart_by_what_is_accepted():
    limits = LearnedLimits()
    ask(limits, lambda n, _: n <= 10, 20, 100)
    assert limits.are_exceeded_by(9, 2000), "either may have been too much"
    limits.count_accepted(1, 5000)
    assert not limits.are_exceeded_by(9, 4000)
    assert limits.are_exceeded_by(20, 100)
    assert not limits.are_exceeded_by(1, 10**9), "one text cannot be divided"


def test_as_much_as_was_accepted_before_is_not_refused_for_its_size():
    limits = LearnedLimits()
    limits.count_accepted(100, 10_000)
    assert not limits.count_refused(100, 10_000, is_for_size=False)
    assert limits.next_request() == (math.inf, math.inf)
    assert limits.count_refused(100, 10_000, is_for_size=True)
    assert limits.next_request() == (math.inf, 5000)
