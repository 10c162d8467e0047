"""One quota for all processes: waits add up over engines and threads, and nothing is granted before it has accrued.

Waits are told, not waited for: quotas are so small here that the time a test takes hardly counts.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database, get_engine
from songvec_assets_tests.administration import execute, free_port

MANY = 10**9

SPENDER = """
import sys
from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.postgres.engine import Database
limiter = RateLimiter(Database(sys.argv[1]).get_engine("web"), "provider", 1, 10**9)
print(*(limiter.reserve(1) for _ in range(10)))
"""

LimiterMaker = Callable[..., RateLimiter]


@pytest.fixture
def make_limiter(database: Database) -> Iterator[LimiterMaker]:
    """Makes limiters, each on an engine of its own, as each process has."""
    engines: list[sa.Engine] = []

    def make(requests_per_minute: float = MANY, tokens_per_minute: float = MANY, name: str = "provider") -> RateLimiter:
        engines.append(sa.create_engine(database.get_engine().url))
        return RateLimiter(engines[-1], name, requests_per_minute, tokens_per_minute)

    yield make
    for engine in engines:
        engine.dispose()


def forget(database: Database, hours: int) -> None:
    """Let it be so many hours since anything was granted."""
    statement = (
        "UPDATE songvec.rate_limits SET requests_at = requests_at - %s::interval, tokens_at = tokens_at - %s::interval"
    )
    execute(database.adbc_uri, statement, (f"{hours} hours", f"{hours} hours"))


def test_limiters_on_two_engines_share_one_quota_of_requests(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(requests_per_minute=1), make_limiter(requests_per_minute=1)
    waits = [limiter.reserve(1) for _ in range(5) for limiter in (one, other)]
    assert waits == pytest.approx([60 * place for place in range(1, 11)], abs=5)


def test_limiters_on_two_engines_share_one_quota_of_tokens(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(tokens_per_minute=60), make_limiter(tokens_per_minute=60)
    waits = [one.reserve(100), other.reserve(50), one.reserve(1), other.reserve(849)]
    assert waits == pytest.approx([100, 150, 151, 1000], abs=5)


def test_the_scarcer_of_requests_and_tokens_decides_and_both_are_spent(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1, tokens_per_minute=60)
    waits = [limiter.reserve(n_tokens) for n_tokens in (10, 10, 500, 1, 1)]
    assert waits == pytest.approx([60, 120, 520, 521, 522], abs=5)
    assert [limiter.reserve(0) for _ in range(5)] == pytest.approx([522, 522, 522, 540, 600], abs=5)


def test_the_first_request_waits_until_its_own_cost_has_accrued(make_limiter: LimiterMaker) -> None:
    assert make_limiter(requests_per_minute=1).reserve(1) == pytest.approx(60, abs=2)
    assert make_limiter(tokens_per_minute=60, name="other").reserve(600) == pytest.approx(600, abs=2)


def test_what_was_not_used_is_not_saved_up(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1, tokens_per_minute=60)
    limiter.reserve(60)
    forget(database, hours=10)
    assert [limiter.reserve(1) for _ in range(3)] == pytest.approx([60, 120, 180], abs=5)
    forget(database, hours=10)
    assert [limiter.reserve(600) for _ in range(2)] == pytest.approx([600, 1200], abs=5)


def test_a_pause_holds_back_every_limiter(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(), make_limiter()
    one.pause(300)
    assert [other.reserve(1), one.reserve(1)] == pytest.approx([300, 300], abs=5)


def test_a_shorter_pause_does_not_end_a_longer_wait(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    for _ in range(10):
        limiter.reserve(1)
    limiter.pause(5)
    assert limiter.reserve(1) == pytest.approx(660, abs=5)


def test_a_pause_ends(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter()
    limiter.pause(0.3)
    assert limiter.reserve(1) > 0.1
    time.sleep(0.35)
    assert limiter.reserve(1) <= 0.01


def test_another_name_has_a_quota_of_its_own(make_limiter: LimiterMaker) -> None:
    one, other = make_limiter(requests_per_minute=1), make_limiter(requests_per_minute=1, name="another provider")
    for _ in range(10):
        one.reserve(1)
    one.pause(5000)
    assert other.reserve(1) == pytest.approx(60, abs=5)


def test_a_limiter_made_later_forgives_nothing(make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    for _ in range(10):
        limiter.reserve(1)
    assert make_limiter(requests_per_minute=1).reserve(1) == pytest.approx(660, abs=5)


def test_a_changed_quota_holds_from_the_next_request_on(make_limiter: LimiterMaker) -> None:
    make_limiter(requests_per_minute=1).reserve(1)
    assert make_limiter(requests_per_minute=60).reserve(1) == pytest.approx(61, abs=5)


def test_threads_get_every_place_once(make_limiter: LimiterMaker) -> None:
    limiters, waits, barrier = [make_limiter(requests_per_minute=1) for _ in range(2)], [], threading.Barrier(8)

    def spend(limiter: RateLimiter) -> None:
        barrier.wait()
        for _ in range(10):
            waits.append(limiter.reserve(1))

    threads = [threading.Thread(target=spend, args=(limiters[place % 2],)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == pytest.approx([60 * place for place in range(1, 81)], abs=10)


def test_processes_get_every_place_once(database: Database) -> None:
    spenders = [
        subprocess.Popen([sys.executable, "-c", SPENDER, database.url], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    waits = [float(wait) for spender in spenders for wait in spender.communicate(timeout=60)[0].split()]
    assert sorted(waits) == pytest.approx([60 * place for place in range(1, 21)], abs=20)


def test_no_stretch_of_time_holds_more_than_the_quota(make_limiter: LimiterMaker) -> None:
    limiters, sent, lock = [make_limiter(requests_per_minute=3000) for _ in range(2)], [], threading.Lock()
    started = time.monotonic()

    def send(limiter: RateLimiter) -> None:
        while time.monotonic() - started < 0.8:
            time.sleep(max(0.0, limiter.reserve(1)))
            with lock:
                sent.append(time.monotonic())

    threads = [threading.Thread(target=send, args=(limiters[place % 2],)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # each place is used in its own 20 ms, or later by as much as a thread of a busy machine oversleeps
    assert len(sent) >= 10
    assert all(len([each for each in sent if each <= at]) <= (at - started) / 0.02 + 0.5 for at in sent)


def test_a_limiter_leaves_no_transaction_open(database: Database, make_limiter: LimiterMaker) -> None:
    limiter = make_limiter(requests_per_minute=1)
    limiter.reserve(1)
    limiter.pause(1)
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
    limiter = RateLimiter(sa.create_engine(database.get_engine().url, poolclass=NullPool), "provider", 1, 1)
    execute(database.adbc_uri, "DROP TABLE songvec.rate_limits")
    with pytest.raises(DatabaseError, match="rate_limits"):
        limiter.reserve(1)
    with pytest.raises(DatabaseError, match="rate_limits"):
        limiter.pause(1)
