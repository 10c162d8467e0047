"""What a run may spend: no order of requests, threads or processes exceeds it, and what was reserved is not lost."""

import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.pool import NullPool

from songvec_assets.embedding.budget import Budget, read_month_spending, read_spending
from songvec_assets.embedding.pricing import Price
from songvec_assets.errors import BudgetExceededError, DatabaseError
from songvec_assets.postgres.engine import Database, get_engine
from songvec_assets_tests.administration import as_role, execute, free_port, own_engine

DOLLAR_A_TOKEN = Price(1e6)

SPENDER = """
import sys
from songvec_assets.embedding.budget import Budget, read_month_spending
from songvec_assets.embedding.pricing import Price
from songvec_assets.errors import BudgetExceededError
from songvec_assets.postgres.engine import Database
budget = Budget(Price(1e6), Database(sys.argv[1]).get_engine("web"), sys.argv[2], 100)
for n_tokens in [3] * 100:
    try:
        budget.reserve(n_tokens)
    except BudgetExceededError:
        break
    budget.settle(n_tokens, 2)
print(budget.n_tokens)
"""


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    max_usd=st.integers(0, 200),
    requests=st.lists(
        st.tuples(st.integers(1, 50), st.integers(0, 50), st.booleans(), st.sampled_from([0, 1])), max_size=20
    ),
)
def test_no_order_of_reserving_and_settling_exceeds_the_budget(engine, max_usd, requests):
    """Of two processes, where nothing is billed above its reservation."""
    run = uuid.uuid4().hex
    budgets = [Budget(DOLLAR_A_TOKEN, engine, run, max_usd) for _ in range(2)]
    in_flight, spent = [], [0, 0]
    for reserved, billed, settle_one, place in requests:
        planned = sum(spent) + sum(each for _, each, _ in in_flight) + reserved
        if planned <= max_usd:
            budgets[place].reserve(reserved)
            in_flight.append((place, reserved, min(billed, reserved)))
        else:
            with pytest.raises(BudgetExceededError):
                budgets[place].reserve(reserved)
        if settle_one and in_flight:
            place_settled, settled, billed_tokens = in_flight.pop(0)
            budgets[place_settled].settle(settled, billed_tokens)
            spent[place_settled] += billed_tokens
        assert [budget.usd for budget in budgets] == spent
        assert sum(spent) <= max_usd
    for place, reserved, billed_tokens in in_flight:
        budgets[place].settle(reserved, billed_tokens)
        spent[place] += billed_tokens
    assert [budget.n_tokens for budget in budgets] == spent
    Budget(DOLLAR_A_TOKEN, engine, run, max_usd).reserve(max_usd - sum(spent))


def test_what_a_refused_request_would_have_taken_is_not_set_aside(engine: sa.Engine, run: str) -> None:
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 10)
    with pytest.raises(BudgetExceededError):
        budget.reserve(11)
    budget.reserve(10)


def test_a_failed_request_gives_its_reservation_back(engine: sa.Engine, run: str) -> None:
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 10)
    budget.reserve(10)
    budget.settle(10, 0)
    assert budget.n_tokens == 0
    budget.reserve(10)


def test_more_billed_than_reserved_counts_in_full(engine: sa.Engine, run: str) -> None:
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 10)
    budget.reserve(1)
    budget.settle(1, 8)
    with pytest.raises(BudgetExceededError):
        budget.reserve(3)
    budget.reserve(2)


def test_the_refusal_says_what_was_spent_and_how_to_go_on(engine: sa.Engine, run: str) -> None:
    Budget(DOLLAR_A_TOKEN, engine, run, 10).reserve(2)
    budget = Budget(DOLLAR_A_TOKEN, engine, run, 10)
    budget.reserve(6)
    budget.settle(6, 5)
    with pytest.raises(
        BudgetExceededError, match=r"\$10\.0000 .*\$5\.0000 billed, \$2\.0000 reserved .*\$11\.0000 .*SONGVEC_MAX_USD"
    ):
        budget.reserve(4)


def test_at_no_price_nothing_is_refused_and_no_database_is_asked(run: str) -> None:
    nowhere = get_engine(f"postgresql://ann@127.0.0.1:{free_port()}/songs")
    budget = Budget(Price(0.0), nowhere, run, 0.0, 0.0)
    budget.reserve(10**15)
    budget.settle(10**15, 7)
    assert budget.n_tokens == 7


