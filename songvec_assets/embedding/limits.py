"""The provider's quota, shared by every process of a deployment through one row in Postgres.

Two token buckets, for requests and for tokens, as a generic cell rate algorithm (ITU-T I.371): the row holds the time
at which all that was granted will have accrued; one atomic statement moves it forward by a request's cost, and the
request may be sent once that time is no further ahead than the bucket's depth. Depth and rate together make the quota,
so no sliding minute holds more than the provider allows.

Times are those of the database's clock; if it steps back, or a standby with a slower clock takes over, they continue
from the last time seen.

If the provider answers 429 nevertheless, it allows less than the settings say. What was granted in the last minute and
not refused shows how much: all processes slow down to a little less, then probe upward, slowly at first.

When to add here: another rule of the shared quota. Keep out: waiting (`gate`), and dollars (`budget`).
"""

import threading
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Engine, TextClause

from songvec_assets.postgres.engine import atomic, error_border
from songvec_assets.postgres.schema import has_tables

DEPTH_SHARE = 1 / 50
"""Depth of a bucket as a share of the quota. The largest request is as large, unless the quota is below 50 requests per
minute: a request larger than the bucket waits until all of it has accrued."""
KEPT_SHARE = 0.96
"""Share of the observed limit that is used after a 429; the rest is room for the next request and uneven arrival."""
MIN_SHARE = 0.02
"""Minimum share of the quota that is used, even if the provider answers only 429."""
PROBING = 0.005
"""Share of the quota by which the rate has grown one minute after a 429; after n minutes it is n² times as much."""

_CREATE = atomic("""
    INSERT INTO songvec.rate_limits (name) VALUES (:name) ON CONFLICT (name) DO NOTHING
""")

_SPEED = "least(1, share + :probing * (extract(epoch FROM now - slowed_at) / 60) ^ 2) AS speed"
_STATE = f"""
    SELECT *, {_SPEED}
    FROM (
        SELECT *, greatest(clock_timestamp() + make_interval(secs => ahead_s), seen_at) AS now
        FROM songvec.rate_limits WHERE name = :name FOR UPDATE
    ) AS locked
"""

# `over` is what a request costs beyond a full bucket, `under` what it leaves in one. A bucket is charged when the
# request is sent, which the other bucket or a pause may delay. The log is a ring of the last 120 seconds, so it never
# grows. A crash of the server may lose the last grants: that is cheaper than a sync per grant.
_RESERVE = atomic(f"""
    WITH state AS ({_STATE}), costs AS (
        SELECT state.*, make_interval(secs => :request_s / speed) AS request,
               make_interval(secs => greatest(0, :request_s - :requests_depth_s) / speed) AS requests_over,
               make_interval(secs => greatest(0, :requests_depth_s - :request_s) / speed) AS requests_under,
               make_interval(secs => :tokens_s / speed) AS tokens,
               make_interval(secs => greatest(0, :tokens_s - :tokens_depth_s) / speed) AS tokens_over,
               make_interval(secs => greatest(0, :tokens_depth_s - :tokens_s) / speed) AS tokens_under
        FROM state
    ), granted AS (
        SELECT costs.*, greatest(
            greatest(now, requests_at - requests_under) + requests_over,
            greatest(now, tokens_at - tokens_under) + tokens_over,
            paused_until
        ) AS at
        FROM costs
    ), charged AS (
        UPDATE songvec.rate_limits AS kept
        SET seen_at = now, ahead_s = greatest(granted.ahead_s, extract(epoch FROM now - clock_timestamp())),
            requests_at = greatest(granted.requests_at, at - requests_over) + request,
            tokens_at = greatest(granted.tokens_at, at - tokens_over) + tokens,
            busy_since = CASE WHEN granted.tokens_at < now - interval '1 minute' THEN now ELSE granted.busy_since END
        FROM granted WHERE kept.name = granted.name
        RETURNING extract(epoch FROM at) AS at, extract(epoch FROM at - now) AS wait_s
    ), logged AS (
        INSERT INTO songvec.rate_seconds AS kept (name, slot, second, n_requests, n_tokens)
        SELECT :name, floor(at)::bigint % 120, floor(at)::bigint, 1, :n_tokens FROM charged
        ON CONFLICT (name, slot) DO UPDATE
        SET second = excluded.second,
            n_requests = CASE kept.second WHEN excluded.second THEN kept.n_requests ELSE 0 END + 1,
            n_tokens = CASE kept.second WHEN excluded.second THEN kept.n_tokens ELSE 0 END + excluded.n_tokens
    )
    SELECT at, wait_s, (
        SELECT greatest(sum(n_requests) / :requests_per_minute, sum(n_tokens) / :tokens_per_minute)
        FROM songvec.rate_seconds WHERE name = :name AND second > at - wait_s - 60 AND second <= at - wait_s
    ) AS used, set_config('synchronous_commit', 'off', true) FROM charged
""")

_TAKE_BACK = atomic("""
    UPDATE songvec.rate_seconds SET n_requests = n_requests - 1, n_tokens = n_tokens - :n_tokens
    WHERE name = :name AND second = floor(:at)::bigint
""")

