"""The life of a deployment, started as `bwrap … python -m songvec_assets_tests.deploy.story FOLDER` by `test_compose`.

It is a process of its own because it has a network of its own: the services listen on their own ports there, whatever
else runs on the machine. What fails, fails with an assertion and the log of the service.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import yaml

from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.deploy.containers import COMPOSE, ROOT, SEAWEEDFS, Container, read_image, read_services
from songvec_assets_tests.provider import Provider, running_provider
from songvec_assets_tests.servers import Server, running_server

PAGE = ROOT / "docs" / "deployment.md"
BUCKET_BLOCK = 2
N_SONGS = 60
WEBSERVER, SERVE = "http://127.0.0.1:3000", "http://127.0.0.1:8765"
LAUNCH = """
    mutation ($selector: JobOrPipelineSelector!) {
        launchRun(executionParams: {selector: $selector, runConfigData: {}}) {
            __typename
            ... on LaunchRunSuccess { run { runId } }
            ... on PythonError { message }
        }
    }
"""
SELECTOR = {"repositoryLocationName": "songvec_assets", "repositoryName": "__repository__", "jobName": "refresh"}


def main(folder: Path) -> None:
    """Start all, run the graph, search, move the store into a bucket, stop all in the middle of a second run."""
    with running_server() as server, running_provider() as provider:
        make_project(folder, server, provider)
        with running_services(folder, server) as containers:
            run = launch()
            wait_until(lambda: status_of(run, containers) == "SUCCESS", seconds=240)
            assert sum(provider.texts().values()) == N_SONGS + 1, "the songs, and the probe"
            token = (folder / "secrets" / "serve_token").read_text().strip()
            check_status_and_search(containers, token)
            move_into_bucket(folder, containers)
            check_status_and_search(containers, token)
            add_songs(server, range(N_SONGS + 1, N_SONGS + 11))
            provider.control(hold_after=1)
            run = launch()
            wait_until(provider.count_in_flight, seconds=240)
            stop(containers)
        [(status,)] = execute(server.url("dagster"), "SELECT status FROM runs WHERE run_id = %s", (run,))
        assert status == "FAILURE", f"expected that the interrupted run is over, got {status}"


def make_project(folder: Path, server: Server, provider: Provider) -> None:
    """What docs/deployment.md says to do, by its own commands; the server takes the place of the service `postgres`."""
    shutil.copy(COMPOSE, folder)
    follow_page(folder, 0)
    secrets = folder / "secrets"
    password = (secrets / "postgres_password").read_text().strip()
    execute(server.url(), f"CREATE ROLE songvec LOGIN SUPERUSER PASSWORD '{password}'")
    execute(server.url(), "CREATE DATABASE music")
    execute(server.url(), yaml.safe_load(COMPOSE.read_text())["configs"]["dagster.sql"]["content"])
    add_songs(server, range(1, N_SONGS + 1))
    service_file = secrets / "pg_service.conf"
    service_file.write_text(service_file.read_text().replace("host=postgres", f"host=postgres\nport={server.port}"))
    (secrets / "fireworks_api_key").write_text(f"{provider.api_key}\n")
    settings = {"FIREWORKS_BASE_URL": provider.base_url, "SONGVEC_EMBEDDING_DIMENSIONS": 64}
    (folder / "songvec.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *read_services())))
    uid = read_image().uid
    (folder / "passwd").write_text(f"songvec:x:{uid}:{uid}::/tmp:/bin/sh\n")


def follow_page(folder: Path, number: int) -> None:
    """Type the page's commands in one of its blocks, but those to Docker."""
    commands = PAGE.read_text().split("```sh\n")[number + 1].split("```")[0].splitlines()
    script = "\n".join(line for line in commands if not line.startswith(("cd ", "docker ")))
    subprocess.run(["sh", "-e", "-c", script], cwd=folder, check=True)


def add_songs(server: Server, ids: range) -> None:
    """Songs with these ids."""
    url = server.url("music")
    execute(url, "CREATE TABLE IF NOT EXISTS songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
    execute(url, "INSERT INTO songs SELECT id, 'Song ' || id, 'Ann', 'line ' || id FROM unnest(%s) AS id", (list(ids),))


@contextlib.contextmanager
def running_services(folder: Path, server: Server) -> Iterator[dict[str, Container]]:
    """All services, started in the order in which they wait for one another, until they are healthy."""
    containers = {}
    for name, service in read_services(folder / COMPOSE.name).items():
        if service.get("profiles"):
            continue
        if name == "postgres":
            _, command, *options = service["healthcheck"]["test"]
            environment = os.environ | {"PGPORT": str(server.port)}
            subprocess.run([str(server.binaries / command), *options], env=environment, check=True)
            continue
        containers[name] = Container(name, service, read_image(), folder)
        start(containers[name])
    yield containers


def start(container: Container) -> None:
    """Start a service."""
    container.start()
    report(f"{container.name} is healthy", container.wait_until_healthy())


def move_into_bucket(folder: Path, containers: dict[str, Container]) -> None:
    """What the page says: start the S3 server, move the store there, start again what uses it."""
    follow_page(folder, BUCKET_BLOCK)
    service = read_services(folder / COMPOSE.name)["s3"]
    containers["s3"] = Container("s3", service, SEAWEEDFS, folder)
    start(containers["s3"])
    moved = containers["code"].run("songvec", "move-store", "/data", "s3://songvec/store")
    assert moved.returncode == 0, moved.stdout + moved.stderr + containers["s3"].log
    for name in ("code", "serve"):
        report(f"{name} ended", containers[name].stop())
        start(containers[name])


def launch() -> str:
    """Launch the job as the UI does; the run's id."""
    body = {"query": LAUNCH, "variables": {"selector": SELECTOR}}
    answer: dict[str, Any] = httpx2.post(f"{WEBSERVER}/graphql", json=body, timeout=60).json()
    assert answer["data"]["launchRun"]["__typename"] == "LaunchRunSuccess", answer
    return str(answer["data"]["launchRun"]["run"]["runId"])


def status_of(run: str, containers: dict[str, Container]) -> str:
    """A run's status; it must not have failed."""
    query = f'{{ runOrError(runId: "{run}") {{ ... on Run {{ status }} }} }}'
    answer = httpx2.post(f"{WEBSERVER}/graphql", json={"query": query}, timeout=60).json()
    status = str(answer["data"]["runOrError"]["status"])
    assert status != "FAILURE", containers["daemon"].log + containers["code"].log
    return status


def check_status_and_search(containers: dict[str, Container], token: str) -> None:
    """What the run made is found in the container of the code location, and over HTTP with the token."""
    answer = containers["code"].run("songvec", "status")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    search = {"url": f"{SERVE}/search", "params": {"q": "line 7"}, "timeout": 60}
    assert httpx2.get(**search).status_code == 401
    found = httpx2.get(**search, headers={"Authorization": f"Bearer {token}"})
    assert found.status_code == 200, found.text
    assert len(found.json()["hits"]) == 10, found.text
    assert httpx2.get(f"{SERVE}/healthz").status_code == 200


def stop(containers: dict[str, Container]) -> None:
    """Stop all, the last one first; the provider never answers, so the run gives up what is in flight."""
    for name, container in reversed(containers.items()):
        report(f"{name} ended", container.stop())


def report(event: str, took_s: float) -> None:
    """One line."""
    print(f"{event} after {took_s:.1f} s", flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    main(Path(sys.argv[1]))
    report("all is done", time.monotonic() - began)