def test_without_a_budget_nothing_is_refused_and_all_is_counted(engine: sa.Engine, run: str) -> None:
    before = spent(engine)
    budget = Budget(DOLLAR_A_TOKEN, engine, run)
    budget.reserve(10**15)
    budget.settle(10**15, 7)
    assert (budget.n_tokens, spent(engine) - before) == (7, 7)


def spent(engine: sa.Engine) -> float:
    """Dollars of this month."""
    with engine.connect() as connection:
        return sum(read_month_spending(connection))


class TestMonth:
    def test_all_runs_of_a_month_share_its_budget(self, engine: sa.Engine, run: str) -> None:
        first = Budget(DOLLAR_A_TOKEN, engine, run, None, 10)
        first.reserve(6)
        first.settle(6, 5)
        second = Budget(DOLLAR_A_TOKEN, engine, f"{run} another", None, 10)
        with pytest.raises(BudgetExceededError, match=r"month \d{4}-\d\d's budget of \$10.*SONGVEC_MAX_USD_A_MONTH"):
            second.reserve(6)
        second.reserve(5)
        assert spent(engine) == 10

    def test_the_runs_own_limit_binds_as_well_and_nothing_is_set_aside(self, engine: sa.Engine, run: str) -> None:
        budget = Budget(DOLLAR_A_TOKEN, engine, run, 3, 10)
        with pytest.raises(BudgetExceededError, match=r"the budget of \$3.*SONGVEC_MAX_USD or"):
            budget.reserve(4)
        budget.reserve(3)
        assert spent(engine) == 3

    def test_another_month_begins_at_nothing_in_the_middle_of_a_run(
        self, engine: sa.Engine, database: Database, run: str
    ) -> None:
        budget = Budget(DOLLAR_A_TOKEN, engine, run, None, 10)
        budget.reserve(9)
        execute(database.adbc_uri, "UPDATE songvec.budgets SET name = 'month 2001-01' WHERE name LIKE 'month %'")
        budget.reserve(9)
        assert spent(engine) == 9

    def test_a_month_that_begins_charges_the_run_once(self, engine: sa.Engine, database: Database, run: str) -> None:
        budget = Budget(DOLLAR_A_TOKEN, engine, run, 10, None)
        budget.reserve(3)
        execute(database.adbc_uri, "DELETE FROM songvec.budgets WHERE name LIKE 'month %'")
        budget.reserve(3)
        budget.reserve(4)
        with pytest.raises(BudgetExceededError):
            budget.reserve(1)

    def test_what_is_settled_after_midnight_counts_for_the_month_it_was_reserved_in(
        self, engine: sa.Engine, database: Database, run: str
    ) -> None:
        budget = Budget(DOLLAR_A_TOKEN, engine, run, None, 10)
        month = budget.reserve(9)
        assert month is not None
        execute(database.adbc_uri, "UPDATE songvec.budgets SET name = 'month 2001-01' WHERE name = %s", (month,))
        budget.reserve(9)
        budget.settle(9, 0, "month 2001-01")
        assert spent(engine) == 9
        with pytest.raises(BudgetExceededError):
            budget.reserve(2)

    def test_processes_that_reserve_and_settle_never_wait_for_each_other(self, engine: sa.Engine, run: str) -> None:
        budgets = [Budget(DOLLAR_A_TOKEN, engine, f"{run} {name}", None, 10**6) for name in "azAZ09"]

        def spend(place: int) -> None:
            budgets[place % 6].reserve(3)
            budgets[place % 6].settle(3, 2)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(spend, range(240)))
        assert spent(engine) == 480


def test_a_budget_of_nothing_refuses_the_first_token(engine: sa.Engine, run: str) -> None:
    with pytest.raises(BudgetExceededError):
        Budget(Price(0.10), engine, run, 0.0).reserve(1)


def test_a_limit_that_its_price_divides_evenly_is_spent_to_the_last_token(engine: sa.Engine, run: str) -> None:
    budget = Budget(Price(0.10), engine, run, 0.30)
    budget.reserve(3_000_000)
    with pytest.raises(BudgetExceededError):
        budget.reserve(1)


def test_a_limit_of_more_tokens_than_any_column_holds_is_one_too(engine: sa.Engine, run: str) -> None:
    Budget(Price(1e-9), engine, run, 1e6).reserve(10**15)


def test_another_run_has_a_budget_of_its_own(engine: sa.Engine, run: str) -> None:
    Budget(DOLLAR_A_TOKEN, engine, run, 10).reserve(10)
    Budget(DOLLAR_A_TOKEN, engine, f"{run} another", 10).reserve(10)