_SLOW_DOWN = atomic(f"""
    WITH state AS ({_STATE}), used AS (
        SELECT greatest(sum(n_requests) / :requests_per_minute, sum(n_tokens) / :tokens_per_minute) AS share
        FROM songvec.rate_seconds AS logged, state
        WHERE logged.name = :name AND second > extract(epoch FROM now) - 60 AND second <= extract(epoch FROM now)
    ), seen AS (
        SELECT state.*, :granted_at <= extract(epoch FROM slowed_at) AS known,
               greatest(0, coalesce(used.share, 0) - :depth_share * (1 - minutes)) / minutes AS used
        FROM state, used, LATERAL (SELECT least(1, extract(epoch FROM now - busy_since) / 60) AS minutes) AS busy
    )
    UPDATE songvec.rate_limits AS kept
    SET paused_until = greatest(seen.paused_until, now + make_interval(secs => :pause_s)),
        share = CASE WHEN known THEN seen.share
                     ELSE least(speed, greatest(:kept_share * used, speed / 2, :min_share)) END,
        slowed_at = CASE WHEN known THEN seen.slowed_at ELSE now END
    FROM seen WHERE kept.name = seen.name
""")

_READ_USE = sa.text(f"""
    SELECT {_SPEED}, (
        SELECT greatest(sum(n_requests) / :requests_per_minute, sum(n_tokens) / :tokens_per_minute)
        FROM songvec.rate_seconds AS logged
        WHERE logged.name = :name AND second > extract(epoch FROM now) - 60 AND second <= extract(epoch FROM now)
    ) AS used
    FROM (SELECT *, greatest(clock_timestamp(), seen_at) AS now FROM songvec.rate_limits WHERE name = :name) AS kept
""")


def read_quota_use(
    connection: sa.Connection, name: str, requests_per_minute: float, tokens_per_minute: float
) -> tuple[float, float]:
    """What all processes use of a quota now; its row is neither written nor locked.

    Returns:
        The share of it that was used in the last minute; and the share that may be used: 1, and less after a 429.
    """
    given = {"name": name, "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    found = (
        connection.execute(_READ_USE, given | {"probing": PROBING}).one_or_none() if has_tables(connection) else None
    )
    return (0.0, 1.0) if found is None else (float(found.used or 0), float(found.speed))


@dataclass(frozen=True)
class Grant:
    """A request's share of the quota.

    Attributes:
        n_tokens: granted.
        at: when the request may be sent, in seconds since the epoch by the row's clock.
        wait_s: seconds from the grant until then.
    """

    n_tokens: int
    at: float
    wait_s: float


class RateLimiter:
    """Grants requests within a quota that all processes on the same database share. Thread-safe.

    Args:
        engine: a pooled engine; each call is one or two short statements.
        name: identifies the quota, such as the provider's base URL.
        requests_per_minute: requests that may start in any minute.
        tokens_per_minute: tokens that may start in any minute.

    Attributes:
        used: share of the quota that all processes used in the minute before the last reservation.
    """

    def __init__(self, engine: Engine, name: str, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._name = name
        self._quota = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        self._request_s, self._requests_depth_s = _rate_and_depth(requests_per_minute)
        self._token_s, self._tokens_depth_s = _rate_and_depth(tokens_per_minute)
        self._lock = threading.Lock()
        self._owed_tokens = 0
        self.used = 0.0
        with error_border(), self._engine.connect() as connection:
            connection.execute(_CREATE, {"name": name})

    def reserve(self, n_tokens: int) -> Grant:
        """Take one request of `n_tokens` from the quota; a grant that is not used is not returned."""
        with self._lock:
            owed, self._owed_tokens = self._owed_tokens, 0
        costs = {"request_s": self._request_s, "tokens_s": self._token_s * (n_tokens + owed)}
        depths = {"requests_depth_s": self._requests_depth_s, "tokens_depth_s": self._tokens_depth_s}
        given = {"name": self._name, "n_tokens": n_tokens + owed, "probing": PROBING, **costs, **depths}
        try:
            with error_border(), self._engine.connect() as connection:
                at, wait_s, used, _ = connection.execute(_RESERVE, given | self._quota).one()
        except BaseException:
            with self._lock:
                self._owed_tokens += owed  # the next one pays them
            raise
        self.used = float(used or 0)
        return Grant(n_tokens, float(at), float(wait_s))

    def settle(self, grant: Grant, billed_tokens: int) -> None:
        """Correct a grant by the billed tokens, 0 if it was not sent; the next request is charged the difference."""
        with self._lock:
            self._owed_tokens += billed_tokens - grant.n_tokens

    def slow_down(self, grant: Grant, pause_s: float) -> None:
        """Record that the provider answered 429 to a request: no process sends another one for `pause_s`.

        The shared rate falls to KEPT_SHARE of what the last minute let through, by half at most; once for all the
        requests that were granted before it fell.
        """
        self._execute(_TAKE_BACK, n_tokens=grant.n_tokens, at=grant.at)
        shares = {"probing": PROBING, "kept_share": KEPT_SHARE, "min_share": MIN_SHARE, "depth_share": DEPTH_SHARE}
        self._execute(_SLOW_DOWN, granted_at=grant.at - grant.wait_s, pause_s=pause_s, **shares, **self._quota)

    def _execute(self, statement: TextClause, **values: float) -> None:
        with error_border(), self._engine.connect() as connection:
            connection.execute(statement, {"name": self._name, **values})


def _rate_and_depth(quota: float) -> tuple[float, float]:
    """Seconds that one unit takes to accrue, and seconds that the bucket takes to fill."""
    depth = max(1.0, quota * DEPTH_SHARE)
    # depth and rate add up to the quota; the smallest quotas are all depth, and would never accrue
    rate_s = 60 / max(quota - depth, quota / 2)
    return rate_s, depth * rate_s
