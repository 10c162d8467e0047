"""Where files are kept: objects under keys such as `embeddings/m-2000/000000000-000050000/manifest.json`.

A local folder for now. Callers speak keys, never paths, and use only what an object store offers too: put (whole,
durable), put if unchanged, list, read, ranged reads, delete; nothing is appended to and nothing is truncated.
When to add here: another place where files can be. Keep out: what files hold, and which keys there are. Sizes in bytes.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import xxhash

from songvec_assets.errors import StoreError

LEFTOVER_S = 3600.0
"""A temporary file that was not written to for this long is of a process that was killed."""


class Versioned(NamedTuple):
    """An object's content, and the token that `put_if_unchanged` compares."""

    content: bytes
    version: str


@dataclass(frozen=True)
class Storage:
    """A local folder of objects. It need not exist yet.

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
        """How messages name an object."""
        return str(self.root / key)

    def list_objects(self, prefix: str = "") -> dict[str, int]:
        """Names and sizes of the objects directly under a prefix; those that are being written are left out."""
        return {
            entry.name: entry.stat().st_size
            for entry in self._scan(prefix)
            if entry.is_file() and not entry.name.startswith(".")
        }

    def list_prefixes(self, prefix: str = "") -> list[str]:
        """The next parts of all keys that go on below a prefix, in order."""
        return sorted(entry.name for entry in self._scan(prefix) if entry.is_dir())

    def _scan(self, prefix: str) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / prefix) as entries:
            for entry in entries:
                # one that is deleted meanwhile is not there
                with contextlib.suppress(FileNotFoundError):
                    yield entry

    def read(self, key: str) -> Versioned | None:
        """An object's content and version; None if there is no such object."""
        try:
            content = (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Versioned(content, _version_of(content))

    def open(self, key: str) -> pa.Buffer:
        """An object as a buffer whose bytes are read when they are used: mapped, not loaded.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self.root / key
        return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        """Write an object piece by piece; it is there, whole and durable, when the block has ended well.

        Raises:
            StoreError: the disk refuses.
        """
        path = self.root / key
        # one name per process, so that two writers never share a file
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with _refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)

    def put(self, key: str, content: bytes) -> str:
        """Write an object, whole and durable, whatever was there before; its version."""
        with self.write(key) as file:
            file.write(content)
        return _version_of(content)

    def put_if_unchanged(self, key: str, content: bytes, version: str | None) -> str | None:
        """Replace an object that is still as it was read; of two writers that read the same version one succeeds.

        Args:
            key: of the object.
            content: whole.
            version: as `read` gave it; None: there must be no such object yet.

        Returns:
            The new version; None if another process wrote the object since: nothing is written then.
        """
        folder = (self.root / key).parent
        with _refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            found = self.read(key)
            return self.put(key, content) if (found.version if found else None) == version else None

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        (self.root / key).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        """Remove what is left directly under a prefix, files that were never finished among it."""
        folder = self.root / prefix
        for path in folder.iterdir() if folder.exists() else ():
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()

    def delete_leftovers(self, prefix: str) -> None:
        """Remove files that killed processes never finished."""
        for path in (self.root / prefix).glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_S:
                    path.unlink()


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Name the path where the disk refuses to write."""
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


def sync_folder(folder: Path) -> None:
    """Make a created, renamed or removed entry of a folder durable."""
    if os.name == "nt":  # Windows opens no folders; its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder against every other process and thread; the kernel releases the lock of one that is killed."""
    if os.name == "nt":  # Windows opens no folders; the database holds the range's lock anyway
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
