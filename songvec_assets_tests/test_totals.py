"""Counts that processes and machines share."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from songvec_assets import totals
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute


def read(database: Database) -> dict[str, int]:
    with database.get_connection() as connection:
        return totals.read(connection)


def test_counts_add_up_whoever_adds(database: Database) -> None:
    assert read(database) == dict.fromkeys(totals.COUNTS, 0)
    with ThreadPoolExecutor(8) as pool:
        # in either order of the names: nobody waits for ever
        given = [{"embedded_tokens": 3, "rows_written": 1}, {"rows_written": 1, "embedded_tokens": 3}] * 20
        [*pool.map(lambda counts: totals.add(database, counts), given)]
    counts = read(database)
    assert (counts["embedded_tokens"], counts["rows_written"], counts["provider_retries"]) == (120, 40, 0)
    assert read(Database(database.url)) == counts


def test_zeros_write_nothing_and_a_count_that_nobody_reads_is_refused(database: Database) -> None:
    totals.add(database, {"embedded_tokens": 0, "provider_retries": 0})
    assert execute(database.adbc_uri, "SELECT key FROM songvec.settings WHERE key LIKE 'total%'") == []
    with pytest.raises(AssertionError):
        totals.add(database, {"dollars": 1})


def test_a_database_without_our_schema_has_none(bare_url: str) -> None:
    assert read(Database(bare_url)) == dict.fromkeys(totals.COUNTS, 0)
