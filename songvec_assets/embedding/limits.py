"""The provider's quota, shared by every process of a deployment through one row in Postgres.

Generic cell rate algorithm: for requests and for tokens the row holds the time at which all that was granted so far
will have accrued. One atomic statement moves both forward by a request's cost; the request may go once that time is
reached. Nothing is granted before it has accrued, so no sliding minute holds more than the quota.
"""

from sqlalchemy import Engine, text

from songvec_assets.postgres.engine import error_border

_CREATE = text("""
    INSERT INTO songvec.rate_limits (name) VALUES (:name) ON CONFLICT (name) DO NOTHING
""")

_RESERVE = text("""
    UPDATE songvec.rate_limits
    SET requests_at = greatest(requests_at, clock_timestamp()) + make_interval(secs => :request_s),
        tokens_at = greatest(tokens_at, clock_timestamp()) + make_interval(secs => :tokens_s)
    WHERE name = :name
    RETURNING extract(epoch FROM greatest(requests_at, tokens_at) - clock_timestamp())
""")

_PAUSE = text("""
    UPDATE songvec.rate_limits
    SET requests_at = greatest(requests_at, clock_timestamp() + make_interval(secs => :pause_s))
    WHERE name = :name
""")


class RateLimiter:
    """Grants requests within a quota that all processes on the same database share. Thread-safe.

    Args:
        engine: a pooled engine; each call is one short statement of its own.
        name: whose quota it is, such as the provider's base URL.
        requests_per_minute: requests that may start in any minute.
        tokens_per_minute: tokens that may start in any minute.
    """

    def __init__(self, engine: Engine, name: str, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._name = name
        self._seconds_per_request = 60 / requests_per_minute
        self._seconds_per_token = 60 / tokens_per_minute
        with error_border(), self._engine.connect() as connection:
            connection.execute(_CREATE, {"name": name})

    def reserve(self, n_tokens: int) -> float:
        """Take a place for one request of `n_tokens`.

        Returns:
            Seconds to wait before it may be sent; 0 or less: at once. The place is taken in either case.
        """
        costs = {"request_s": self._seconds_per_request, "tokens_s": self._seconds_per_token * n_tokens}
        with error_border(), self._engine.connect() as connection:
            return float(connection.execute(_RESERVE, {"name": self._name, **costs}).scalar_one())

    def pause(self, seconds: float) -> None:
        """Let no process start a request for so many seconds: the provider said that it is too much."""
        with error_border(), self._engine.connect() as connection:
            connection.execute(_PAUSE, {"name": self._name, "pause_s": seconds})
