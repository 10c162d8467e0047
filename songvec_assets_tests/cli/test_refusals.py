"""A command that refuses to begin ends with a code, like every other failure."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app, base
from songvec_assets.errors import SongvecError
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.scenarios.test_graph_core import run_all


@pytest.mark.parametrize(("command", "code"), [("demo", "table.not-demo"), ("swap", "settings.unchanged")])
def test_a_command_that_would_replace_or_repeat_what_serves_is_refused(
    database: Database,
    provider: Provider,
    songs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    code: str,
) -> None:
    songs((1, "Sea", "Ann", "la"))
    run_all(make_pipeline(database, provider, tmp_path))
    monkeypatch.setattr(base, "make_pipeline", lambda **_: make_pipeline(database, provider, tmp_path))
    refusal = CliRunner().invoke(app, [command]).exception
    assert isinstance(refusal, SongvecError)
    assert refusal.code == code
