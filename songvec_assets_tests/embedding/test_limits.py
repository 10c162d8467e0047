"""One quota for all processes: no minute holds more than it, hardly less is used, and a 429 slows all of them down.

Waits are told, not waited for: a grant says when its request may go, and time passes by moving what the database holds
into the past.
"""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from songvec_assets.embedding.limits import KEPT_SHARE, PROBING, Grant, RateLimiter, read_quota_use
from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, get_engine
from songvec_assets_tests.administration import as_role, execute, free_port, own_engine

MANY = 10**9

SPENDER = """
import sys
from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.postgres.engine import Database
limiter = RateLimiter(Database(sys.argv[1]).get_engine("web"), "provider", 1, 10**9)
print(*(limiter.reserve(1).wait_s for _ in range(10)))
"""

LimiterMaker = Callable[..., RateLimiter]


@pytest.fixture
def make_limiter(database: Database) -> Iterator[LimiterMaker]:
    """Makes limiters, each on an engine of its own, as each process has."""
    engines: list[sa.Engine] = []
    execute(database.adbc_uri, "DELETE FROM songvec.rate_seconds")

    def make(requests_per_minute: float = MANY, tokens_per_minute: float = MANY, name: str = "provider") -> RateLimiter:
        engines.append(own_engine(database))
        return RateLimiter(engines[-1], name, requests_per_minute, tokens_per_minute)

    yield make
    for engine in engines:
        engine.dispose()


def forget(database: Database, **interval: float) -> None:
    """Let it be so long since anything that happened: forget(database, hours=10); whole seconds.

    With a negative interval it is as if the database's clock had stepped back by it.
    """
    seconds = round(timedelta(**interval).total_seconds())
    columns = ("requests_at", "tokens_at", "paused_until", "busy_since", "slowed_at", "seen_at")
    moved = ", ".join(f"{column} = {column} - {seconds} * interval '1 second'" for column in columns)
    execute(database.adbc_uri, f"UPDATE songvec.rate_limits SET {moved}")
    # a second's slot goes with it; past the slots in between, as no two may be the same for a moment
    execute(database.adbc_uri, f"UPDATE songvec.rate_seconds SET second = second - {seconds}, slot = -1 - slot")
    execute(database.adbc_uri, "UPDATE songvec.rate_seconds SET slot = second % 120")


def earlier(grant: Grant, seconds: int) -> Grant:
    """The grant as it is when so much has been forgotten since."""
    return replace(grant, at=grant.at - seconds)


def waits(*grants: Grant) -> list[float]:
    """Of each grant."""
    return [grant.wait_s for grant in grants]


def accruing_s(n: float, quota: float) -> float:
    """When the n-th unit may go in a bucket that was full: the rule, written down apart from the package's own."""
    depth = max(1, quota / 50)
    return max(0.0, n - depth) * 60 / max(quota - depth, quota / 2)


def most_in_a_minute(spent: Sequence[tuple[float, float]]) -> float:
    """The most that any sliding minute holds of (when, how much)."""
    return max(sum(cost for at, cost in spent if begin <= at < begin + 60 - 1e-4) for begin, _ in spent)


def speed_of(limiter: RateLimiter) -> float:
    """How fast a limiter of 10,000 tokens a minute grants, as a share of its rate of 9,800."""
    one, other = limiter.reserve(200), limiter.reserve(200)
    return 200 / 9_800 * 60 / (other.at - one.at)


