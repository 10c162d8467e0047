"""Fills that begin at once, and try again at once."""

from pathlib import Path

import pytest

from songvec_assets.cache import fill as fill_module
from songvec_assets.cache.model_cache import (
    ModelCache,
)
from songvec_assets.embedding import contact as contact_module
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.filling import Run
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_module, "MAX_BACKOFF_S", 0.02)


@pytest.fixture
def run(database: Database, provider: Provider, tmp_path: Path) -> Run:
    """Begins a run over the test's database and store, with some settings: a pipeline of its own."""

    def begin(**settings: object) -> Pipeline:
        return make_pipeline(database, provider, tmp_path / "store", **settings)

    return begin


@pytest.fixture
def one_range_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No range begins before the one before it has all its answers: what is done in between has its place."""
    monkeypatch.setattr(fill_module, "MAX_OPEN_RANGES", 1)


@pytest.fixture
def cache(tmp_path):
    return ModelCache(LocalStorage(tmp_path / "m-3"), "m", 3)
