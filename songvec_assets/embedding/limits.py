"""The provider's quota, shared by every process of a deployment through one row in Postgres.

A token bucket each for requests and for tokens, as the generic cell rate algorithm (ITU-T I.371): the row holds the
time at which all that was granted will have accrued; one atomic statement moves it forward by a request's cost, and
the request may go once that time is no further ahead than the bucket is deep. Depth and rate together make the quota,
so no sliding minute holds more than the provider allows.

A provider that answers 429 all the same allows less than the settings say. How much, the last minute tells: what was
granted and not refused. All processes slow down to a little less, then probe upward, slowly at first.
"""

import threading
from dataclasses import dataclass

from sqlalchemy import Engine, TextClause, text

from songvec_assets.postgres.engine import error_border

DEPTH_SHARE = 1 / 50
"""Depth of a bucket as a share of the quota; the largest request is as large."""
KEPT_SHARE = 0.96
"""Kept of what a provider was seen to allow; the rest is room for the next request, and for what arrives unevenly."""
PROBING = 0.01
"""Growth in the first minute without a 429; after n minutes it is n² times as much."""

_CREATE = text("""
    INSERT INTO songvec.rate_limits (name) VALUES (:name) ON CONFLICT (name) DO NOTHING
""")

_SPEED = """least(1, share * (1 + :probing * (extract(epoch FROM clock_timestamp() - slowed_at) / 60) ^ 2))"""

# the seconds of the last two minutes are kept in a ring, so that the log never grows; a crash of the server may forget
# the last grants, which costs less than a sync of its disk for each
_RESERVE = text(f"""
    WITH granted AS (
        UPDATE songvec.rate_limits
        SET requests_at = greatest(requests_at, clock_timestamp()) + make_interval(secs => :request_s / {_SPEED}),
            tokens_at = greatest(tokens_at, clock_timestamp()) + make_interval(secs => :tokens_s / {_SPEED}),
            busy_since = CASE WHEN tokens_at < clock_timestamp() - interval '1 minute' THEN clock_timestamp()
                              ELSE busy_since END
        WHERE name = :name
        RETURNING extract(epoch FROM greatest(
            requests_at - make_interval(secs => :requests_depth_s / {_SPEED}),
            tokens_at - make_interval(secs => :tokens_depth_s / {_SPEED}),
            paused_until,
            clock_timestamp()
        )) AS at
    ), logged AS (
        INSERT INTO songvec.rate_seconds AS kept (name, slot, second, n_requests, n_tokens)
        SELECT :name, floor(at)::bigint % 120, floor(at)::bigint, 1, :n_tokens FROM granted
        ON CONFLICT (name, slot) DO UPDATE
        SET second = excluded.second,
            n_requests = CASE kept.second WHEN excluded.second THEN kept.n_requests ELSE 0 END + 1,
            n_tokens = CASE kept.second WHEN excluded.second THEN kept.n_tokens ELSE 0 END + excluded.n_tokens
    )
    SELECT at, at - extract(epoch FROM clock_timestamp()), set_config('synchronous_commit', 'off', true) FROM granted
""")

_TAKE_BACK = text("""
    UPDATE songvec.rate_seconds SET n_requests = n_requests - 1, n_tokens = n_tokens - :n_tokens
    WHERE name = :name AND second = floor(:at)::bigint
""")

_SLOW_DOWN = text(f"""
    WITH used AS (
        SELECT greatest(sum(n_requests) / :requests_per_minute, sum(n_tokens) / :tokens_per_minute) AS share
        FROM songvec.rate_seconds
        WHERE name = :name AND second > extract(epoch FROM clock_timestamp()) - 60
    ), before AS (
        SELECT :at <= extract(epoch FROM slowed_at) AS known, {_SPEED} AS speed,
               least(1, extract(epoch FROM clock_timestamp() - busy_since) / 60) AS minutes
        FROM songvec.rate_limits WHERE name = :name
    )
    UPDATE songvec.rate_limits
    SET paused_until = greatest(paused_until, clock_timestamp() + make_interval(secs => :pause_s)),
        share = CASE WHEN known THEN rate_limits.share
                     ELSE least(speed, greatest(:kept * used.share / minutes, speed / 2)) END,
        slowed_at = CASE WHEN known THEN slowed_at ELSE clock_timestamp() END
    FROM used, before
    WHERE name = :name
""")


@dataclass(frozen=True)
class Grant:
    """A place in the quota.

    Attributes:
        n_tokens: granted.
        at: when the request may go, in seconds since the epoch by the database's clock.
        wait_s: seconds until then, when it was granted.
    """

    n_tokens: int
    at: float
    wait_s: float


class RateLimiter:
    """Grants requests within a quota that all processes on the same database share. Thread-safe.

    Args:
        engine: a pooled engine; each call is one or two short statements of their own.
        name: whose quota it is, such as the provider's base URL.
        requests_per_minute: requests that may start in any minute.
        tokens_per_minute: tokens that may start in any minute.
    """

    def __init__(self, engine: Engine, name: str, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._name = name
        self._quota = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        self._request_s, self._requests_depth_s = _pace(requests_per_minute)
        self._token_s, self._tokens_depth_s = _pace(tokens_per_minute)
        self._lock = threading.Lock()
        self._owed_tokens = 0
        with error_border(), self._engine.connect() as connection:
            connection.execute(_CREATE, {"name": name})

    def reserve(self, n_tokens: int) -> Grant:
        """Take a place for one request of `n_tokens`; whether it is used or not, it is taken."""
        with self._lock:
            owed, self._owed_tokens = self._owed_tokens, 0
        costs = {"request_s": self._request_s, "tokens_s": self._token_s * (n_tokens + owed)}
        depths = {"requests_depth_s": self._requests_depth_s, "tokens_depth_s": self._tokens_depth_s}
        with error_border(), self._engine.connect() as connection:
            given = {"name": self._name, "n_tokens": n_tokens + owed, "probing": PROBING, **costs, **depths}
            at, wait_s, _ = connection.execute(_RESERVE, given).one()
        return Grant(n_tokens, float(at), float(wait_s))

    def settle(self, grant: Grant, billed_tokens: int) -> None:
        """Correct a grant by what was billed; the next one pays or gets the difference."""
        with self._lock:
            self._owed_tokens += billed_tokens - grant.n_tokens

    def slow_down(self, grant: Grant, pause_s: float) -> None:
        """Take in that the provider answered 429 to a request: no process starts another one for `pause_s`.

        The shared rate falls to KEPT_SHARE of what the last minute let through, by half at most; once for all the
        requests that were granted before it fell.
        """
        self._execute(_TAKE_BACK, n_tokens=grant.n_tokens, at=grant.at)
        self._execute(_SLOW_DOWN, at=grant.at, pause_s=pause_s, probing=PROBING, kept=KEPT_SHARE, **self._quota)

    def _execute(self, statement: TextClause, **values: float) -> None:
        with error_border(), self._engine.connect() as connection:
            connection.execute(statement, {"name": self._name, **values})


def _pace(quota: float) -> tuple[float, float]:
    """Seconds that one unit takes to accrue, and seconds that the bucket takes to fill."""
    depth = max(1.0, quota * DEPTH_SHARE)
    # depth and rate add up to the quota; the smallest quotas are all depth, and would never accrue
    rate_s = 60 / max(quota - depth, quota / 2)
    return rate_s, depth * rate_s
