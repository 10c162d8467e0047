"""The compose file: its services start in order, run the graph, answer a search and stop in time (`story`)."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config

from songvec_assets.settings import GROUPS
from songvec_assets.settings_group import variable
from songvec_assets.storage.objects import SECRETS
from songvec_assets_tests.deploy import story
from songvec_assets_tests.deploy.containers import COMPOSE, DOCKERFILE, ROOT, read_image, read_services


@pytest.fixture
def folder() -> Iterator[Path]:
    # not below pytest's folder, whose parents only this user may enter
    with tempfile.TemporaryDirectory(prefix="songvec-compose-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_services_start_run_the_graph_answer_a_search_and_stop_in_time(folder: Path) -> None:
    for tool in ("bwrap", "tini", "curl"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on the PATH: apt-get install bubblewrap tini curl")
    network = ["bwrap", "--dev-bind", "/", "/", "--unshare-net", "--cap-add", "ALL", "--die-with-parent", "--"]
    probe = subprocess.run([*network, "true"], check=False, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this user may not make sandboxes here: {probe.stderr}")
    command = [*network, sys.executable, "-m", story.__name__, str(folder)]
    played = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert played.returncode == 0, played.stdout + played.stderr


def test_the_page_names_the_file_of_each_secret_and_its_values_parse() -> None:
    secrets = {variable(name) for group in GROUPS for name, field in group.model_fields.items() if not field.repr}
    secrets |= {*SECRETS.values()}
    page = story.PAGE.read_text()
    assert {*re.findall(r"`(\w+)_FILE`", page)} == secrets
    values, celery, launcher = [yaml.safe_load(block.split("```")[0]) for block in page.split("```yaml\n")[1:]]
    assert values["runLauncher"]["type"] == "K8sRunLauncher"
    assert celery["run_launcher"]["class"] == "CeleryRunLauncher"
    assert launcher["run_launcher"]["class"] == "EcsRunLauncher"


def test_dagster_accepts_its_configuration() -> None:
    configuration, _ = dagster_instance_config(str(COMPOSE.parent))
    assert configuration["storage"]["postgres"]["postgres_url"] == {"env": "DAGSTER_POSTGRES_URL"}


def test_the_image_is_built_from_what_dockerignore_lets_through_and_from_nothing_else() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.M)
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == {
        source for each in copied for source in each.split()
    }


def test_no_secret_is_in_an_environment() -> None:
    for name, service in read_services().items():
        for key, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|KEY|TOKEN", key) or key.endswith("_FILE"), (name, key)
            assert not re.search("://[^/]*@", str(value)), (name, key)


def test_services_are_limited_as_far_as_they_can_be() -> None:
    for name, service in read_services().items():
        assert {"healthcheck"} <= service.keys() or name == "code", "the image's own is that of the code location"
        if name != "postgres":
            assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
            assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
    assert int(read_image().uid) > 0
