"""A database for each test of the songs' sources and snapshots."""

from collections.abc import Iterator

import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import borrow_database
from songvec_assets_tests.conftest import TEMPLATE


@pytest.fixture
def database(server_url: str) -> Iterator[Database]:
    """A database with our schema and nothing else in it."""
    with borrow_database(server_url, TEMPLATE) as database:
        yield database
