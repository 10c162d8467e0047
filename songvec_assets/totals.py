"""What all runs on a database have done so far: counts that only grow.

They are in the database, so that steps of any process and machine add to the same ones. When to add here: another count
of what runs do. Keep out: dollars (`embedding/budget`), and the metrics that are made of it (`metrics`).
"""

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
_READ = sa.text("SELECT key, value FROM songvec.settings WHERE key ~ '^total '")


def add(database: Database, counts: Mapping[str, int]) -> None:
    """Add to some of `COUNTS`; zeros write nothing."""
    assert counts.keys() <= COUNTS.keys(), counts
    if given := {name: n for name, n in counts.items() if n}:
        with error_border(), database.get_engine("autocommit").connect() as connection:
            connection.execute(_ADD, {"names": [*given], "numbers": [*given.values()]})


def read(connection: sa.Connection) -> dict[str, int]:
    """All counts."""
    rows = connection.execute(_READ).all() if has_tables(connection) else []
    found = {key: value for key, value in rows}  # noqa: C416 - dict() of rows has no type
    return {name: int(found.get(f"total {name}", 0)) for name in COUNTS}
