"""Objects in a bucket of S3, Google or Azure, through obstore; also in any server that speaks S3.

Credentials and endpoint come from the client's own variables, as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL, from a file
that `AWS_SECRET_ACCESS_KEY_FILE` names, or from the role of the machine; nothing of them is stored. A request is tried
up to 11 times within a minute; one try takes up to 30 s (AWS_TIMEOUT). Of two writers the
store itself lets one win: If-None-Match creates, If-Match replaces.
When to add here: another property of object stores. Keep out: words for their errors (`messages`).
"""

import contextlib
import io
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar, cast

from songvec_assets.errors import StorageError
from songvec_assets.settings_group import read_secrets
from songvec_assets.storage import Listing, Storage, Versioned
from songvec_assets.storage.messages import clear_disk_errors, clear_errors
from songvec_assets.storage.opened import OpenedObject
from songvec_assets.threads import DaemonThreads

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SINGLE_BYTES = 1 << 25
"""A larger object is gathered on disk, and sent in several requests: only then its size does not matter to memory."""
_PIECE_BYTES = 1 << 24
RETRIES: Any = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
}
_PARALLEL = 16
SECRETS = {"s3": "AWS_SECRET_ACCESS_KEY", "az": "AZURE_STORAGE_ACCOUNT_KEY"}
"""Of the client's variables, the one that may be in a file. Google's, GOOGLE_SERVICE_ACCOUNT, is a path itself."""
_WRITER = "writer"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(eq=False)
class Bucket:
    """The connection that all storages of one location share.

    Attributes:
        url: of the location, without a slash at its end.
        client: obstore's, for keys below the location.
    """

    url: str
    client: "ObjectStore"
    _is_checked: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check_writes(self, storage: "ObjectStorage") -> None:
        """See `Storage.check_writes`; once for the connection."""
        with self._lock:
            if not self._is_checked:
                _check_conditions(storage)
            self._is_checked = True


class _Gathered(io.RawIOBase):
    """A file that is written from its begin to its end: pieces in memory, as they came; on disk once they are large.

    A part's vectors are sent from where the answers have them: two copies of them would be the largest cost of a write.
    """

    def __init__(self) -> None:
        self.disk: IO[bytes] | None = None
        self._pieces: list[memoryview] = []
        self._n_bytes = 0

    def close(self) -> None:
        super().close()
        self._pieces.clear()
        if self.disk is not None:
            self.disk.close()

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        view = memoryview(piece).cast("B")
        self._n_bytes += len(view)
        if self.disk is None and self._n_bytes > SINGLE_BYTES:
            self.disk = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
            self.disk.writelines(self._pieces)
            self._pieces.clear()
        if self.disk is None:
            self._pieces.append(view)
        else:
            self.disk.write(view)
        return len(view)

    def tell(self) -> int:
        return self._n_bytes

    def rewind(self) -> Any:
        """The content, as obstore takes it."""
        if self.disk is None:
            return self._pieces or b""
        self.disk.seek(0)
        return self.disk


@dataclass(frozen=True)
class ObjectStorage(Storage):
    """The objects of a bucket that begin with a prefix.

    Attributes:
        bucket: the connection.
        prefix: of the keys, below the bucket's location; empty, or with a slash at its end.
    """

    bucket: Bucket
    prefix: str = ""
    n_writes: ClassVar[int] = 4

    @classmethod
    def connect(cls, url: str) -> "ObjectStorage":
        """The storage at a URL; sends no request.

        Raises:
            SettingsError: a file with a secret cannot be read.
        """
        from obstore.store import from_url

        names = [name for scheme, name in SECRETS.items() if url.startswith(f"{scheme}://")]
        config: Any = {name.lower(): secret for name, secret in read_secrets(names, {}).items()}
        with clear_errors(f"use {url}"):
            return cls(Bucket(url.rstrip("/"), from_url(url, config=config, retry_config=RETRIES)))

    def __str__(self) -> str:
        return self.location

    def __contains__(self, key: str) -> bool:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._clear_errors("look for", key):
            obstore.head(self.bucket.client, self.prefix + key)
            return True
        return False

    @property
    def location(self) -> str:
        return f"{self.bucket.url}/{self.prefix}".rstrip("/")

    def within(self, prefix: str) -> "ObjectStorage":
        return replace(self, prefix=f"{self.prefix}{prefix}/")

    def describe(self, key: str) -> str:
        return f"{self.location}/{key}".rstrip("/")

    def scan(self, prefix: str = "") -> Listing:
        import obstore

        path = f"{self.prefix}{prefix}".rstrip("/")
        with self._clear_errors("list", prefix):
            listed = obstore.list_with_delimiter(self.bucket.client, path or None)
        # SeaweedFS lists a folder, too, as an object of the prefix's own name
        objects = {str(each["path"]): int(each["size"]) for each in listed["objects"] if each["path"] != path}
        names = sorted(str(each).rstrip("/").rpartition("/")[2] for each in listed["common_prefixes"])
        return Listing({each.rpartition("/")[2]: size for each, size in objects.items()}, names)

    def read(self, key: str) -> Versioned | None:
        found = self._get(key)
        return found and Versioned(found[0], found[1])

    def _get(self, key: str) -> tuple[bytes, str, str] | None:
        """An object's content, version and the write that made it."""
        import obstore

        with contextlib.suppress(FileNotFoundError), self._clear_errors("read", key):
            found = obstore.get(self.bucket.client, self.prefix + key)
            return bytes(found.bytes()), _version_of(found.meta), str(found.attributes.get(_WRITER))
        return None

    def open(self, key: str) -> OpenedObject:
        return OpenedObject.open(self.bucket.client, self.prefix + key, self.describe(key))

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        import obstore

        with clear_disk_errors(self.describe(key)), _Gathered() as file:
            yield cast(BinaryIO, file)
            with self._clear_errors("write", key):
                obstore.put(
                    self.bucket.client,
                    self.prefix + key,
                    file.rewind(),
                    use_multipart=file.disk is not None,
                    chunk_size=_PIECE_BYTES,
                    max_concurrency=4,
                )

    def put(self, key: str, content: bytes) -> str:
        import obstore

        with self._clear_errors("write", key):
            return _version_of(obstore.put(self.bucket.client, self.prefix + key, content, use_multipart=False))

    def put_if_unchanged(self, key: str, content: bytes, version: str | None) -> str | None:
        import obstore
        from obstore import exceptions

        e_tag, _, number = (version or "").partition("\n")
        known = {name: value for name, value in (("e_tag", e_tag), ("version", number)) if value}
        mode: Any = known if version else "create"
        writer = uuid.uuid4().hex
        try:
            with self._clear_errors("write", key, may_lose=True):
                put = obstore.put(
                    self.bucket.client, self.prefix + key, content, mode=mode, attributes={_WRITER: writer}
                )
            return _version_of(put)
        except (exceptions.PreconditionError, exceptions.AlreadyExistsError, StorageError) as error:
            # an earlier try may have been served, and its answer lost
            found = None
            with contextlib.suppress(StorageError) if isinstance(error, StorageError) else contextlib.nullcontext():
                found = self._get(key)
            if found is not None and found[2] == writer:
                return found[1]
            if isinstance(error, StorageError):
                raise
            return None

    def map(self, do: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        with DaemonThreads(_PARALLEL) as pool:
            return list(pool.map(do, items))

    def check_writes(self) -> None:
        self.bucket.check_writes(replace(self, prefix=""))

    def delete(self, *keys: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._clear_errors("delete", keys[0] if keys else ""):
            obstore.delete(self.bucket.client, [self.prefix + key for key in keys])

    def delete_all(self, prefix: str) -> None:
        # and the folder that SeaweedFS keeps; elsewhere there is none
        self.delete(*(f"{prefix}/{name}" for name in self.scan(prefix).objects), prefix)

    def delete_leftovers(self, prefix: str) -> None:
        """Nothing: what was not sent as a whole does not exist. A rule of the bucket ends unfinished uploads."""

    def _clear_errors(self, verb: str, key: str, may_lose: bool = False) -> contextlib.AbstractContextManager[None]:
        return clear_errors(f"{verb} {self.describe(key)}", may_lose)


def _version_of(made: Any) -> str:
    # Google compares its number of the version, the others the ETag
    return f"{made['e_tag'] or ''}\n{made['version'] or ''}"


def _check_conditions(storage: ObjectStorage) -> None:
    """Write an object four times, and see that it happens only as it should."""
    key = f"probe-{uuid.uuid4().hex}"
    try:
        first = storage.put_if_unchanged(key, b"1", None)
        second = first and storage.put_if_unchanged(key, b"2", first)
        wrong = [storage.put_if_unchanged(key, b"3", version) for version in (None, first)]
        is_heeded, came = bool(second) and wrong == [None, None], "this one replaces what has changed"
    except StorageError as error:
        if error.code != "storage.failed" and "NotImplemented" not in str(error):
            raise
        came, is_heeded = str(error), False
    storage.delete(key)
    if not is_heeded:
        raise StorageError(
            f"{storage.location} cannot keep two runs apart: expected a server that supports If-None-Match and "
            f"If-Match, as S3, Google, Azure, MinIO and SeaweedFS do, {came}. Use another server, or a folder",
            "storage.unconditional",
        )
