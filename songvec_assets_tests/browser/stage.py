"""A project with `dagster dev` in it, the provider that it pays, and a browser tab: one of each for a whole story."""

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from songvec_assets.postgres.embedded import DEFAULT_FOLDER, create_songs_table, start_embedded_server
from songvec_assets_tests.administration import dispose, execute, free_port
from songvec_assets_tests.defs.test_commands import Project, provider_settings, wait_until
from songvec_assets_tests.postgres.test_embedded import stop
from songvec_assets_tests.provider import Provider, running_provider

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from songvec_assets_tests.browser.pages import DagsterUI, running_chromium

SHAPE = {"SONGVEC_RANGE_SIZE": "50", "SONGVEC_SONG_ID_STOP": "500"}
SETTINGS = {"SONGVEC_EMBEDDING_DIMENSIONS": "64", "SONGVEC_PATIENCE_S": "4"}


@dataclass(frozen=True)
class Scene:
    """What a story plays in: a project whose `dagster dev` runs, seen in a tab."""

    project: Project
    provider: Provider
    ui: DagsterUI
    database_url: str

    def ask(self, statement: str) -> list[tuple]:
        """Rows of the project's own database."""
        return execute(self.database_url, statement)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Sample songs in four ranges of 50 song_ids, seven empty ranges; nothing materialized."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    # not below pytest's folder: the embedded server's user must be able to reach it
    with tempfile.TemporaryDirectory(prefix="songvec-browser-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        project, cluster = Project(folder), folder / DEFAULT_FOLDER
        database = start_embedded_server(cluster)
        try:
            create_songs_table(database)
            with running_provider() as provider:
                project.environment |= provider_settings(provider) | SHAPE | SETTINGS
                with running_dagster(project) as address, running_chromium(chromium) as browser:
                    yield Scene(project, provider, DagsterUI(browser, address), database.adbc_uri)
        finally:
            dispose(database.url)
            stop(cluster)


@contextmanager
def running_dagster(project: Project) -> Iterator[str]:
    """`dagster dev` in a project; where it listens. It ends with all its processes."""
    address = f"http://127.0.0.1:{free_port()}"
    log = project.folder / "dagster-dev.log"
    command = ["dagster", "dev", "-p", address.rpartition(":")[2]]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, cwd=project.folder, env=project.environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx2.get(f"{address}/server_info").is_success
            except httpx2.TransportError:
                return False

        try:
            wait_until(answers, timeout_s=120)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
