"""A server kept within little memory, by a control group of its own (version 1).

Only for a server on this machine, by root. What the server has in memory beforehand is dropped from it.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from songvec_assets_tests.administration import execute

_ROOT = Path("/sys/fs/cgroup/memory")


@contextmanager
def limited_memory(url: str, folder: Path, n_bytes: int) -> Iterator[bool]:
    """Keep a server within so many bytes while the block runs, its files in the kernel's memory included.

    Args:
        url: of the server.
        folder: of its data.
        n_bytes: the limit; it must hold the server's own buffers.

    Yields:
        Whether it is: not every machine has control groups.
    """
    group = _ROOT / f"songvec-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(n_bytes))
    except OSError:
        if group.exists():
            group.rmdir()
        yield False
        return
    execute(url, "CHECKPOINT")
    for path in folder.glob("base/*/*"):
        # what is in memory now counts in nobody's group; the server may delete a file meanwhile
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    postmaster = psutil.Process(int((folder / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0]))
    _move([str(process.pid) for process in (postmaster, *postmaster.children())], group)
    try:
        yield True
    finally:
        while pids := (group / "cgroup.procs").read_text(encoding="utf-8").split():
            _move(pids, group.parent)
        group.rmdir()


def _move(pids: Sequence[str], group: Path) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a session that ended meanwhile
            (group / "cgroup.procs").write_text(pid)
