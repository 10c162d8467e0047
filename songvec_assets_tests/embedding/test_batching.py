"""Texts to requests within limits; halving a refused one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.embedding.batching import bisect, pack_requests

PROFILE = settings(deadline=None)
TOKENS = st.lists(st.integers(1, 60), max_size=80)
MAX_TEXTS = st.integers(1, 12)
MAX_TOKENS = st.integers(1, 100)


@PROFILE
@given(TOKENS, MAX_TEXTS, MAX_TOKENS)
def test_requests_cover_all_texts_once_and_in_their_order(n_tokens, max_texts, max_tokens):
    requests = list(pack_requests(n_tokens, max_texts, max_tokens))
    positions = range(len(n_tokens))
    assert [position for request in requests for position in positions[request]] == list(positions)
    assert all(len(positions[request]) > 0 for request in requests)


@PROFILE
@given(TOKENS, MAX_TEXTS, MAX_TOKENS)
def test_only_a_lone_text_is_ever_above_a_limit(n_tokens, max_texts, max_tokens):
    for request in pack_requests(n_tokens, max_texts, max_tokens):
        texts = n_tokens[request]
        assert len(texts) <= max_texts
        assert sum(texts) <= max_tokens or len(texts) == 1


@PROFILE
@given(TOKENS, MAX_TEXTS, MAX_TOKENS)
def test_a_request_ends_only_where_the_next_text_would_break_a_limit(n_tokens, max_texts, max_tokens):
    """Else a large catalogue would be sent in more requests than it needs."""
    requests = list(pack_requests(n_tokens, max_texts, max_tokens))
    for request in requests[:-1]:
        longer = n_tokens[request.start : request.stop + 1]
        assert len(longer) > max_texts or sum(longer) > max_tokens


@pytest.mark.parametrize(
    ("n_tokens", "max_texts", "max_tokens", "expected"),
    [
        ([], 3, 10, []),
        ([99], 3, 10, [[99]]),
        ([1, 1, 1, 1], 3, 10, [[1, 1, 1], [1]]),
        ([5, 5, 5], 3, 10, [[5, 5], [5]]),
        ([5, 6, 5], 3, 10, [[5], [6], [5]]),
        ([4, 99, 4, 4], 3, 10, [[4], [99], [4, 4]]),
        ([10, 10], 3, 10, [[10], [10]]),
        ([2, 2, 2], 1, 10, [[2], [2], [2]]),
    ],
)
def test_cases(n_tokens, max_texts, max_tokens, expected):
    assert [n_tokens[request] for request in pack_requests(n_tokens, max_texts, max_tokens)] == expected


@PROFILE
@given(st.lists(st.integers(), min_size=2))
def test_halves_are_all_items_in_order_and_differ_by_one_at_most(items):
    first, second = bisect(items)
    assert [*first, *second] == items
    assert len(second) - len(first) in (0, 1)
    assert first


@pytest.mark.parametrize("items", [[], ["alone"]])
def test_less_than_two_items_cannot_be_divided(items):
    with pytest.raises(ValueError, match=f"got {len(items)}"):
        bisect(items)
