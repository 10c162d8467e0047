"""What all runs on a database have done so far: counts that only grow, and when each step last succeeded.

They are in the database, so that steps of any process and machine add to the same ones. When to add here: another count
of what runs do. Keep out: dollars (`embedding/budget`), and the metrics that are made of it (`metrics`).
"""

import time
from collections.abc import Mapping

import sqlalchemy as sa

from songvec_assets.postgres.engine import Database, atomic, error_border
from songvec_assets.postgres.schema import has_tables

COUNTS = {
    "embedded_songs": "Songs that got a vector from the provider.",
    "embedded_tokens": "Tokens billed for songs.",
    "provider_retries": "Bad answers to requests with songs, before good ones.",
    "provider_rate_limited": "Bad answers that were 429.",
    "rows_written": "Rows written into the table of embeddings.",
    "rows_deleted": "Rows deleted from the table of embeddings.",
}
"""What is counted: its name, which is that of its metric, and its meaning."""

# in one order: two processes never wait for each other's rows
_ADD = atomic("""
    INSERT INTO songvec.settings (key, value)
    SELECT 'total ' || name, to_jsonb(n)
    FROM unnest(CAST(:names AS text[]), CAST(:numbers AS bigint[])) AS given (name, n) ORDER BY name
    ON CONFLICT (key) DO UPDATE SET value = to_jsonb(settings.value::bigint + excluded.value::bigint)
""")
_SUCCEED = atomic("""
    INSERT INTO songvec.settings (key, value)
    VALUES ('last success of ' || CAST(:step AS text), to_jsonb(CAST(:now AS numeric)))
    ON CONFLICT (key) DO UPDATE SET value = excluded.value
""")
_READ = sa.text("SELECT key, value FROM songvec.settings WHERE key ~ '^(total|last success of) '")


def add(database: Database, counts: Mapping[str, int]) -> None:
    """Add to some of `COUNTS`; zeros write nothing."""
    assert counts.keys() <= COUNTS.keys(), counts
    if given := {name: n for name, n in counts.items() if n}:
        with error_border(), database.get_engine("autocommit").connect() as connection:
            connection.execute(_ADD, {"names": [*given], "numbers": [*given.values()]})


def record_success(database: Database, step: str) -> None:
    """Record that a step succeeded now."""
    with error_border(), database.get_engine("autocommit").connect() as connection:
        connection.execute(_SUCCEED, {"step": step, "now": round(time.time(), 3)})


def read(connection: sa.Connection) -> tuple[dict[str, int], dict[str, float]]:
    """The counts; and when each step last succeeded, in seconds since the epoch."""
    rows = connection.execute(_READ).all() if has_tables(connection) else []
    found = {key: value for key, value in rows}  # noqa: C416 - dict() of rows has no type
    succeeded = {key.rpartition(" ")[2]: at for key, at in found.items() if key.startswith("last")}
    return {name: int(found.get(f"total {name}", 0)) for name in COUNTS}, succeeded
