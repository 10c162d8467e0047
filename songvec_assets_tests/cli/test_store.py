"""The commands about where the store is; what a move does is tested in `cache/test_move`."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import environment_of, make_pipeline
from songvec_assets_tests.provider import Provider


def test_a_moved_store_is_named_with_what_to_do_next(
    songs: Callable[..., None],
    database: Database,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranges = {"SONGVEC_RANGE_SIZE": "100", "SONGVEC_SONG_ID_STOP": "1000"}
    for name, value in (environment_of(database, provider, tmp_path) | ranges).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    songs((1, "Sea", "Ann", "waves"))
    make_pipeline(database, provider, tmp_path / "store").run()
    command = ["move-store", str(tmp_path / "store"), str(tmp_path / "to")]
    moved = CliRunner().invoke(app, command)
    assert moved.exit_code == 0, moved.output
    words = "".join(moved.output.split())
    assert re.search(r"\dobjects,\d\.\dMB,arein.*to;\dwerecopiednow", words), words
    assert f"SetSONGVEC_STORAGE={tmp_path / 'to'}" in words
    assert "holds no store" in str(CliRunner().invoke(app, command).exception)


def test_what_was_forgotten_is_counted(
    songs: Callable[..., None],
    database: Database,
    provider: Provider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranges = {"SONGVEC_RANGE_SIZE": "100", "SONGVEC_SONG_ID_STOP": "1000"}
    for name, value in (environment_of(database, provider, tmp_path) | ranges).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    songs((1, "Sea", "Ann", "waves"), (2, "Road", "Bob", "dust"))
    with make_pipeline(database, provider, tmp_path / "store") as pipeline:
        pipeline.run()
        execute(database.url, "DELETE FROM songs WHERE id = 1")
        pipeline.run()
    forgotten = CliRunner().invoke(app, ["forget", "1", "7"])
    assert (forgotten.exit_code, forgotten.output.splitlines()[0]) == (0, "vectors erased from the cache: 1")
    assert "still had 2 at the last export" in str(CliRunner().invoke(app, ["forget", "2"]).exception)
