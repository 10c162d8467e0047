"""What the last run sent, and how many bytes a model's tokens have: kept in the database for estimates and checks.

When to add here: another figure of what was sent that outlives a run. Keep out: budgets (`budget`).
"""

from dataclasses import asdict, dataclass, replace

from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database

SPENDING = "spending of the last run"


@dataclass(frozen=True)
class Spending:
    """What a run sent.

    Attributes:
        n_tokens_expected: as estimated before the first request of each range.
        n_tokens: billed.
        bytes_per_token: as learned from what was billed.
        is_first: whether no run had measured the model's tokens before this one.
    """

    n_tokens_expected: int
    n_tokens: int
    bytes_per_token: float
    is_first: bool = False


@dataclass(frozen=True)
class SpendingLog:
    """What is recorded of runs that sent anything.

    Attributes:
        model: of the tokens.
    """

    database: Database
    model: str

    @property
    def _key(self) -> str:
        return f"bytes per token of {self.model}"

    def read_bytes_per_token(self) -> float | None:
        """As learned by earlier runs; None before the first one."""
        with self.database.get_connection() as connection:
            return schema.read_record(connection, self._key, float)

    def read(self) -> Spending | None:
        """What was sent by the last run that sent anything; None: nothing is recorded that this version can read."""
        with self.database.get_connection() as connection:
            return schema.read_record(connection, SPENDING, Spending)

    def write(self, spending: Spending) -> None:
        """Record what a run sent, at its end."""
        with self.database.get_connection() as connection:
            is_first = schema.read_value(connection, self._key) is None
            schema.write_value(connection, self._key, round(spending.bytes_per_token, 3))
            schema.write_value(connection, SPENDING, asdict(replace(spending, is_first=is_first)))
