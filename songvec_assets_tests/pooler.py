"""PgBouncer in transaction mode, in a process of its own: each transaction meets whichever session is free."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets_tests.administration import free_port, wait_until

_CONFIGURATION = """
[databases]
* = {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
"""


@contextlib.contextmanager
def running_pgbouncer(url: str, pool_size: int = 2, **settings: object) -> Iterator[str]:
    """A pooler before the server of a URL; every client is the URL's user. Skips the test where it is not installed.

    Args:
        url: of any database of the server, which listens on a port or on a socket in a folder.
        pool_size: the pooler's sessions of a database, at most.
        settings: more of PgBouncer's settings, in its own words: `query_wait_timeout=1`.

    Yields:
        The URL with the pooler's address in place of the server's.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed (Debian's package is pgbouncer)")
    server, listen_port = sa.make_url(url), free_port()
    host = str(server.query.get("host", server.host))
    parts = {"host": host, "port": server.port or 5432, "user": server.username, "password": server.password}
    configuration = _CONFIGURATION.format(
        server=" ".join(f"{key}='{value}'" for key, value in parts.items() if value),
        listen_port=listen_port,
        pool_size=pool_size,
    )
    command = [program]
    if os.geteuid() == 0:
        # it refuses to be root; a socket is reached by the user who runs the server
        command += ["-u", Path(host).owner() if host.startswith("/") else "nobody"]
    with tempfile.TemporaryDirectory(prefix="songvec-pooler-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "ini").write_text(configuration + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, str(folder / "ini")], stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or "process up" in (folder / "log").read_text())
            assert process.poll() is None, (folder / "log").read_text()
            address = server.set(host="127.0.0.1", port=listen_port).difference_update_query(["host", "port"])
            yield address.render_as_string(hide_password=False)
        finally:
            process.terminate()
            process.wait(10)
