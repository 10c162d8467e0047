"""Objects as files of a local folder: written under a temporary name, synced, renamed; mapped into memory to be read.

When to add here: another way to use a file system. Keep out: object stores (`objects`).
"""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from songvec_assets.errors import UnwritableError
from songvec_assets.storage import Listing, Opened, Span, Storage, Versioned
from songvec_assets.storage.messages import clear_disk_errors

if TYPE_CHECKING:
    import pyarrow as pa

LEFTOVER_S = 3600.0
"""A temporary file that was not written for this time was left by a killed process."""
SPARE_BYTES = 1 << 20
"""Room for what is written in addition to the vectors: metadata of parts, and manifests."""


@dataclass(frozen=True)
class MappedFile(Opened):
    """A file that is mapped into memory."""

    content: "pa.Buffer"

    @property
    def size(self) -> int:
        return int(self.content.size)

    @property
    def mapped(self) -> "pa.Buffer":
        return self.content

    def read(self, spans: Sequence[Span]) -> "list[pa.Buffer]":
        return [self.content.slice(start, stop - start) for start, stop in spans]

    def file(self) -> "pa.BufferReader":
        import pyarrow as pa

        return pa.BufferReader(self.content)


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A local folder of objects.

    Attributes:
        root: the folder.
    """

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def __contains__(self, key: str) -> bool:
        return (self.root / key).is_file()

    @property
    def location(self) -> str:
        return str(self.root.resolve())

    def within(self, prefix: str) -> "LocalStorage":
        return LocalStorage(self.root / prefix)

    def describe(self, key: str) -> str:
        return str(self.root / key)

    def scan(self, prefix: str = "") -> Listing:
        found = Listing({}, [])
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / prefix) as entries:
            for entry in entries:
                # an entry may be deleted meanwhile
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir():
                        found.prefixes.append(entry.name)
                    elif entry.is_file() and not entry.name.startswith("."):
                        found.objects[entry.name] = entry.stat().st_size
        found.prefixes.sort()
        return found

    def read(self, key: str) -> Versioned | None:
        try:
            content = (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Versioned(content, _version_of(content))

    def open(self, key: str) -> MappedFile:
        import pyarrow as pa

        path = self.root / key
        return MappedFile(pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b""))

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        path = self.root / key
        # one name per thread, so that two writers never share a file
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        with clear_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def put(self, key: str, content: bytes) -> str:
        with self.write(key) as file:
            file.write(content)
        return _version_of(content)

    def put_if_unchanged(self, key: str, content: bytes, version: str | None) -> str | None:
        folder = (self.root / key).parent
        with clear_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            found = self.read(key)
            return self.put(key, content) if (found.version if found else None) == version else None

    def check_writes(self) -> None:
        """Nothing is tried: rename and flock always work, and the write itself finds a full disk."""

    def check_room(self, n_bytes: int) -> None:
        root = self.root.resolve()
        with clear_disk_errors(root):
            free = shutil.disk_usage(next(each for each in (root, *root.parents) if each.exists())).free
        needed = n_bytes + SPARE_BYTES
        if free < needed:
            raise UnwritableError(
                f"{root} has {free / 1e6:,.1f} MB free, expected {needed / 1e6:,.1f} MB for the vectors that would be "
                "paid for next: make room, then start the same command again"
            )

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._remove(self.root / key)

    def delete_all(self, prefix: str) -> None:
        folder = self.root / prefix
        for path in folder.iterdir() if folder.exists() else ():
            self._remove(path)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()

    def _remove(self, path: Path) -> None:
        """Delete one file: a step at which a process may be killed, as tests do."""
        path.unlink(missing_ok=True)

    def delete_leftovers(self, prefix: str) -> None:
        for path in (self.root / prefix).glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_S:
                    path.unlink()


def _version_of(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _sync_folder(folder: Path) -> None:
    """Make created, renamed or deleted entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder against all other processes and threads; the kernel releases the lock of a killed process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
