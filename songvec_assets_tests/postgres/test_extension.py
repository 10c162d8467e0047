"""Which versions of the extension are taken, and what is wrong with them."""

import pytest

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.extension import check_pgvector_version, describe_pgvector
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets_tests.administration import execute


def test_an_extension_that_is_too_old_is_refused(bare_url: str) -> None:
    database = Database(bare_url)
    ensure_schema(database)
    execute(bare_url, "UPDATE pg_extension SET extversion = '0.5.1' WHERE extname = 'vector'")
    with pytest.raises(DatabaseError, match=r"expected pgvector 0\.7\.0 or newer, this database has 0\.5\.1"):
        ensure_schema(database)


@pytest.mark.parametrize("installed", ["0.1", "0.4.4", "0.6.2"])
def test_versions_without_halfvec_are_refused_with_what_to_run(installed: str) -> None:
    with pytest.raises(DatabaseError, match="ALTER EXTENSION vector UPDATE") as caught:
        check_pgvector_version(installed)
    assert installed in str(caught.value)


@pytest.mark.parametrize(
    "installed",
    [
        "0.7.0",
        "0.7.4",
        "0.8.5",
        "0.10.0",
        "1.0",
        "1.0.0",
        "0.7",
        "0.8.0.google-4",
        "0.8.1-rc1",
        "v0.8.0",
        "main",
        "",
    ],
)
def test_versions_with_halfvec_are_taken_whatever_a_host_adds(installed: str) -> None:
    check_pgvector_version(installed)


@pytest.mark.parametrize(
    ("installed", "n_mended"),
    [("0.8.0.google-4", 3), ("0.8.2", 2), ("0.8.3-rc", 1), ("0.8.4", 0), ("0.8.5", 0), ("0.10", 0), ("0.7.4", 3)],
)
def test_what_was_mended_since_is_named(installed: str, n_mended: int) -> None:
    words = describe_pgvector(installed)
    assert words.count("(0.8.") == n_mended
    assert (installed in words) == (n_mended > 0)


def test_a_version_that_is_none_is_named_and_refuses_nothing() -> None:
    assert "'main'" in describe_pgvector("main")
    with pytest.raises(DatabaseError, match="0\\.6\\.2\\.google-1"):
        check_pgvector_version("0.6.2.google-1")
