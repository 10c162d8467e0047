"""The spending of runs, searches and months in dollars, kept in Postgres, and the hard stop before it exceeds a budget.

A request reserves its estimated price before it is sent, and settles it when the bill is known: billed plus reserved
amounts exceed a limit at most by the estimation errors of the requests in flight. A try that may have been billed, such
as one that timed out, stays counted; so does what a killed process had reserved, since the provider bills what it
received. Months are in UTC, by the database's clock.
When to add here: another limit of spending. Keep out: what one request has of it (`reservation`), prices and estimates
(`pricing`), quotas (`limits`).
"""

import asyncio
import threading
from decimal import Decimal
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Engine

from songvec_assets.embedding.pricing import Price
from songvec_assets.errors import BudgetExceededError
from songvec_assets.postgres.engine import atomic, error_border
from songvec_assets.postgres.schema import has_tables

_MONTH = "'month ' || to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM')"

_NAMES = f"(CAST(:run AS text), coalesce(CAST(:month AS text), {_MONTH}))"
_CREATE = atomic(f"""
    INSERT INTO songvec.budgets (name) VALUES (:run), ({_MONTH}) ON CONFLICT (name) DO NOTHING
""")

# a separate statement locks the rows first, in a fixed order: the next one then sees what others committed, and two
# processes never deadlock
_LOCK = f"SELECT FROM songvec.budgets WHERE name IN {_NAMES} ORDER BY name FOR UPDATE"
_EXCEEDED_ROWS = f"""
    SELECT name, usd, reserved_usd, max_usd, usd + reserved_usd + CAST(:usd AS numeric) AS after
    FROM songvec.budgets JOIN (
        VALUES (CAST(:run AS text), CAST(:max_usd AS numeric)), ({_MONTH}, CAST(:max_usd_a_month AS numeric))
    ) AS limits (name, max_usd) USING (name)
    WHERE usd + reserved_usd + CAST(:usd AS numeric) > max_usd
"""
_RESERVED = "reserved_usd = reserved_usd + CAST(:usd AS numeric)"
_BILLED = "usd = usd + CAST(:billed_usd AS numeric)"
_CHARGE = f"UPDATE songvec.budgets SET updated_at = now(), {_RESERVED}"
_BOTH = f"(SELECT count(*) FROM songvec.budgets WHERE name IN {_NAMES}) = 2"
_RESERVE = atomic(
    f"{_LOCK}; {_CHARGE} WHERE name IN {_NAMES} AND {_BOTH} AND NOT EXISTS ({_EXCEEDED_ROWS}) RETURNING name"
)
_SETTLE = atomic(f"{_LOCK}; {_CHARGE}, {_BILLED} WHERE name IN {_NAMES}")
_EXCEEDED = atomic(f"{_EXCEEDED_ROWS} ORDER BY name DESC")

_SPENT = sa.text(f"SELECT usd, reserved_usd FROM songvec.budgets WHERE name = {_MONTH}")
_ALL_SPENT = sa.text(f"""
    SELECT split_part(name, ' ', 1) AS kind, sum(usd) AS usd,
           coalesce(sum(usd + reserved_usd) FILTER (WHERE {_MONTH} LIKE '% ' || split_part(name, ' ', 2)), 0) AS now
    FROM songvec.budgets WHERE name ~ '^(month|searches) ' GROUP BY kind
""")


class MonthSpending(NamedTuple):
    """Dollars of the current month, over all runs on a database.

    Attributes:
        billed: by the provider.
        reserved: by requests in flight, or by killed runs.
    """

    billed: float = 0.0
    reserved: float = 0.0

    def describe(self) -> str:
        """`$0.0176 billed`, and what is reserved, if anything."""
        return f"${self.billed:,.4f} billed" + (f", ${self.reserved:,.4f} reserved" if self.reserved else "")


def read_month_spending(connection: sa.Connection) -> MonthSpending:
    """What this month has cost so far."""
    if not has_tables(connection):
        return MonthSpending()
    row = connection.execute(_SPENT).one_or_none()
    return MonthSpending() if row is None else MonthSpending(*map(float, row))


def read_spending(connection: sa.Connection) -> dict[str, tuple[float, float]]:
    """Dollars billed so far, and dollars billed or reserved this month: of all requests, as `month`, and `searches`."""
    rows = connection.execute(_ALL_SPENT) if has_tables(connection) else ()
    return {"month": (0.0, 0.0), "searches": (0.0, 0.0)} | {kind: (float(usd), float(now)) for kind, usd, now in rows}


