"""What a run has spent, and the hard stop before it spends too much; over all its processes, through a row in Postgres.

A request reserves its estimated tokens before it is sent and settles with what was billed: what is spent plus what is
reserved never exceeds the limit by more than the estimates' errors of the requests in flight. What a killed process
had reserved stays counted, as the provider bills what it was sent.
"""

import threading

from sqlalchemy import Engine

from songvec_assets.embedding.pricing import Price
from songvec_assets.errors import BudgetExceededError, SettingsError
from songvec_assets.postgres.engine import atomic, error_border

_CREATE = atomic("""
    INSERT INTO songvec.budgets (name, n_tokens) VALUES (:name, 0) ON CONFLICT (name) DO NOTHING
""")

_RESERVE = atomic("""
    UPDATE songvec.budgets SET n_tokens = n_tokens + :n_tokens, updated_at = now()
    WHERE name = :name AND n_tokens + :n_tokens <= :max_tokens
    RETURNING n_tokens
""")

_SETTLE = atomic("""
    UPDATE songvec.budgets SET n_tokens = n_tokens + :n_tokens, updated_at = now() WHERE name = :name
""")

_SPENT = atomic("SELECT n_tokens FROM songvec.budgets WHERE name = :name")


class Budget:
    """Counts what this process spends; with a limit, all processes that name the same run keep to it. Thread-safe.

    Args:
        price: of tokens.
        engine: a pooled engine; each call is one short statement of its own, and none where there is no limit.
        run: whose budget it is.
        max_usd: the limit in dollars; None: none.
    """

    def __init__(self, price: Price, engine: Engine, run: str, max_usd: float | None = None) -> None:
        if max_usd is not None and not max_usd >= 0:
            raise SettingsError(f"expected a budget of 0 dollars or more, got {max_usd}")
        self.price = price
        self.n_tokens = 0
        self._max_usd = max_usd
        self._max_tokens = None if max_usd is None else price.n_tokens(max_usd)
        self._run = run
        self._lock = threading.Lock()
        if self._max_tokens is not None:
            self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
            with error_border(), self._engine.connect() as connection:
                connection.execute(_CREATE, {"name": run})

    @property
    def usd(self) -> float:
        """Dollars that this process has spent so far."""
        return self.price.usd(self.n_tokens)

    def reserve(self, n_tokens: int) -> None:
        """Set aside the price of a request.

        Raises:
            BudgetExceededError: with it, the limit would be exceeded; nothing is set aside.
        """
        if self._max_tokens is None:
            return
        wanted = {"name": self._run, "n_tokens": n_tokens, "max_tokens": self._max_tokens}
        with error_border(), self._engine.connect() as connection:
            if connection.scalar(_RESERVE, wanted) is None:
                spent = connection.scalar(_SPENT, {"name": self._run}) or 0
                raise BudgetExceededError(
                    f"the budget of ${self._max_usd:,.4f} would be exceeded by the next request "
                    f"(${self.price.usd(spent):,.4f} spent or on its way, ${self.price.usd(spent + n_tokens):,.4f} "
                    "with it). All that was paid for is kept: raise SONGVEC_MAX_USD or the run's budget and start "
                    "the same command again"
                )

    def settle(self, reserved_tokens: int, billed_tokens: int) -> None:
        """Replace a reservation by what was billed (0 for a request that failed)."""
        with self._lock:
            self.n_tokens += billed_tokens
        if self._max_tokens is not None and billed_tokens != reserved_tokens:
            with error_border(), self._engine.connect() as connection:
                connection.execute(_SETTLE, {"name": self._run, "n_tokens": billed_tokens - reserved_tokens})
