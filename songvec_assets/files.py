"""Files that are whole or not there: temporary name, fsync, rename, fsync of the folder. Nothing else."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LEFTOVER_S = 3600.0
"""A temporary file that nobody wrote to for so long is of a process that was killed."""


@contextlib.contextmanager
def replace_atomically(path: Path, tidy: bool = True) -> Iterator[BinaryIO]:
    """Write a file that replaces `path`, durably, when the block ends well; else nothing changes.

    Args:
        path: of the file.
        tidy: whether to look for what killed writers of the same file left; in a large folder that takes its time.
    """
    # one name a process, so that two writers never share a file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f".{path.name}.*.tmp") if tidy else ():
        if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
            leftover.unlink(missing_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a created, renamed or removed entry of a folder durable."""
    if os.name == "nt":  # Windows opens no folders; its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
