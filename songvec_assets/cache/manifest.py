"""The manifest of a range: `manifest.json` in its folder, a small file that is always replaced as a whole. Pure.

It names its generation's files in order, the songs without a vector and why, and what the last complete fill depended
on. Parts of its generation that it does not name are newer than its content; see `Manifest.adopt`.
When to add here: something else to record of a range. Keep out: reading and writing vectors. Times are seconds since
1970.
"""

import re
from collections.abc import Collection, Iterable

import msgspec
import polars as pl
import xxhash
from msgspec.structs import replace

from songvec_assets.cache.parts import PartIdentity
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange

NAME = "manifest.json"
_VERSION = 1
_FILE = re.compile(r"(\d+)-([0-9a-f]{32})-(\d+|base)\.arrow")


class DataFile(msgspec.Struct, frozen=True):
    """A file with vectors.

    Attributes:
        name: `<generation>-<writer>-<number>.arrow`; a base has `base` as its number.
        n_bytes: its size.
    """

    name: str
    n_bytes: int


class Rejection(msgspec.Struct, frozen=True):
    """A song that the provider gives no vector for.

    Attributes:
        song_id, text_hash: of the song, and of the text that was sent.
        reason: begins with the name of the server.
    """

    song_id: int
    text_hash: bytes
    reason: str


class Completion(msgspec.Struct, frozen=True):
    """A complete fill: what it depended on, and what it counted.

    Attributes:
        snapshot: digest of the snapshot that was filled.
        text: identity of how songs became texts.
        n_songs, n_rejected, n_truncated: of the range; rejected by the export or by the provider.
        server: the one that rejected songs; empty if none was rejected.
        n_vectors: songs with a vector.
        digest: of their song_ids and checksums; see `digest_rows`.
        ids: `IdSums` of their song_ids.
    """

    snapshot: str | None
    text: str
    n_songs: int
    n_rejected: int
    n_truncated: int
    server: str
    n_vectors: int = 0
    digest: bytes = b""
    ids: tuple[int, ...] = ()

    def fits(self, snapshot: str, text: str, server: str) -> bool:
        """Whether it is still complete: the same songs and texts, and the same server if it rejected any."""
        return self.server in ("", server) and snapshot != "" and (self.snapshot, self.text) == (snapshot, text)


