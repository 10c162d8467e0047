"""Where a story plays: a project with `dagster dev` in it, a search server, and a browser tab."""

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

from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import (
    add_generated_songs,
    create_songs_table,
    start_embedded_server,
)
from songvec_assets.postgres.server import DEFAULT_FOLDER
from songvec_assets.samples import read_sample_songs
from songvec_assets.serve.guard import Limits
from songvec_assets.settings import DEMO_MODEL, Settings
from songvec_assets_tests.administration import borrow_database, dispose, execute, free_port, wait_until
from songvec_assets_tests.browser.pages import DagsterUI, running_chromium
from songvec_assets_tests.cli.test_commands import Project
from songvec_assets_tests.conftest import TEMPLATE
from songvec_assets_tests.postgres.test_server import stop
from songvec_assets_tests.serve.conftest import running_server


@contextmanager
def open_tab(address: str) -> Iterator[DagsterUI]:
    """A tab of a browser of its own; a test without one is skipped."""
    with running_chromium(find_chromium()) as browser:
        yield DagsterUI(browser, address)


def find_chromium() -> str:
    """The distribution's browser; a test without one is skipped."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    return chromium


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


ATTACKS = (
    (
        901,
        '<img src=x onerror="alert(1)">',
        '"><script>alert(2)</script>',
        "</div><script>alert(3)</script>\n{{7*7}} <b>sea</b>",
    ),
    (902, "javascript:alert(4)", "\u202eevil & 'quoted'", "a\nb & c\n<svg/onload=alert(5)>"),
)
"""Songs whose texts are markup: id, name, artist, lyrics."""


@contextmanager
def serving_samples(server_url: str, folder: Path, limits: Limits | None = None) -> Iterator[str]:
    """A search server over the samples and ATTACKS, with the demo's vectors; where it listens."""
    with borrow_database(server_url, TEMPLATE) as database:
        url = database.adbc_uri
        execute(url, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text, year integer)")
        rows = [(song_id, *song) for song_id, song in enumerate(read_sample_songs().iter_rows(), 1)] + [*ATTACKS]
        for row in rows:
            execute(url, "INSERT INTO songs VALUES (%s, %s, %s, %s, %s)", (*row, 1960 + row[0] % 60))
        given = {"postgres_url": database.url, "embedding_model": DEMO_MODEL, "filter_columns": "artist, year"}
        with Pipeline(Settings(**given, storage=str(folder / "store"))) as songs:
            songs.run()
            with running_server(songs, limits) as address:
                yield address
