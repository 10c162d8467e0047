"""Which instance remembers a run, and what the UI shows of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import httpx2
import pytest
import sqlalchemy as sa
from dagster._core.storage.event_log.sqlite import sqlite_event_log

from songvec_assets.definitions import defs
from songvec_assets.defs.instance import WORKSPACE, choose_home, open_instance, origin_of
from songvec_assets.errors import SettingsError
from songvec_assets_tests.browser.stage import running_dagster
from songvec_assets_tests.cli.test_commands import FIRST, ROOT, SET_AT_START, Project, project

pytestmark = pytest.mark.slow

__all__ = ["project"]

POSTGRES_URL = "postgresql://u@127.0.0.1:1/music"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", "")
    return tmp_path


def test_the_embedded_database_and_one_given_by_url_have_instances_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_home() == folder / ".songvec" / "dagster"
    monkeypatch.setenv("POSTGRES_URL_FILE", "/run/secrets/postgres_url")
    assert choose_home() == folder / ".dagster"
    monkeypatch.delenv("POSTGRES_URL_FILE")
    monkeypatch.setenv("POSTGRES_URL", POSTGRES_URL)
    assert choose_home() == folder / ".dagster"
    assert "enabled: false" in (folder / ".dagster" / "dagster.yaml").read_text()
    shutil.copy(ROOT / "dagster.yaml", folder)
    assert choose_home() == folder, "a clone's dagster.yaml says where"
    monkeypatch.setenv("DAGSTER_HOME", "/somewhere")
    assert choose_home() == Path("/somewhere")


def test_a_dagster_yaml_of_ones_own_is_left_as_it_is(folder: Path) -> None:
    home = choose_home()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: true\n")
    assert choose_home() == home
    assert (home / "dagster.yaml").read_text() == "telemetry:\n  enabled: true\n"


@pytest.mark.parametrize("url", ["", POSTGRES_URL])
def test_a_folder_that_cannot_be_written_is_one_line_that_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("POSTGRES_URL", url)
    (folder / (".dagster" if url else ".songvec")).write_text("in the way")  # root may write anywhere
    with pytest.raises(SettingsError, match=r"cannot write runs to .* or set DAGSTER_HOME"):
        choose_home()


def test_an_instance_remembers_what_was_run_and_the_demos_does_not_show_in_anothers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = dg.AssetKey("embedding_cache")
    with open_instance() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=FIRST))
    monkeypatch.setenv("DAGSTER_HOME", "")
    with open_instance() as instance:
        assert instance.get_materialized_partitions(key) == {FIRST}
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.setenv("POSTGRES_URL", POSTGRES_URL)
    with open_instance() as instance:
        assert instance.get_materialized_partitions(key) == set()


def test_events_stay_in_the_logs_until_the_instance_is_closed(folder: Path) -> None:
    key = dg.AssetKey("embedding_cache")
    log = folder / ".songvec" / "dagster" / "history" / "runs" / "index.db-wal"
    with open_instance() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=FIRST))
        assert log.stat().st_size > 0, "the last connection would empty it"
    assert not log.exists()
    assert sqlite_event_log.create_engine is sa.create_engine, "other instances are as they were"
    with dg.DagsterInstance.get() as instance:
        assert instance.get_materialized_partitions(key) == {FIRST}
        assert not log.exists()


def test_a_run_is_of_the_code_location_that_the_workspace_names() -> None:
    assert WORKSPACE.read_text() == (ROOT / "workspace.yaml").read_text()
    origin = origin_of(defs.resolve_job_def("swap"))
    assert f"location_name: {origin.location_name}\n" in WORKSPACE.read_text()
    assert origin.repository_origin.repository_name == defs.get_repository_def().name


@pytest.mark.parametrize(
    ("in_folder", "captures"),
    [
        ([], True),
        (["pyproject.toml", "songvec_assets/"], True),
        (["pyproject.toml"], False),
        (["workspace.yaml"], False),
        (["dg.toml", "dagster.yaml"], False),
    ],
)
def test_dagsters_commands_find_this_code_from_a_clone_and_an_empty_folder_but_not_from_another_project(
    tmp_path: Path, in_folder: list[str], captures: bool
) -> None:
    for name in in_folder:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    line = (ROOT / "songvec_assets.pth").read_text()
    # as site does: in a function, which sees only what the line itself imports
    code = (
        f"def start(): exec({line!r})\nstart()\nimport os\nprint([os.environ.get(name) for name in {[*SET_AT_START]}])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in SET_AT_START}
    command = [sys.executable, "-S", "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str([*SET_AT_START.values()] if captures else [None, None])
    assert line.startswith("import os; "), "site executes a line that begins so"
    assert len(line.splitlines()) == 1


JOB = 'repositoryName: "__repository__", repositoryLocationName: "songvec_assets", pipelineName'


@pytest.mark.timeout(600)
def test_the_ui_shows_the_demos_run_under_its_job_and_prefills_the_launchpad(project: Project) -> None:
    # `.env` of somebody who looks at the demo first
    (project.folder / ".env").write_text(f"POSTGRES_URL={POSTGRES_URL}\nFIREWORKS_API_KEY=k\n")
    code, output = project.run("songvec", "demo")
    assert code == 0, output
    query = f"""{{
        pipelineOrError(params: {{{JOB}: "refresh"}}) {{
            ... on Pipeline {{ runs {{ status repositoryOrigin {{ repositoryLocationName }} }} }}
        }}
        runConfigSchemaOrError(selector: {{{JOB}: "swap"}}) {{ ... on RunConfigSchema {{ rootDefaultYaml }} }}
        assetNodeOrError(assetKey: {{path: ["embedding_cache"]}}) {{
            ... on AssetNode {{ partitionStats {{ numMaterialized }} }}
        }}
    }}"""

    with running_dagster(project, "songvec", "dev", "--demo") as address:
        shown = httpx2.post(f"{address}/graphql", json={"query": query}, timeout=60).json()["data"]
    run = {"status": "SUCCESS", "repositoryOrigin": {"repositoryLocationName": "songvec_assets"}}
    assert shown["pipelineOrError"] == {"runs": [run]}
    assert "swap: true" in shown["runConfigSchemaOrError"]["rootDefaultYaml"]
    assert shown["assetNodeOrError"]["partitionStats"] == {"numMaterialized": 4}