class Manifest(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        version: of this format.
        model_id, dimensions, range: see `PartIdentity`; empty until it is stored.
        generation: of the valid files; files of earlier ones are garbage.
        files: in order: of a song's rows the last one is valid.
        rejected: songs that the provider rejected.
        deleted_at: by song_id, when songs were deleted whose vectors are still kept.
        damaged: songs with a damaged row: they have no vector until a newer part has one.
        consumed: files that a merge has replaced, which may still exist.
        complete: the last fill, if it was complete and nothing was written since.
    """

    version: int = _VERSION
    model_id: str = ""
    dimensions: int = 0
    range: str = ""
    generation: int = 0
    files: tuple[DataFile, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    deleted_at: dict[int, float] = {}
    damaged: tuple[int, ...] = ()
    consumed: tuple[str, ...] = ()
    complete: Completion | None = None

    @property
    def identity(self) -> PartIdentity:
        """The identity of a stored manifest."""
        return PartIdentity(self.model_id, self.dimensions, SongIdRange.from_key(self.range))

    def begin_generation(self, generation: int) -> "Manifest":
        """The manifest of a later generation, without files."""
        return replace(self, generation=generation, files=(), damaged=(), consumed=(), complete=None)

    def find_unnamed(self, names: Iterable[str], is_read: bool = True) -> list[str]:
        """The parts, in order, that are newer than this manifest.

        Args:
            names: of the files in its folder.
            is_read: whether a manifest was stored; if it was lost, bases are adopted too.
        """
        known = {each.name for each in self.files} | {*self.consumed}
        new = (name for name in names if generation_of(name) == self.generation and name not in known)
        return sorted((name for name in new if not (is_read and is_base(name))), key=_order)

    def adopt(self, files: Collection[DataFile], song_ids: Iterable[int]) -> "Manifest":
        """Add newer files; earlier records of the songs in them are dropped."""
        if not files:
            return self
        return replace(self.without(song_ids), files=(*self.files, *files), complete=None)

    def without(self, song_ids: Iterable[int]) -> "Manifest":
        """The same without any record of these songs."""
        known = set(song_ids)
        return replace(
            self,
            rejected=tuple(each for each in self.rejected if each.song_id not in known),
            deleted_at={song_id: at for song_id, at in self.deleted_at.items() if song_id not in known},
            damaged=tuple(song_id for song_id in self.damaged if song_id not in known),
        )

    def reject(self, rejected: Collection[Rejection]) -> "Manifest":
        """Add songs that the provider rejected."""
        left = self.without(each.song_id for each in rejected)
        return replace(left, rejected=(*left.rejected, *rejected), complete=None) if rejected else self

    def delete(self, song_ids: Collection[int], at: float) -> "Manifest":
        """Add songs that were deleted at a time; their vectors are kept for the retention time."""
        left = self.without(song_ids)
        return replace(left, deleted_at=left.deleted_at | dict.fromkeys(song_ids, at), complete=None)

    def find_garbage(self, names: Iterable[str]) -> list[str]:
        """Of the files in its folder, those that are no longer needed, and bases of merges that never finished."""
        kept, consumed = {each.name for each in self.files}, {*self.consumed}
        return [
            name
            for name in names
            if (generation := generation_of(name)) is not None
            and name not in kept
            and (generation < self.generation or name in consumed or is_base(name))
        ]


def key_of(song_range: SongIdRange) -> str:
    """The key of a range's manifest in the storage of its model."""
    return f"{song_range.key}/{NAME}"


def generation_of(name: str) -> int | None:
    """The generation in the name of a file with vectors; None for any other name."""
    found = _FILE.fullmatch(name)
    return int(found[1]) if found else None


def is_base(name: str) -> bool:
    """Whether a merge made a file."""
    return name.endswith("-base.arrow")


def _order(name: str) -> tuple[bool, str, int]:
    """Bases first, then a writer's parts in their order."""
    found = _FILE.fullmatch(name)
    assert found
    return not is_base(name), found[2], 0 if is_base(name) else int(found[3])


def decode(content: bytes, name: str, identity: PartIdentity | None = None) -> Manifest:
    """Parse a stored manifest.

    Args:
        name: of the file, for messages.
        identity: that it must have; None: any.

    Raises:
        StoreError: it does not parse, another version wrote it, or it has another identity.
    """
    content, _, digest = content.rstrip(b"\n").partition(b"\n")
    try:
        version = msgspec.json.decode(content, type=_Versioned).version
        if version != _VERSION:
            raise StoreError(
                f"{name} has version {version}, expected {_VERSION}: another version of songvec wrote it. Work with "
                "that version",
                "store.other-version",
            )
        if digest != _digest(content):
            raise msgspec.DecodeError("its checksum, which is the second line, does not fit the first")
        found = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise StoreError(
            f"{name} does not parse ({error}): restore it from a backup. Or remove it: the next fill compares the "
            "range with its parts and sends what they lack, and songs that were rejected",
            "store.damaged",
        ) from error
    if identity is not None and found.identity != identity:
        raise StoreError(
            f"{name} holds {found.identity}, expected {identity}: restore it from a backup; or move it away, and its "
            "songs are embedded again",
            "store.foreign-file",
        )
    return found


class _Versioned(msgspec.Struct):
    version: int


def encode(manifest: Manifest, identity: PartIdentity) -> bytes:
    """The inverse of `decode`: one line of JSON, and its checksum: a flipped bit could turn files into garbage."""
    whose = {"model_id": identity.model_id, "dimensions": identity.dimensions, "range": identity.range.key}
    content = msgspec.json.encode(replace(manifest, **whose))
    return content + b"\n" + _digest(content) + b"\n"


def _digest(content: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(content).encode()


def digest_rows(rows: pl.DataFrame) -> bytes:
    """A digest of the columns song_id and checksum of rows ordered by song_id."""
    state = xxhash.xxh3_128(rows["song_id"].to_numpy().tobytes())
    state.update(rows["checksum"].to_numpy().tobytes())
    return state.digest()
