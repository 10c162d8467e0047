"""Where a story plays: a project with `dagster dev` in it, and a browser tab."""

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from songvec_assets.postgres.embedded import (
    add_generated_songs,
    create_songs_table,
    start_embedded_server,
)
from songvec_assets.postgres.server import DEFAULT_FOLDER
from songvec_assets_tests.administration import dispose, free_port, wait_until
from songvec_assets_tests.browser.pages import DagsterUI, running_chromium
from songvec_assets_tests.cli.test_commands import Project
from songvec_assets_tests.postgres.test_server import stop


@contextmanager
def open_tab(address: str) -> Iterator[DagsterUI]:
    """A tab of a browser of its own; a test without one is skipped."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    with running_chromium(chromium) as browser:
        yield DagsterUI(browser, address)


@contextmanager
def running_project(settings: dict[str, str], n_generated: int = 0) -> Iterator[tuple[Project, str, str]]:
    """A project with an embedded database and `dagster dev`; its address and the database's."""
    # not below pytest's folder: the embedded server's user must be able to reach it
    with tempfile.TemporaryDirectory(prefix="songvec-browser-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        project, cluster = Project(folder), folder / DEFAULT_FOLDER
        project.environment |= settings
        database = start_embedded_server(cluster)
        try:
            create_songs_table(database)
            add_generated_songs(database, n_generated)
            with running_dagster(project) as address:
                yield project, address, database.adbc_uri
        finally:
            dispose(database.url)
            stop(cluster)


@contextmanager
def running_dagster(project: Project, *command: str) -> Iterator[str]:
    """`songvec dev` in a project; where it listens. It ends with all its processes."""
    port = free_port()
    log = project.folder / "dagster-dev.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*(command or ("songvec", "dev")), "-p", str(port)],
            cwd=project.folder,
            env=project.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx2.get(f"http://127.0.0.1:{port}/server_info").is_success
            except httpx2.TransportError:
                return False

        try:
            wait_until(answers, seconds=120)
            yield f"http://127.0.0.1:{port}"
        finally:
            # a run that goes on would hold the embedded server, and outlive its folder
            processes = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            for survivor in psutil.wait_procs(processes, timeout=60)[1]:
                survivor.kill()
