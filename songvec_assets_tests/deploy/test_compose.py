"""The compose file: its services start in order, run the graph, answer a search and stop in time (`story`)."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster._core.instance.config import dagster_instance_config

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
    for tool in ("bwrap", "tini"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on the PATH: apt-get install bubblewrap tini")
    network = ["bwrap", "--dev-bind", "/", "/", "--unshare-net", "--cap-add", "ALL", "--die-with-parent", "--"]
    command = [*network, sys.executable, "-m", story.__name__, str(folder)]
    told = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    print(told.stdout)


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
        for variable, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|KEY|TOKEN", variable) or variable.endswith("_FILE"), (name, variable)
            assert not re.search("://[^/]*@", str(value)), (name, variable)


def test_services_are_limited_as_far_as_they_can_be() -> None:
    for name, service in read_services().items():
        assert {"healthcheck"} <= service.keys() or name == "code", "the image's own is that of the code location"
        if name != "postgres":
            assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
            assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
    assert int(read_image().uid) > 0