class Budget:
    """Counts what this process spends; processes of the same run share its limit, and all processes the month's limit.

    Thread-safe, except for the counters of reservations. If the price is zero, the database is not used.

    Args:
        price: of tokens.
        engine: a pooled engine; each call is one or two short statements.
        run: identifies the run; `searches YYYY-MM`: the searches of a month.
        max_usd: the run's limit in dollars; None: none.
        max_usd_a_month: the limit of a calendar month in dollars, over all runs; None: none.

    Attributes:
        price, run: as given.
        n_tokens: billed so far.
        n_held: reservations of this process that hold an amount and do not wait for more.
        n_asking: reservations that wait for the database's answer; it may have granted them already.
        n_settled: settled reservations.
    """

    def __init__(
        self,
        price: Price,
        engine: Engine,
        run: str,
        max_usd: float | None = None,
        max_usd_a_month: float | None = None,
    ) -> None:
        self.price, self.run = price, run
        self.n_tokens = 0
        self.n_held = self.n_asking = self.n_settled = 0
        self._lock = threading.Lock()
        self._unsettled: list[tuple[int, int, str | None]] = []
        self._settling: asyncio.Task[None] | None = None
        self._settling_alone = asyncio.Lock()
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        # decimals: with a price of 0.1 a limit of 0.3 is reached exactly
        self._given: dict[str, Any] = {
            "run": run,
            "month": None,
            "max_usd": None if max_usd is None else Decimal(str(max_usd)),
            "max_usd_a_month": None if max_usd_a_month is None else Decimal(str(max_usd_a_month)),
        }
        if not price.is_free:
            with error_border(), self._engine.connect() as connection:
                connection.execute(_CREATE, self._given)

    @property
    def usd(self) -> float:
        """Dollars that this process has spent so far."""
        return self.price.usd(self.n_tokens)

    def reserve(self, n_tokens: int) -> str | None:
        """Reserve the price of a request.

        Returns:
            The month that it counts for, to be passed to `settle`; None if the price is zero.

        Raises:
            BudgetExceededError: a limit would be exceeded; nothing is reserved.
        """
        if self.price.is_free:
            return None
        given = self._given | {"usd": self.price.exact_usd(n_tokens)}
        with error_border(), self._engine.connect() as connection:
            while True:
                charged = [name for (name,) in connection.execute(_RESERVE, given) if name.startswith("month ")]
                if charged:
                    return str(charged[0])
                exceeded = connection.execute(_EXCEEDED, given).first()
                if exceeded is not None:
                    raise BudgetExceededError(_describe(*exceeded))
                # a new month has begun, or the rows were removed
                connection.execute(_CREATE, given)

    def settle(self, reserved_tokens: int, billed_tokens: int, month: str | None = None) -> None:
        """Replace a reservation by what was billed.

        Args:
            reserved_tokens: of the request.
            billed_tokens: 0 for one that failed.
            month: as `reserve` returned it; None: the current one.
        """
        with self._lock:
            self.n_tokens += billed_tokens
        if not self.price.is_free and (billed_tokens or reserved_tokens):
            given = self._given | {
                "usd": -self.price.exact_usd(reserved_tokens),
                "billed_usd": self.price.exact_usd(billed_tokens),
                "month": month,
            }
            with error_border(), self._engine.connect() as connection:
                connection.execute(_SETTLE, given)

    async def settle_together(self, reserved_tokens: int, billed_tokens: int, month: str | None) -> None:
        """`settle`, together with all that wait: answers of one part come at once, and lock the same row."""
        self._unsettled.append((reserved_tokens, billed_tokens, month))
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle_waiting())
        await asyncio.shield(self._settling)

    async def _settle_waiting(self) -> None:
        async with self._settling_alone:
            taken, self._unsettled, self._settling = self._unsettled, [], None
            for month in {month for _, _, month in taken}:
                n_reserved = sum(reserved for reserved, _, each in taken if each == month)
                n_billed = sum(billed for _, billed, each in taken if each == month)
                await asyncio.to_thread(self.settle, n_reserved, n_billed, month)


def _describe(name: str, billed: Decimal, reserved: Decimal, max_usd: Decimal, after: Decimal) -> str:
    kind, _, month = name.partition(" ")
    whose, setting = {
        "month": (f"{name}'s budget", "SONGVEC_MAX_USD_A_MONTH"),
        "searches": (f"the budget for searches in {month}", "SONGVEC_MAX_SEARCH_USD_A_MONTH"),
    }.get(kind, ("the budget", "SONGVEC_MAX_USD"))
    return (
        f"{whose} of ${max_usd:,.4f} would be exceeded by the next request (${billed:,.4f} billed, ${reserved:,.4f} "
        f"reserved for requests in flight, ${after:,.4f} with it). All that was paid for is kept: raise {setting}"
        + (" or wait for the next month, then" if month else " or the run's budget and")
        + " start the same command again"
    )
