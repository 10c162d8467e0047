"""An index as the server's catalog has it: found only if it is valid, IVFFlat, and by cosine. Probes until measured."""

import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.index.catalog import choose_probes, find_index
from songvec_assets_tests.administration import execute

IVFFLAT = "CREATE INDEX near ON rows USING ivfflat (v vector_cosine_ops)"


@pytest.fixture
def rows(database: Database) -> Database:
    """A table `rows` of vectors, and one of others."""
    execute(database.adbc_uri, "CREATE TABLE rows (v vector(3), n integer); CREATE TABLE others (v vector(3))")
    return database


def find(database: Database, table: str = "rows") -> object:
    with database.get_connection() as connection:
        return find_index(connection, table, "near")


@pytest.mark.parametrize(("options", "lists"), [("", 100), (" WITH (lists = 7)", 7)])
def test_it_has_its_lists_or_the_servers_default_and_a_file_that_differs_for_each_build(
    rows: Database, options: str, lists: int
) -> None:
    execute(rows.adbc_uri, IVFFLAT + options)
    first = find(rows)
    assert first.lists == lists  # type: ignore[attr-defined]
    assert first.n_bytes > 0  # type: ignore[attr-defined]
    execute(rows.adbc_uri, "REINDEX INDEX near")
    assert find(rows).file != first.file  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "CREATE INDEX near ON others USING ivfflat (v vector_cosine_ops)",
        "CREATE INDEX near ON rows USING ivfflat (v vector_l2_ops)",
        "CREATE INDEX near ON rows USING hnsw (v vector_cosine_ops)",
        "CREATE INDEX near ON rows (n)",
        IVFFLAT + "; UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'near'::regclass",
    ],
)
def test_any_other_is_none(rows: Database, statement: str) -> None:
    execute(rows.adbc_uri, statement)
    assert find(rows) is None
    assert find(rows, "no_such_table") is None


@pytest.mark.parametrize(
    ("lists", "n_rows", "probes"),
    [(1, 1, 1), (20, 400, 20), (100, 10_000, 100), (100, 10_001, 10), (1000, 1_000_000, 32), (1, 20_000, 1)],
)
def test_probes_are_all_lists_of_a_small_table_and_the_square_root_of_a_large_ones(
    lists: int, n_rows: int, probes: int
) -> None:
    assert choose_probes(lists, n_rows) == probes
