"""The commands about a whole store; what a move and an erasure do is tested in `cache/`."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.postgres.engine import Database
from songvec_assets_tests import warm
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.conftest import environment_of, make_pipeline
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.s3 import S3

RANGES = {"SONGVEC_RANGE_SIZE": "100", "SONGVEC_SONG_ID_STOP": "1000"}


@pytest.fixture
def configured(database: Database, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and the folder in which a person types."""
    for name, value in (environment_of(database, provider, tmp_path) | RANGES).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("configured")
def test_a_moved_store_is_named_with_what_to_do_next(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    make_pipeline(database, provider, tmp_path / "store").run()
    command = ["move-store", str(tmp_path / "store"), str(tmp_path / "to")]
    moved = CliRunner().invoke(app, command)
    assert moved.exit_code == 0, moved.output
    words = "".join(moved.output.split())
    assert re.search(r"\dobjects,\d\.\dMB,arein.*to;\dwerecopiednow", words), words
    assert f"SetSONGVEC_STORAGE={tmp_path / 'to'}" in words
    assert "holds no store" in str(CliRunner().invoke(app, command).exception)


@pytest.mark.usefixtures("configured")
def test_what_was_forgotten_is_counted(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, "Road", "Bob", "dust"))
    with make_pipeline(database, provider, tmp_path / "store") as pipeline:
        pipeline.run()
        execute(database.url, "DELETE FROM songs WHERE id = 1")
        pipeline.run()
    forgotten = CliRunner().invoke(app, ["forget", "1", "7"])
    assert (forgotten.exit_code, forgotten.output.splitlines()[0]) == (0, "vectors erased from the cache: 1")
    assert "still had 2 at the last export" in str(CliRunner().invoke(app, ["forget", "2"]).exception)


@pytest.mark.slow
def test_a_move_into_a_bucket_that_is_killed_goes_on_from_what_has_arrived_and_pays_nothing(
    songs: Callable[..., None], database: Database, provider: Provider, tmp_path: Path, s3: S3, bucket: str
) -> None:
    songs(*((number, f"Song {number}", "Ann", "la") for number in range(50, 1000, 100)))
    source = make_pipeline(database, provider, tmp_path / "store")
    source.run()
    before = {key: source.storage.read(key) for key, _ in source.storage.list_keys() if "/" in key}
    n_requests = provider.ledger()["requests"]
    command = [str(Path(sys.executable).with_name("songvec")), "move-store", str(tmp_path / "store"), bucket]
    environment = os.environ | environment_of(database, provider, tmp_path) | RANGES
    parts: set[str] = set()

    def has_sent(n_parts: int) -> bool:
        parts.update(each["path"] for each in s3.requests() if each["method"] == "PUT" and "arrow" in each["path"])
        return len(parts) >= n_parts

    s3.spoil({"do": "hold", "method": "PUT", "match": "arrow", "after": 4})
    process = warm.start(command, tmp_path, environment)
    wait_until(lambda: has_sent(5))
    process.kill()
    process.communicate()
    assert process.returncode == -9
    s3.spoil()
    process = warm.start(command, tmp_path, environment)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    # of ten parts four had arrived, and the fifth may; snapshots and manifests are copied again
    [(n_objects, n_copied)] = re.findall(r"(\d+) objects.*; (\d+) were copied now", " ".join(said.split()))
    assert int(n_objects) == len(before)
    assert len(before) - int(n_copied) in (4, 5)
    moved = make_pipeline(database, provider, bucket)
    assert {key: moved.storage.read(key).content for key in before} == {key: it.content for key, it in before.items()}
    assert [each.n_embedded for each in moved.run().embed] == [0] * 10
    assert provider.ledger()["requests"] == n_requests
