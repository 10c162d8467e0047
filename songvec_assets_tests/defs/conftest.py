"""An instance for tests that run the graph."""

from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets_tests.conftest import environment_of
from songvec_assets_tests.provider import Provider


@pytest.fixture
def instance(
    database: Database,
    provider: Provider,
    songs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dg.DagsterInstance]:
    """An instance of its own, and the environment of somebody who has a database and a key."""
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"))
    for name, value in {
        **environment_of(database, provider, tmp_path),
        "DAGSTER_HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance
