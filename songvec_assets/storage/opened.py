"""An opened object of an object store: its first bytes are read at once, others by ranges when they are used.

When to add here: another way to read it. Keep out: whole objects and writes (`objects`).
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from songvec_assets.errors import StoreError
from songvec_assets.storage import Opened, Span
from songvec_assets.storage.messages import clear_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from obstore.store import ObjectStore

HEAD_BYTES = 1 << 17
"""Read when an object is opened: all of a small one, else the narrow columns of a part's first batch."""


@dataclass(frozen=True)
class OpenedObject(Opened):
    """See the module.

    Attributes:
        client, path: obstore's, and where it has the object.
        name: for messages.
        head: its first bytes, up to HEAD_BYTES.
        n_bytes: its size.
        e_tag: of the content that was opened.
    """

    client: "ObjectStore"
    path: str
    name: str
    head: "pa.Buffer"
    n_bytes: int
    e_tag: str | None

    @classmethod
    def open(cls, client: "ObjectStore", path: str, name: str) -> "OpenedObject":
        """Open an object, by one request.

        Raises:
            FileNotFoundError: there is no such object.
        """
        import obstore
        import pyarrow as pa
        from obstore import exceptions

        with clear_errors(f"read {name}"):
            try:
                found = obstore.get(client, path, options={"range": (0, HEAD_BYTES)})
                head = pa.py_buffer(found.bytes())
                return cls(client, path, name, head, found.meta["size"], found.meta["e_tag"])
            except exceptions.GenericError as error:
                # an object without content has no range (416); but the number may stand in any message, as a time
                if "416" not in str(error) or obstore.head(client, path)["size"]:
                    raise
                return cls(client, path, name, pa.py_buffer(b""), 0, None)

    @property
    def size(self) -> int:
        return self.n_bytes

    @property
    def mapped(self) -> "pa.Buffer | None":
        return self.head if self.head.size == self.n_bytes else None

    def read(self, spans: Sequence[Span]) -> "list[pa.Buffer]":
        """See `Opened.read`; only of objects that are never replaced, as parts are.

        Raises:
            StoreError: it was deleted since.
        """
        import obstore
        import pyarrow as pa

        if all(stop <= self.head.size for _, stop in spans):
            return [self.head.slice(start, stop - start) for start, stop in spans]
        starts, ends = zip(*spans, strict=True)
        with self._clear_errors():
            found = obstore.get_ranges(self.client, self.path, starts=starts, ends=ends)
            return [pa.py_buffer(each) for each in found]

    def read_version(self, start: int, stop: int) -> "pa.Buffer":
        """Some bytes of the content that was opened.

        Raises:
            StoreError: it was replaced or deleted since.
        """
        import obstore
        import pyarrow as pa

        if stop <= self.head.size:
            return self.head.slice(start, stop - start)
        options: Any = {"range": (start, stop), "if_match": self.e_tag}
        with self._clear_errors():
            return pa.py_buffer(obstore.get(self.client, self.path, options=options).bytes())

    def file(self) -> "_ObjectFile":
        return _ObjectFile(self)

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        from obstore import exceptions

        try:
            with clear_errors(f"read {self.name}", may_lose=True):
                yield
        except (exceptions.PreconditionError, FileNotFoundError):
            raise StoreError(
                f"{self.name} was replaced while it was read, by another run: start the same command again",
                "storage.changed",
            ) from None


class _ObjectFile(io.RawIOBase):
    """An opened object as a file: each read that the first bytes do not answer is a request."""

    def __init__(self, opened: OpenedObject) -> None:
        self._opened, self._at = opened, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._opened.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._opened.size if size < 0 else min(self._at + size, self._opened.size)
        content = self._opened.read_version(self._at, stop).to_pybytes() if self._at < stop else b""
        self._at += len(content)
        return cast(bytes, content)