def spend_two_minutes(database: Database, limiter: RateLimiter, n_tokens: int) -> list[Grant]:
    """Spend `n_tokens` in each of the last two minutes, a sixth every ten seconds."""
    grants: list[Grant] = []
    for _ in range(12):
        grants.append(limiter.reserve(n_tokens // 6))
        forget(database, seconds=10)
        grants = [earlier(grant, 10) for grant in grants]
    return grants


def test_what_is_used_can_be_read_by_others(database: Database, make_limiter: LimiterMaker) -> None:
    def read() -> tuple[float, float]:
        with database.get_connection() as connection:
            return read_quota_use(connection, "provider", MANY, 10_000)

    assert read() == (0.0, 1.0)
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.reserve(100)
    before = execute(database.adbc_uri, "SELECT xmin::text FROM songvec.rate_limits")
    assert read() == (0.01, 1.0)
    assert execute(database.adbc_uri, "SELECT xmin::text FROM songvec.rate_limits") == before
    limiter.slow_down(limiter.reserve(100), 1)
    assert read()[1] == pytest.approx(0.5, abs=0.01)
    forget(database, hours=1)
    assert read() == (0.0, 1.0)


# Who shares it


def test_limiters_on_two_engines_share_one_quota_of_requests(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(requests_per_minute=1), make_limiter(requests_per_minute=1)
    grants = [limiter.reserve(1) for _ in range(5) for limiter in (one, other)]
    assert waits(*grants) == pytest.approx([120 * place for place in range(10)], abs=5)


def test_limiters_on_two_engines_share_one_quota_of_tokens(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(tokens_per_minute=60), make_limiter(tokens_per_minute=60)
    grants = one.reserve(100), other.reserve(50), one.reserve(1), other.reserve(849)
    assert waits(*grants) == pytest.approx([accruing_s(n, 60) for n in (100, 150, 151, 1000)], abs=5)


def test_another_name_has_a_quota_of_its_own(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(requests_per_minute=1), make_limiter(requests_per_minute=1, name="another provider")
    for _ in range(10):
        one.reserve(1)
    one.slow_down(one.reserve(1), 5000)
    assert waits(other.reserve(1), other.reserve(1)) == pytest.approx([0, 120], abs=5)


def test_a_limiter_made_later_forgives_nothing(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    for _ in range(10):
        limiter.reserve(1)
    assert make_limiter(requests_per_minute=1).reserve(1).wait_s == pytest.approx(1200, abs=5)


def test_a_changed_quota_holds_from_the_next_request_on(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(requests_per_minute=1), make_limiter(requests_per_minute=2)
    one.reserve(1)
    assert waits(other.reserve(1), other.reserve(1)) == pytest.approx([120, 180], abs=5)


def test_threads_get_every_place_once(make_limiter: LimiterMaker) -> None:
    limiters, grants, barrier = [make_limiter(requests_per_minute=1) for _ in range(2)], [], threading.Barrier(8)

    def spend(limiter: RateLimiter) -> None:
        barrier.wait()
        for _ in range(10):
            grants.append(limiter.reserve(1))

    threads = [threading.Thread(target=spend, args=(limiters[place % 2],)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits(*grants)) == pytest.approx([120 * place for place in range(80)], abs=20)


def test_processes_get_every_place_once(database: Database) -> None:
    spenders = [
        subprocess.Popen([sys.executable, "-c", SPENDER, database.url], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [float(wait) for spender in spenders for wait in spender.communicate(timeout=60)[0].split()]
    assert sorted(told) == pytest.approx([120 * place for place in range(20)], abs=40)


# How much it lets through


def test_a_grant_says_when_its_request_may_go(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    for wait_s in (0, 120):
        grant = limiter.reserve(7)
        assert grant.n_tokens == 7
        assert grant.wait_s == pytest.approx(wait_s, abs=5)
        assert grant.at == pytest.approx(time.time() + wait_s, abs=5)


def test_a_reservation_tells_what_all_used_in_the_minute_before_it(
    make_limiter: LimiterMaker, database: Database
) -> None:
    one, other = (make_limiter(tokens_per_minute=1000, requests_per_minute=100) for _ in range(2))
    for _ in range(2):
        one.reserve(10)
    forget(database, seconds=2)
    other.reserve(10)
    assert (one.used, other.used) == (pytest.approx(0.01, abs=0.011), pytest.approx(0.02))
    forget(database, seconds=70)
    other.reserve(10)
    assert other.used == 0


def test_the_scarcer_of_requests_and_tokens_decides(make_limiter: LimiterMaker) -> None:
    few_requests = make_limiter(requests_per_minute=1, tokens_per_minute=6_000)
    assert waits(*(few_requests.reserve(10) for _ in range(3))) == pytest.approx([0, 120, 240], abs=5)
    few_tokens = make_limiter(requests_per_minute=600, tokens_per_minute=60, name="other")
    grants = [few_tokens.reserve(100) for _ in range(3)]
    assert waits(*grants) == pytest.approx([accruing_s(n, 60) for n in (100, 200, 300)], abs=5)


def test_both_are_spent_whichever_decides(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1, tokens_per_minute=60)
    grants = [limiter.reserve(n_tokens) for n_tokens in (0, 0, 0, 600, 0, 0, 0, 0, 0, 0)]
    assert grants[3].wait_s >= accruing_s(600, 60) - 5
    assert grants[9].wait_s >= 9 * 120 - 5


def test_what_is_larger_than_the_bucket_waits_until_the_rest_has_accrued(make_limiter: LimiterMaker) -> None:
    assert make_limiter(tokens_per_minute=60).reserve(600).wait_s == pytest.approx(accruing_s(600, 60), abs=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("requests_per_minute", "tokens_per_minute"),
    [(MANY, 10_000), (120, MANY), (120, 10_000)],
)
def test_no_sliding_minute_holds_more_than_the_quota(
    database: Database, make_limiter: LimiterMaker, seed: int, requests_per_minute: float, tokens_per_minute: float
) -> None:
    """Of any mix of requests, each as large as the bucket at most, with breaks of any length between them."""
    draw = random.Random(seed)
    limiters = [make_limiter(requests_per_minute, tokens_per_minute) for _ in range(2)]
    spent: list[tuple[float, float]] = []
    for _ in range(250):
        n_tokens = draw.choice([draw.randint(1, 200), draw.randint(1, 200), 1, 200])
        spent.append((draw.choice(limiters).reserve(n_tokens).at, n_tokens))
        if draw.random() < 0.02:
            seconds = draw.randint(1, 90)
            forget(database, seconds=seconds)
            spent = [(at - seconds, cost) for at, cost in spent]
    n_tokens, n_requests = most_in_a_minute(spent), most_in_a_minute([(at, 1) for at, _ in spent])
    assert n_tokens <= tokens_per_minute
    assert n_requests <= requests_per_minute
    assert max(n_tokens / tokens_per_minute, n_requests / requests_per_minute) > 0.9, "or the test asks for too little"


def test_large_requests_after_many_small_ones_are_paced_by_their_tokens(make_limiter: LimiterMaker) -> None:
    """While the small ones wait for their places, no tokens accrue that the large ones could then spend at once."""
    limiter = make_limiter(requests_per_minute=60, tokens_per_minute=10_000)
    grants = [limiter.reserve(n_tokens) for n_tokens in [1] * 60 + [200] * 60]
    assert most_in_a_minute([(grant.at, grant.n_tokens) for grant in grants]) <= 10_000


@pytest.mark.parametrize(
    ("quota", "n_tokens", "n_requests"),
    [
        ({"tokens_per_minute": 10_000}, 200, 155),
        ({"requests_per_minute": 100}, 1, 310),
    ],
    ids=str,
)
def test_nearly_all_of_the_quota_is_used(
    make_limiter: LimiterMaker, quota: dict[str, float], n_tokens: int, n_requests: int
) -> None:
    limiter = make_limiter(**quota)
    grants = [limiter.reserve(n_tokens) for _ in range(n_requests)]
    assert grants[-1].at > grants[0].at + 180, "or the test reserves too little"
    used = sum(grant.n_tokens for grant in grants if grant.at < grants[0].at + 180)
    [allowed] = quota.values()
    assert 0.97 * 3 * allowed <= used <= 3 * allowed


@pytest.mark.parametrize("quota", [{"tokens_per_minute": 500}, {"requests_per_minute": 500}], ids=str)
def test_a_burst_is_no_deeper_than_the_bucket_however_long_nothing_was_sent(
    database: Database, make_limiter: LimiterMaker, quota: dict[str, float]
) -> None:
    limiter = make_limiter(**quota)
    for _ in range(2):
        grants = [limiter.reserve(1) for _ in range(40)]
        assert waits(*grants[:10]) == pytest.approx([0] * 10, abs=0.01), "ten at once"
        assert all(
            grant.at >= grants[0].at + accruing_s(place, 500) - 0.01 for place, grant in enumerate(grants, start=1)
        )
        forget(database, hours=10)


def test_the_smallest_quotas_let_something_through(make_limiter: LimiterMaker) -> None:
    """A bucket is never less than one deep, and what is left of the rate then is half of it at least."""
    limiter = make_limiter(requests_per_minute=2)
    assert waits(*(limiter.reserve(1) for _ in range(4))) == pytest.approx([0, 60, 120, 180], abs=5)


def test_in_real_time_too_no_more_is_sent_than_has_accrued(make_limiter: LimiterMaker) -> None:
    limiters, sent, lock = [make_limiter(requests_per_minute=300) for _ in range(2)], [], threading.Lock()
    started = time.monotonic()

    def send(limiter: RateLimiter) -> None:
        while time.monotonic() - started < 1.0:
            time.sleep(max(0.0, limiter.reserve(1).wait_s))
            with lock:
                sent.append(time.monotonic())

    threads = [threading.Thread(target=send, args=(limiters[place % 2],)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # each place is used at its time, or later by as much as a thread of a busy machine oversleeps
    assert len(sent) >= 8
    assert all(len([each for each in sent if each <= at]) <= 6 + (at - started) * 294 / 60 + 0.1 for at in sent)


# What was billed


def test_what_was_billed_beyond_the_grant_is_paid_by_the_next_one(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=60)
    limiter.settle(limiter.reserve(10), 610)
    grants = limiter.reserve(1), limiter.reserve(1)
    assert waits(*grants) == pytest.approx([accruing_s(611, 60), accruing_s(612, 60)], abs=5)
    assert [grant.n_tokens for grant in grants] == [1, 1]


def test_what_was_billed_below_the_grants_is_given_to_the_next_one(
    database: Database, make_limiter: LimiterMaker
) -> None:
    limiter = make_limiter(tokens_per_minute=60)
    grants = [limiter.reserve(300) for _ in range(2)]
    forget(database, seconds=round(grants[1].wait_s))
    for grant in grants:
        limiter.settle(grant, 100)
    assert waits(limiter.reserve(400)) == pytest.approx([0], abs=5)
    assert waits(limiter.reserve(400)) == pytest.approx([accruing_s(400, 60)], abs=5), "given once"


def test_what_was_billed_as_granted_changes_nothing(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=60)
    limiter.settle(limiter.reserve(300), 300)
    assert limiter.reserve(300).wait_s == pytest.approx(accruing_s(600, 60), abs=5)


def test_a_correction_reaches_the_other_limiters_with_the_next_grant(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(tokens_per_minute=60), make_limiter(tokens_per_minute=60)
    one.settle(one.reserve(1), 601)
    assert other.reserve(1).wait_s == pytest.approx(0, abs=5)
    one.reserve(1)
    assert other.reserve(1).wait_s == pytest.approx(accruing_s(604, 60), abs=5)


def test_no_correction_makes_the_bucket_deeper(make_limiter: LimiterMaker) -> None:
    """What was granted and not billed is given back, but time that passed is not."""
    limiter = make_limiter(tokens_per_minute=500)
    limiter.settle(limiter.reserve(10), -100_000)
    grants = [limiter.reserve(1) for _ in range(40)]
    assert all(grant.at >= grants[1].at + accruing_s(place, 500) - 0.01 for place, grant in enumerate(grants[1:], 1))


# What a 429 does: the pause


def test_a_429_holds_back_every_limiter(database: Database, make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(), make_limiter()
    one.slow_down(one.reserve(1), 300)
    assert waits(other.reserve(1), one.reserve(1)) == pytest.approx([300, 300], abs=5)
    forget(database, seconds=200)
    assert waits(other.reserve(1), one.reserve(1)) == pytest.approx([100, 100], abs=5)
    forget(database, seconds=200)
    assert waits(other.reserve(1), one.reserve(1)) == pytest.approx([0, 0], abs=0.01)


def test_a_shorter_pause_does_not_end_a_longer_wait(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    for _ in range(10):
        grant = limiter.reserve(1)
    limiter.slow_down(grant, 400)
    limiter.slow_down(grant, 5)
    assert limiter.reserve(1).wait_s >= 1195
    other = make_limiter(name="other")
    grant = other.reserve(1)
    other.slow_down(grant, 400)
    other.slow_down(grant, 5)
    assert other.reserve(1).wait_s == pytest.approx(400, abs=5)


# What a 429 does: the speed


@pytest.mark.parametrize(
    ("used", "speed"),
    [
        (0.6, 0.96 * 0.6),
        (0.9, 0.96 * 0.9),
        (0.3, 0.5),
        (0.0, 0.5),
    ],
)
def test_a_429_lowers_the_speed_to_a_little_below_what_the_last_minute_let_through_by_half_at_most(
    database: Database, make_limiter: LimiterMaker, used: float, speed: float
) -> None:
    one, other = (make_limiter(tokens_per_minute=10_000) for _ in range(2))
    assert speed_of(other) == pytest.approx(1, rel=0.02)
    forget(database, minutes=5)
    spend_two_minutes(database, one, round(10_000 * used))
    one.slow_down(one.reserve(0), 0)
    assert speed_of(one) == pytest.approx(speed, rel=0.02)
    assert speed_of(other) == pytest.approx(speed, rel=0.02)


def test_requests_count_as_tokens_do(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=100)
    for seconds in (10,) * 11 + (6,):
        for _ in range(12):
            limiter.reserve(1)
        forget(database, seconds=seconds)
    limiter.slow_down(limiter.reserve(1), 0)
    grants = [limiter.reserve(1) for _ in range(6)]
    assert grants[5].at - grants[4].at == pytest.approx(60 / 98 / (0.96 * 0.72), rel=0.03)


def test_the_constants_are_those_that_the_tests_reckon_with() -> None:
    assert (KEPT_SHARE, PROBING) == (0.96, 0.005)


def test_what_was_refused_does_not_count_as_let_through(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    *_, refused = spend_two_minutes(database, limiter, 9_000)
    limiter.slow_down(refused, 0)
    assert speed_of(limiter) == pytest.approx(0.96 * 0.75, rel=0.02)


def test_where_the_work_began_less_than_a_minute_ago_that_time_decides(
    database: Database, make_limiter: LimiterMaker
) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.reserve(200)
    forget(database, hours=1)
    for _ in range(2):
        limiter.reserve(1_000)
        forget(database, seconds=10)
    limiter.slow_down(limiter.reserve(0), 0)
    assert speed_of(limiter) == pytest.approx(0.96 * (0.2 - 0.02 * 2 / 3) * 3, rel=0.05)


def test_several_429s_of_requests_that_were_under_way_lower_the_speed_once(
    database: Database, make_limiter: LimiterMaker
) -> None:
    limiters = [make_limiter(tokens_per_minute=10_000) for _ in range(2)]
    *_, first, second, third = spend_two_minutes(database, limiters[0], 9_600)
    limiters[0].slow_down(third, 0)
    fallen = speed_of(limiters[0])
    assert fallen == pytest.approx(0.96 * 0.8, rel=0.02)
    for place, grant in enumerate((first, second, third) * 2):
        limiters[place % 2].slow_down(grant, 0)
    assert speed_of(limiters[1]) == pytest.approx(fallen, rel=0.01)


def test_429s_that_arrive_at_once_lower_the_speed_once(database: Database, make_limiter: LimiterMaker) -> None:
    limiters = [make_limiter(tokens_per_minute=10_000) for _ in range(8)]
    spend_two_minutes(database, limiters[0], 6_000)
    under_way = [limiter.reserve(0) for limiter in limiters]
    barrier = threading.Barrier(8)

    def slow_down(limiter: RateLimiter, grant: Grant) -> None:
        barrier.wait()
        limiter.slow_down(grant, 0)

    threads = [threading.Thread(target=slow_down, args=pair) for pair in zip(limiters, under_way, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert speed_of(limiters[0]) == pytest.approx(0.96 * 0.6, rel=0.02)


def test_a_429_of_a_request_granted_at_the_lower_speed_lowers_it_again(
    database: Database, make_limiter: LimiterMaker
) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    for speed in (0.5, 0.2534, 0.1301):
        limiter.slow_down(limiter.reserve(0), 0)
        assert speed_of(limiter) == pytest.approx(speed, rel=0.04)
        forget(database, seconds=70)


def test_a_429_never_raises_the_speed(database: Database, make_limiter: LimiterMaker) -> None:
    """The last minute may have been faster than the speed that it ended with."""
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.slow_down(limiter.reserve(0), 0)
    limiter.reserve(9_000)
    forget(database, seconds=112)
    limiter.slow_down(limiter.reserve(0), 0)
    assert speed_of(limiter) == pytest.approx(0.5 * (1 + 0.01 * (112 / 60) ** 2), rel=0.01)


@pytest.mark.parametrize(
    ("minutes", "speed"), [(0, 0.5), (1, 0.505), (3, 0.545), (5, 0.625), (8, 0.82), (10, 1.0), (11, 1.0), (1000, 1.0)]
)
def test_the_speed_comes_back_slowly_at_first(
    database: Database, make_limiter: LimiterMaker, minutes: int, speed: float
) -> None:
    one, other = (make_limiter(tokens_per_minute=10_000) for _ in range(2))
    one.slow_down(one.reserve(0), 0)
    forget(database, minutes=minutes)
    assert speed_of(one) == pytest.approx(speed, rel=0.004)
    forget(database, seconds=5)
    assert speed_of(other) == pytest.approx(speed, rel=0.02)


def test_a_speed_that_came_back_falls_from_where_it_is(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.slow_down(limiter.reserve(0), 0)
    forget(database, minutes=5)
    limiter.slow_down(limiter.reserve(0), 0)
    assert speed_of(limiter) == pytest.approx(0.625 / 2, rel=0.02)
    forget(database, minutes=10)
    assert speed_of(limiter) == pytest.approx(0.8125, rel=0.02), "the minutes count from the last fall"


def test_what_another_name_let_through_does_not_count(database: Database, make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(tokens_per_minute=10_000), make_limiter(tokens_per_minute=10_000, name="another")
    one.reserve(200)
    forget(database, seconds=30)
    one.reserve(200)
    spend_two_minutes(database, other, 9_000)
    one.slow_down(one.reserve(0), 0)
    assert speed_of(one) == pytest.approx(0.5, rel=0.02)


def test_another_name_keeps_its_speed(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(tokens_per_minute=10_000), make_limiter(tokens_per_minute=10_000, name="another")
    one.slow_down(one.reserve(0), 0)
    assert speed_of(other) == pytest.approx(1, rel=0.02)


def test_a_limiter_made_later_has_the_speed_that_all_have(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.slow_down(limiter.reserve(0), 0)
    assert speed_of(make_limiter(tokens_per_minute=10_000)) == pytest.approx(0.5, rel=0.02)


def test_the_bucket_is_as_deep_at_a_lower_speed(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=500)
    limiter.slow_down(limiter.reserve(0), 0)
    forget(database, seconds=30)
    grants = [limiter.reserve(1) for _ in range(20)]
    assert waits(*grants[:10]) == pytest.approx([0] * 10, abs=0.01)
    speed = 0.5 * (1 + 0.01 / 4)
    assert all(
        grant.at >= grants[0].at + accruing_s(place, 500) / speed - 0.01 for place, grant in enumerate(grants, start=1)
    )


@pytest.mark.slow
def test_a_provider_that_answers_nothing_but_429_for_long_does_not_stop_all_processes_for_good(
    database: Database, make_limiter: LimiterMaker
) -> None:
    """Ten minutes of an outage are 120 pauses; a quarter of an hour after it, a request must not wait for another."""
    limiter = make_limiter(tokens_per_minute=10_000)
    for _ in range(120):
        limiter.slow_down(limiter.reserve(2), 0)
        forget(database, seconds=5)
    forget(database, minutes=15)
    assert max(waits(*(limiter.reserve(200) for _ in range(3)))) < 15 * 60


def test_what_is_granted_in_a_pause_does_not_all_go_at_its_end(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.slow_down(limiter.reserve(0), 60)
    grants = [limiter.reserve(200) for _ in range(60)]
    assert most_in_a_minute([(grant.at, grant.n_tokens) for grant in grants]) <= 10_000 * 0.55


def test_a_429_of_a_request_granted_before_the_fall_is_known_though_it_went_after_it(
    database: Database, make_limiter: LimiterMaker
) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.reserve(0)
    forget(database, seconds=40)
    limiter.reserve(0)
    forget(database, seconds=30)
    early, *_, late = [limiter.reserve(200) for _ in range(20)]
    assert late.wait_s > 20
    limiter.slow_down(early, 0)
    assert speed_of(limiter) == pytest.approx(0.5, rel=0.02)
    forget(database, seconds=60)
    limiter.slow_down(earlier(late, 60), 0)
    assert speed_of(limiter) == pytest.approx(0.505, rel=0.02)


# The database


@pytest.mark.parametrize("steps", [(10,), (90,), (36_000,), (36_000, 7), (36_000, -36_000, 50_000)], ids=str)
def test_a_clock_that_steps_back_makes_nobody_wait_longer_and_lets_nothing_more_through(
    database: Database, make_limiter: LimiterMaker, steps: tuple[int, ...]
) -> None:
    one, other = (make_limiter(tokens_per_minute=10_000) for _ in range(2))
    grants = [one.reserve(200)]
    for step in steps:
        forget(database, seconds=-step)
        grants = [earlier(grant, -step) for grant in grants]
        grants += [limiter.reserve(200) for limiter in (one, other) for _ in range(40)]
    n_granted = len(grants)
    assert grants[-1].wait_s <= accruing_s(200 * n_granted, 10_000) + 5
    if all(step > 0 for step in steps):
        assert most_in_a_minute([(grant.at, 200) for grant in grants]) <= 10_000
        assert grants[-1].wait_s >= accruing_s(200 * n_granted, 10_000) - 5


def test_a_pause_is_as_long_after_a_clock_that_stepped_back(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    limiter.slow_down(limiter.reserve(200), 300)
    forget(database, hours=-10)
    assert limiter.reserve(200).wait_s == pytest.approx(300, abs=5)
    forget(database, seconds=200)
    assert limiter.reserve(200).wait_s == pytest.approx(100, abs=5)


def test_the_last_minute_is_the_same_after_a_clock_that_stepped_back(
    database: Database, make_limiter: LimiterMaker
) -> None:
    limiter = make_limiter(tokens_per_minute=10_000)
    spend_two_minutes(database, limiter, 6_000)
    limiter.reserve(0)
    forget(database, hours=-10)
    limiter.slow_down(limiter.reserve(0), 0)
    assert speed_of(limiter) == pytest.approx(0.96 * 0.6, rel=0.02)
    forget(database, minutes=3)
    assert speed_of(limiter) == pytest.approx(0.96 * 0.6 + 0.045, rel=0.02)


def test_a_roles_stricter_isolation_fails_nobody(database: Database) -> None:
    with as_role(database, "SUPERUSER") as seen:
        role = sa.make_url(seen.url).username
        execute(database.adbc_uri, f"ALTER ROLE {role} SET default_transaction_isolation = 'serializable'")
        limiter = RateLimiter(seen.get_engine("web"), "provider", 1, MANY)

        def spend(place: int) -> float:
            grant = limiter.reserve(1)
            if place % 10 == 0:
                limiter.slow_down(grant, 0)
            return grant.wait_s

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(spend, range(80)))) == 80


def test_the_log_of_seconds_does_not_grow(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=60)
    grants = [limiter.reserve(1) for _ in range(150)]
    assert grants[-1].at > grants[0].at + 120
    [(n_rows,)] = execute(database.adbc_uri, "SELECT count(*) FROM songvec.rate_seconds")
    assert 100 < n_rows <= 120


def test_a_limiter_leaves_no_transaction_open(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    limiter.slow_down(limiter.reserve(1), 1)
    open_ones = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND state LIKE 'idle in transaction%'
    """
    assert execute(database.adbc_uri, open_ones) == [(0,)]
    assert execute(database.adbc_uri, "SELECT name FROM songvec.rate_limits") == [("provider",)]


def test_a_database_that_is_gone_is_an_error_of_ours() -> None:
    engine = get_engine(f"postgresql://ann@127.0.0.1:{free_port()}/songs")
    with pytest.raises(DatabaseError, match="is it running"):
        RateLimiter(engine, "provider", 1, 1)


def test_a_database_that_goes_away_later_is_an_error_of_ours(database: Database) -> None:
    limiter = RateLimiter(own_engine(database, poolclass=NullPool), "provider", 1, 1)
    grant = limiter.reserve(1)
    execute(database.adbc_uri, "DROP TABLE songvec.rate_limits")
    with pytest.raises(DatabaseError, match="rate_limits"):
        limiter.reserve(1)
    with pytest.raises(DatabaseError, match="rate_limits"):
        limiter.slow_down(grant, 1)
