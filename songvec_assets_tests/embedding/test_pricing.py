"""Tokens, dollars and time: estimates that learn, a budget that holds."""

import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from songvec_assets.embedding.pricing import Budget, Price, Quota, TokenEstimator
from songvec_assets.errors import BudgetExceededError

PROFILE = settings(deadline=None)
DOLLAR_A_TOKEN = Price(1e6)


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


def test_a_million_tokens_cost_the_price():
    assert Price(0.10).usd(1_000_000) == pytest.approx(0.10)
    assert Price(0.10).usd(4_800_000_000) == pytest.approx(480)
    assert Price(0.0).usd(10**12) == 0


def test_twelve_million_songs_take_days_at_the_starting_quota():
    """The example of the provider's facts: 4.8 billion tokens, $480, 3.7 days."""
    quota = Quota(6_000, 900_000, 2_048, 100_000)
    estimate = Price(0.10).estimate(12_000_000, 11_000_000, 4_800_000_000, quota)
    assert (estimate.n_songs, estimate.n_texts, estimate.n_tokens) == (12_000_000, 11_000_000, 4_800_000_000)
    assert estimate.usd == pytest.approx(480)
    assert estimate.hours / 24 == pytest.approx(3.7, abs=0.05)


def test_where_requests_are_few_they_decide_the_time():
    quota = Quota(requests_per_minute=10, tokens_per_minute=10**9, max_request_texts=100, max_request_tokens=10**6)
    estimate = Price(0.10).estimate(60_000, 60_000, 600_000, quota)
    assert estimate.hours == pytest.approx(1.0)


@PROFILE
@given(st.integers(1, 2**31), st.integers(1, 2**31))
def test_a_request_is_never_more_than_a_fiftieth_of_the_token_quota_nor_less_than_a_token(per_minute, max_tokens):
    quota = Quota(6_000, per_minute, 2_048, max_tokens)
    assert quota.max_request_tokens == max(1, min(max_tokens, per_minute // 50))


def test_requests_are_counted_by_the_limit_that_binds():
    quota = Quota(6_000, 10**9, max_request_texts=100, max_request_tokens=1_000)
    assert quota.n_requests(n_texts=1_000, n_tokens=1_000) == 10
    assert quota.n_requests(n_texts=1_000, n_tokens=50_000) == 50


@PROFILE
@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.booleans()), max_size=40),
)
def test_no_order_of_reserving_and_settling_exceeds_the_budget(max_usd, requests):
    """Where nothing is billed above its reservation."""
    budget = Budget(DOLLAR_A_TOKEN, max_usd)
    in_flight, spent = [], 0
    for reserved, billed, settle_one in requests:
        planned = spent + sum(each for each, _ in in_flight) + reserved
        if planned <= max_usd:
            budget.reserve(reserved)
            in_flight.append((reserved, min(billed, reserved)))
        else:
            with pytest.raises(BudgetExceededError):
                budget.reserve(reserved)
        if settle_one and in_flight:
            settled, billed_tokens = in_flight.pop(0)
            budget.settle(settled, billed_tokens)
            spent += billed_tokens
        assert budget.usd == spent <= max_usd
    for reserved, billed_tokens in in_flight:
        budget.settle(reserved, billed_tokens)
        spent += billed_tokens
    assert budget.n_tokens == spent <= max_usd


def test_what_a_refused_request_would_have_taken_is_not_set_aside():
    budget = Budget(DOLLAR_A_TOKEN, 10)
    with pytest.raises(BudgetExceededError):
        budget.reserve(11)
    budget.reserve(10)


def test_a_failed_request_gives_its_reservation_back():
    budget = Budget(DOLLAR_A_TOKEN, 10)
    budget.reserve(10)
    budget.settle(10, 0)
    assert budget.n_tokens == 0
    budget.reserve(10)


def test_more_billed_than_reserved_counts_in_full():
    budget = Budget(DOLLAR_A_TOKEN, 10)
    budget.reserve(1)
    budget.settle(1, 8)
    with pytest.raises(BudgetExceededError):
        budget.reserve(3)
    budget.reserve(2)


def test_the_refusal_says_what_was_spent_and_how_to_go_on():
    budget = Budget(DOLLAR_A_TOKEN, 10)
    budget.reserve(8)
    budget.settle(8, 7)
    with pytest.raises(BudgetExceededError, match=r"\$10\.0000 .*\$7\.0000 spent, \$11\.0000 .*SONGVEC_MAX_USD"):
        budget.reserve(4)


def test_without_a_budget_and_at_no_price_nothing_is_refused():
    Budget(DOLLAR_A_TOKEN).reserve(10**15)
    Budget(Price(0.0), 0.0).reserve(10**15)


def test_a_budget_of_nothing_refuses_the_first_token():
    with pytest.raises(BudgetExceededError):
        Budget(Price(0.10), 0.0).reserve(1)


def test_threads_together_stay_within_one_budget():
    budget = Budget(DOLLAR_A_TOKEN, 1_000)
    granted = []
    start = threading.Barrier(4)

    def spend():
        start.wait()
        for _ in range(600):
            try:
                budget.reserve(2)
            except BudgetExceededError:
                continue
            budget.settle(2, 1)
            granted.append(1)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    # at most four reservations of 2 stand at once, so the last tokens may stay unspent
    assert budget.n_tokens == len(granted)
    assert 992 <= budget.n_tokens <= 1_000
    assert budget.usd == budget.n_tokens
