"""Storage of objects under keys such as `embeddings/m-2000/000000000-000050000/manifest.json`.

Callers use keys, not paths, and only operations that object stores have too: put (whole, durable), put if unchanged,
list, read, ranged reads, delete; nothing is appended to or truncated. Sizes are in bytes. `local` is a folder,
`objects` a prefix of a bucket.
When to add here: another operation, which both must have. Keep out: what objects contain, and which keys exist.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple, Self, TypeVar

from songvec_assets.errors import SettingsError

if TYPE_CHECKING:  # the command line starts without them
    import pyarrow as pa

SCHEMES = ("s3", "gs", "az")
"""Of the URLs that name an object store."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Span = tuple[int, int]
"""Where bytes of an object begin and end."""


class Versioned(NamedTuple):
    """An object's content, and the token that `put_if_unchanged` compares."""

    content: bytes
    version: str


class Listing(NamedTuple):
    """What is directly under a prefix.

    Attributes:
        objects: sizes, by name.
        prefixes: their names, in order.
    """

    objects: dict[str, int]
    prefixes: list[str]


class Opened(ABC):
    """An object that was opened: its bytes are read when they are used."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of its bytes."""

    @property
    @abstractmethod
    def mapped(self) -> "pa.Buffer | None":
        """All its bytes, if they are mapped into memory, which costs nothing."""

    @abstractmethod
    def read(self, spans: Sequence[Span]) -> "list[pa.Buffer]":
        """Some of its bytes. Spans that lie close together may be one request."""

    @abstractmethod
    def file(self) -> Any:
        """It as a file that Arrow and Parquet read from."""


class Storage(ABC):
    """All objects whose keys begin with one prefix. Need not exist yet.

    Every method may raise StorageError: the object store refuses, or cannot be reached.

    Attributes:
        n_writes: how many objects it pays to write at a time: one to a disk, whose syncs wait for each other; several
            over a network.
    """

    n_writes: ClassVar[int] = 1

    @property
    @abstractmethod
    def location(self) -> str:
        """Where it is: an absolute path, or a URL."""

    @abstractmethod
    def __contains__(self, key: str) -> bool: ...

    @abstractmethod
    def within(self, prefix: str) -> Self:
        """The storage of all keys that begin with `prefix/`."""

    @abstractmethod
    def describe(self, key: str) -> str:
        """An object's name in messages."""

    @abstractmethod
    def scan(self, prefix: str = "") -> Listing:
        """What is directly under a prefix, without objects that are being written."""

    @abstractmethod
    def read(self, key: str) -> Versioned | None:
        """An object's content and version; None if there is no such object."""

    @abstractmethod
    def open(self, key: str) -> Opened:
        """Open an object.

        Raises:
            FileNotFoundError: there is no such object.
        """

    @abstractmethod
    def write(self, key: str) -> AbstractContextManager[BinaryIO]:
        """Write an object piece by piece; it appears, whole and durable, when the block ends without an error.

        Pieces may be read as late as at the end of the block: until then they must not be changed.

        Raises:
            StoreError: it cannot be written.
        """

    @abstractmethod
    def put(self, key: str, content: bytes) -> str:
        """Write or replace an object, whole and durable; returns its version."""

    @abstractmethod
    def put_if_unchanged(self, key: str, content: bytes, version: str | None) -> str | None:
        """Replace an object that has not changed since it was read; of two concurrent writers only one succeeds.

        Args:
            version: as `read` returned it; None: the object must not exist yet.

        Returns:
            The new version; None if the object has changed since: then nothing is written.
        """

    @abstractmethod
    def check_writes(self) -> None:
        """Refuse a storage that cannot be written to, or in which two writers could both win. Checked once.

        Raises:
            StorageError: says which.
        """

    def check_room(self, n_bytes: int) -> None:  # noqa: B027 - an object store does not say
        """Refuse to pay for what would not fit.

        Raises:
            UnwritableError: it has no room for n more bytes.
        """

    @abstractmethod
    def delete(self, *keys: str) -> None:
        """Delete objects, if they exist."""

    @abstractmethod
    def delete_all(self, prefix: str) -> None:
        """Delete everything directly under a prefix, including unfinished files."""

    @abstractmethod
    def delete_leftovers(self, prefix: str) -> None:
        """Delete files that killed processes never finished."""

    def map(self, do: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """Call a function that reads with each item; several at a time if each waits for a network. In their order."""
        return [do(each) for each in items]

    def list_keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Keys and sizes of all objects that begin with a prefix."""
        start, listed = f"{prefix}/" if prefix else "", self.scan(prefix)
        yield from ((f"{start}{name}", size) for name, size in sorted(listed.objects.items()))
        for name in listed.prefixes:
            yield from self.list_keys(f"{start}{name}")


def check_location(location: str) -> str:
    """A folder, or the URL of an object store.

    Raises:
        ValueError: a URL of another kind.
    """
    scheme, is_url, rest = location.partition("://")
    if is_url and (scheme not in SCHEMES or not re.match("[^/]", rest)):
        raise ValueError("a folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
    return location


def open_storage(location: str) -> Storage:
    """The storage at a location. Reads and writes nothing yet.

    Raises:
        SettingsError: a URL of an unknown kind.
    """
    try:
        is_url = "://" in check_location(location)
    except ValueError as error:
        raise SettingsError(f"expected {error} as storage, got {location}") from None
    if is_url:
        from songvec_assets.storage.objects import ObjectStorage

        return ObjectStorage.connect(location)
    from songvec_assets.storage.local import LocalStorage

    return LocalStorage(Path(location))
