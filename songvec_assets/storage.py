"""Storage of objects under keys such as `embeddings/m-2000/000000000-000050000/manifest.json`, in a local folder.

Callers use keys, not paths, and only operations that object stores have too: put (whole, durable), put if unchanged,
list, read, ranged reads, delete; nothing is appended to or truncated. Sizes are in bytes.
When to add here: another kind of storage. Keep out: what objects contain, and which keys exist.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import xxhash

from songvec_assets.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

LEFTOVER_S = 3600.0
"""A temporary file that was not written for this time was left by a killed process."""


class Versioned(NamedTuple):
    """An object's content, and the token that `put_if_unchanged` compares."""

    content: bytes
    version: str


@dataclass(frozen=True)
class Storage:
    """A local folder of objects. Need not exist yet.

    Attributes:
        root: the folder.
    """

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def __contains__(self, key: str) -> bool:
        return (self.root / key).is_file()

    def within(self, prefix: str) -> "Storage":
        """The storage of all keys that begin with `prefix/`."""
        return Storage(self.root / prefix)

    def describe(self, key: str) -> str:
        """An object's name in messages."""
        return str(self.root / key)

    def list_objects(self, prefix: str = "") -> dict[str, int]:
        """Names and sizes of the objects directly under a prefix, without those that are being written."""
        return {
            entry.name: entry.stat().st_size
            for entry in self._scan(prefix)
            if entry.is_file() and not entry.name.startswith(".")
        }

    def list_prefixes(self, prefix: str = "") -> list[str]:
        """The names of the prefixes directly below a prefix, in order."""
        return sorted(entry.name for entry in self._scan(prefix) if entry.is_dir())

    def _scan(self, prefix: str) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / prefix) as entries:
            for entry in entries:
                # an entry may be deleted meanwhile
                with contextlib.suppress(FileNotFoundError):
                    yield entry

    def read(self, key: str) -> Versioned | None:
        """An object's content and version; None if there is no such object."""
        try:
            content = (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Versioned(content, _version_of(content))

    def open(self, key: str) -> "pa.Buffer":
        """An object as a memory-mapped buffer: bytes are read when they are used.

        Raises:
            FileNotFoundError: there is no such object.
        """
        import pyarrow as pa

        path = self.root / key
        return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        """Write an object piece by piece; it appears, whole and durable, when the block ends without an error.

        Raises:
            StoreError: it cannot be written.
        """
        path = self.root / key
        # one name per process, so that two of them never share a file; callers let one thread at a time write a key
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with _write_errors(path):
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
        """Write or replace an object, whole and durable; returns its version."""
        with self.write(key) as file:
            file.write(content)
        return _version_of(content)

    def put_if_unchanged(self, key: str, content: bytes, version: str | None) -> str | None:
        """Replace an object that has not changed since it was read; of two concurrent writers only one succeeds.

        Args:
            key: of the object.
            content: the whole content.
            version: as `read` returned it; None: the object must not exist yet.

        Returns:
            The new version; None if the object has changed since: then nothing is written.
        """
        folder = (self.root / key).parent
        with _write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            found = self.read(key)
            return self.put(key, content) if (found.version if found else None) == version else None

    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""
        (self.root / key).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        """Delete everything directly under a prefix, including unfinished files."""
        folder = self.root / prefix
        for path in folder.iterdir() if folder.exists() else ():
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()

    def delete_leftovers(self, prefix: str) -> None:
        """Delete files that killed processes never finished."""
        for path in (self.root / prefix).glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_S:
                    path.unlink()


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into StoreError with the path."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"could not write {path}: {error}. What was stored before is kept: make room, or give access, and start "
            "the same command again",
            "store.not-writable",
        ) from error


def _version_of(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _sync_folder(folder: Path) -> None:
    """Make created, renamed or deleted entries of a folder durable."""
    if os.name == "nt":  # Windows cannot open folders; its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder against all other processes and threads; the kernel releases the lock of a killed process."""
    if os.name == "nt":  # Windows cannot open folders; the database's lock of the range protects its files
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
