"""What the tests of budgets and of reservations start from."""

import uuid

import pytest
import sqlalchemy as sa

from songvec_assets.postgres.engine import Database


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    return database.get_engine("web")


@pytest.fixture
def run() -> str:
    """A run of this test's own."""
    return uuid.uuid4().hex
