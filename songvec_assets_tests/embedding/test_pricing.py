"""Tokens, dollars and time: estimates that learn, and what money buys."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.embedding.pricing import Price, Quota, TokenEstimator

PROFILE = settings(deadline=None)


@PROFILE
@given(st.lists(st.integers(0, 100_000)))
def test_before_any_answer_a_token_is_four_bytes_and_no_text_is_free(n_bytes):
    assert TokenEstimator().estimate(n_bytes) == [max(1, round(each / 4)) for each in n_bytes]


@PROFILE
@given(st.floats(0.5, 8), st.lists(st.integers(1, 5_000), min_size=1))
def test_the_estimator_learns_how_many_bytes_the_provider_bills_as_a_token(bytes_per_token, n_bytes):
    estimator = TokenEstimator()
    estimator.observe(round(10_000_000 * bytes_per_token), 10_000_000)
    for each, estimate in zip(n_bytes, estimator.estimate(n_bytes), strict=True):
        assert estimate == pytest.approx(max(1, each / bytes_per_token), rel=0.01, abs=0.51)


def test_a_few_real_requests_outweigh_the_prior():
    estimator = TokenEstimator()
    estimator.observe(n_bytes=10_000, n_tokens=10_000)
    assert estimator.estimate([1_000])[0] == pytest.approx(11_000 / 14, abs=1)


def test_an_answer_that_names_no_tokens_teaches_nothing():
    estimator = TokenEstimator()
    estimator.observe(n_bytes=1_000_000, n_tokens=0)
    assert estimator.estimate([4_000]) == [1_000]


@PROFILE
@given(st.integers(1, 100_000), st.integers(0, 10**9), st.integers(0, 10**9))
def test_bytes_are_the_inverse_of_tokens(n_tokens, n_bytes_seen, n_tokens_seen):
    estimator = TokenEstimator()
    estimator.observe(n_bytes_seen, n_tokens_seen)
    assert estimator.n_bytes(n_tokens) * n_tokens_seen >= 0
    [estimate] = estimator.estimate([round(estimator.n_bytes(n_tokens))])
    assert estimate == pytest.approx(n_tokens, rel=0.01, abs=1 + 0.5 * estimator.n_bytes(1) ** -1)


def test_before_any_answer_four_bytes_make_a_token_and_then_what_was_billed():
    estimator = TokenEstimator()
    assert estimator.n_bytes(1_000) == 4_000
    estimator.observe(n_bytes=10_000_000, n_tokens=5_000_000)
    assert estimator.n_bytes(1_000) == pytest.approx(2_000, rel=0.001)


def test_a_million_tokens_cost_the_price():
    assert Price(0.10).usd(1_000_000) == pytest.approx(0.10)
    assert Price(0.10).usd(4_800_000_000) == pytest.approx(480)
    assert Price(0.0).usd(10**12) == 0


@pytest.mark.parametrize(
    ("price", "n_tokens", "usd"), [(0.10, 3_000_000, "0.3"), (0.10, 1, "1e-7"), (1e6, 7, "7"), (3e-7, 10**13, "3")]
)
def test_a_price_is_exact_as_it_is_written(price, n_tokens, usd):
    assert Price(price).exact_usd(n_tokens) == Decimal(usd)
    assert Price(price).usd(n_tokens) == pytest.approx(float(usd))


def test_what_costs_nothing_is_free():
    assert Price(0.0).is_free
    assert not Price(1e-9).is_free


def test_twelve_million_songs_take_days_at_the_starting_quota():
    """The example of the provider's facts: 4.8 billion tokens, $480, 3.7 days."""
    quota = Quota(6_000, 900_000, 2_048, 100_000)
    assert Price(0.10).usd(4_800_000_000) == pytest.approx(480)
    assert quota.hours(11_000_000, 4_800_000_000) / 24 == pytest.approx(3.7, abs=0.05)


def test_where_requests_are_few_they_decide_the_time():
    quota = Quota(requests_per_minute=10, tokens_per_minute=10**9, max_request_texts=100, max_request_tokens=10**6)
    assert quota.hours(60_000, 600_000) == pytest.approx(1.0)


@PROFILE
@given(st.integers(1, 2**31), st.integers(1, 2**31))
def test_a_request_is_never_more_than_a_fiftieth_of_the_token_quota_nor_less_than_a_token(per_minute, max_tokens):
    quota = Quota(6_000, per_minute, 2_048, max_tokens)
    assert quota.max_request_tokens == max(1, min(max_tokens, per_minute // 50))


@PROFILE
@given(st.integers(1, 49), st.integers(1, 2**31))
def test_where_few_requests_are_allowed_each_is_its_share_of_the_token_quota(requests_per_minute, tokens_per_minute):
    """Three requests and 10,000 tokens a minute would else allow 600 tokens."""
    quota = Quota(requests_per_minute, tokens_per_minute, 2_048, 2**31)
    left = tokens_per_minute - quota.max_request_tokens * requests_per_minute
    assert left < requests_per_minute
    assert left >= 0 or quota.max_request_tokens == 1


def test_requests_are_counted_by_the_limit_that_binds():
    quota = Quota(60, 10**9, max_request_texts=100, max_request_tokens=1_000)
    for n_tokens, n_requests in ((1_000, 10), (50_000, 50)):
        assert quota.hours(1_000, n_tokens) == pytest.approx(n_requests / 60 / 60)
