"""A server kept within little memory, by control groups of its own (version 1), and what its disk gave.

Only for a server on this machine, by root. What the server has in memory beforehand is dropped from it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from songvec_assets_tests.administration import execute

_ROOT = Path("/sys/fs/cgroup")
_CONTROLLERS = ("memory", "blkio")


@contextmanager
def limited_memory(url: str, folder: Path, n_bytes: int) -> Iterator[Callable[[], int] | None]:
    """Keep a server within so many bytes while the block runs, its files in the kernel's memory included.

    Args:
        url: of the server.
        folder: of its data.
        n_bytes: the limit; it must hold the server's own buffers.

    Yields:
        A function of the bytes that the disk has given; None: control groups are not to be had here.
    """
    groups = [_ROOT / name / f"songvec-bench-{os.getpid()}" for name in _CONTROLLERS]
    try:
        for group in groups:
            group.mkdir()
        (groups[0] / "memory.limit_in_bytes").write_text(str(n_bytes))
    except OSError:
        for group in filter(Path.exists, groups):
            group.rmdir()
        yield None
        return
    execute(url, "CHECKPOINT")
    for path in folder.glob("base/*/*"):
        with path.open("rb") as file:  # what is in memory now counts in nobody's group
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    postmaster = psutil.Process(int((folder / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0]))
    for group in groups:
        _move([str(process.pid) for process in (postmaster, *postmaster.children())], group)
    try:
        yield lambda: _read_bytes(groups[1])
    finally:
        for group in groups:
            while pids := (group / "cgroup.procs").read_text(encoding="utf-8").split():
                _move(pids, group.parent)
            group.rmdir()


def _move(pids: Sequence[str], group: Path) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a session that ended meanwhile
            (group / "cgroup.procs").write_text(pid)


def _read_bytes(group: Path) -> int:
    lines = (group / "blkio.throttle.io_service_bytes").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[2]) for line in lines if line.split()[1:2] == ["Read"])