def test_a_process_that_joins_a_run_finds_what_was_spent_and_counts_its_own(engine: sa.Engine, run: str) -> None:
    first = Budget(DOLLAR_A_TOKEN, engine, run, 10)
    first.reserve(6)
    first.settle(6, 6)
    second = Budget(DOLLAR_A_TOKEN, engine, run, 10)
    assert second.usd == 0
    with pytest.raises(BudgetExceededError):
        second.reserve(5)
    second.reserve(4)
    second.settle(4, 3)
    assert (first.usd, second.usd) == (6, 3)


def test_what_a_killed_process_had_reserved_stays_counted(engine: sa.Engine, run: str) -> None:
    """The provider bills what it was sent, whether or not anybody hears the answer."""
    Budget(DOLLAR_A_TOKEN, engine, run, 10).reserve(8)
    with pytest.raises(BudgetExceededError):
        Budget(DOLLAR_A_TOKEN, engine, run, 10).reserve(3)


def test_a_run_goes_on_under_a_higher_limit(engine: sa.Engine, run: str) -> None:
    Budget(DOLLAR_A_TOKEN, engine, run, 10).reserve(10)
    higher = Budget(DOLLAR_A_TOKEN, engine, run, 15)
    higher.reserve(5)
    with pytest.raises(BudgetExceededError):
        higher.reserve(1)


def test_threads_together_stay_within_one_budget(engine: sa.Engine, run: str) -> None:
    budgets = [Budget(DOLLAR_A_TOKEN, engine, run, 100) for _ in range(2)]
    n_granted = [0] * 4
    start = threading.Barrier(4)

    def spend(place: int) -> None:
        start.wait()
        for _ in range(60):
            try:
                budgets[place % 2].reserve(2)
            except BudgetExceededError:
                continue
            budgets[place % 2].settle(2, 1)
            n_granted[place] += 1

    threads = [threading.Thread(target=spend, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # at most four reservations of 2 stand at once, so the last tokens may stay unspent
    assert sum(budget.n_tokens for budget in budgets) == sum(n_granted)
    assert 92 <= sum(n_granted) <= 100


def test_a_roles_stricter_isolation_fails_nobody(database: Database, run: str) -> None:
    with as_role(database, "SUPERUSER") as seen:
        role = sa.make_url(seen.url).username
        execute(database.adbc_uri, f"ALTER ROLE {role} SET default_transaction_isolation = 'serializable'")
        budgets = [Budget(DOLLAR_A_TOKEN, seen.get_engine("web"), run, 1_000) for _ in range(2)]

        def spend(place: int) -> None:
            budgets[place % 2].reserve(3)
            budgets[place % 2].settle(3, 2)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(spend, range(100)))
        assert sum(budget.n_tokens for budget in budgets) == 200


def test_processes_together_stay_within_one_budget(database: Database, run: str) -> None:
    spenders = [
        subprocess.Popen([sys.executable, "-c", SPENDER, database.url, run], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    n_tokens = [int(spender.communicate(timeout=60)[0]) for spender in spenders]
    assert 94 <= sum(n_tokens) <= 100


def test_a_database_that_is_gone_is_an_error_of_ours(database: Database, run: str) -> None:
    with pytest.raises(DatabaseError, match="is it running"):
        Budget(DOLLAR_A_TOKEN, get_engine(f"postgresql://ann@127.0.0.1:{free_port()}/songs"), run, 10)
    budget = Budget(DOLLAR_A_TOKEN, own_engine(database, poolclass=NullPool), run, 10)
    execute(database.adbc_uri, "DROP TABLE songvec.budgets")
    with pytest.raises(DatabaseError, match="budgets"):
        budget.reserve(1)
    with pytest.raises(DatabaseError, match="budgets"):
        budget.settle(2, 1)


def test_spending_is_that_of_all_months_and_of_this_one(engine: sa.Engine, database: Database, run: str) -> None:
    def read() -> dict[str, tuple[float, float]]:
        with database.get_connection() as connection:
            return read_spending(connection)

    assert read() == {"month": (0, 0), "searches": (0, 0)}
    searches = execute(database.adbc_uri, "SELECT 'searches ' || to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM')")[0][0]
    for name in (run, searches):
        budget = Budget(DOLLAR_A_TOKEN, engine, name)
        budget.reserve(5)
        budget.settle(3, 2)
    old = "INSERT INTO songvec.budgets (name, usd) VALUES ('month 2020-02', 10), ('searches 2020-02', 1)"
    execute(database.adbc_uri, old)
    assert read() == {"month": (14, 8), "searches": (3, 4)}
