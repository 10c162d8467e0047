"""What a snapshot contains: its columns, the hashes of its texts, and the metadata in its footer. Pure.

Content: song_id (int32), name, artist, lyrics and rejected (strings); rejected is null, or the reason why the song has
no embedding. Hashes: source_hash (int64) is the server's hash of name, artist and lyrics; text_hash (16 bytes) and
truncated (Boolean) are of the text to embed, null for rejected songs. The digest covers the content alone.
When to add here: something else to keep of a song. Keep out: files (`snapshots`), and reading the source (`readers`).
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from songvec_assets.songs.text import FIELDS, TEXT_HASH_BYTES, TextSpec, render_texts

SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field("song_id", pa.int32(), nullable=False),
        *(pa.field(name, pa.string()) for name in (*FIELDS, "rejected")),
    ]
)
_TEXT_HASHES = [pa.field("text_hash", pa.binary(TEXT_HASH_BYTES)), pa.field("truncated", pa.bool_())]
FILE_SCHEMA = pa.schema([*SNAPSHOT_SCHEMA, pa.field("source_hash", pa.int64()), *_TEXT_HASHES])
BATCH_ROWS = 4096
_DIGEST, _TEXT, _COUNTS = b"songvec.digest2", b"songvec.text2", b"songvec.counts"


@dataclass(frozen=True)
class Footer:
    """The metadata in a snapshot's footer.

    Attributes:
        digest: identity of the content; empty if there is no snapshot.
        text: identity of the settings by which texts were hashed and songs rejected; empty in earlier versions.
        n_songs: rows.
        rejected: number of rejected songs by reason.
    """

    digest: str = ""
    text: str = ""
    n_songs: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, songs: pa.Table, text: str) -> "Footer":
        """The footer of these songs."""
        return cls(digest_songs(songs), text, songs.num_rows, Counter(songs["rejected"].drop_null().to_pylist()))

    @classmethod
    def decode(cls, metadata: Mapping[bytes, bytes], n_songs: int) -> "Footer":
        """The inverse of `encode`, for a file of `n_songs` rows."""
        digest, text, counts = (metadata.get(key, b"").decode() for key in (_DIGEST, _TEXT, _COUNTS))
        return cls(digest, text, n_songs, Counter(json.loads(counts)[0] if counts else {}))

    def encode(self) -> dict[bytes, str]:
        """As metadata of a file."""
        # earlier versions kept, and expect, a second entry
        return {_DIGEST: self.digest, _TEXT: self.text, _COUNTS: json.dumps([self.rejected, []])}


class Changes(NamedTuple):
    """Numbers of songs that a range gained, changed and lost."""

    n_new: int = 0
    n_changed: int = 0
    n_deleted: int = 0


NO_CHANGES = Changes()


def make_content(songs: pa.Table, spec: TextSpec) -> pa.Table:
    """Give the songs that cannot be embedded a reason, and hash the texts of the others.

    Args:
        songs: as `read_songs_from_postgres` returns them.

    Returns:
        Of FILE_SCHEMA.
    """
    reasons = [pl.Series(songs["undecodable"])] if "undecodable" in songs.column_names else []
    for column in FIELDS:
        # only required columns are read: lyrics, most of a song's bytes, are required only if nothing else is embedded
        if column in spec.required:
            is_blank = pl.Series(songs[column]).fill_null("").str.strip_chars() == ""
            reasons.append(pl.select(pl.when(is_blank).then(pl.lit(f"the song has no {column}"))).to_series())
    # from a list: polars leaves bytes under its nulls, which the digest would include
    rejected = pa.array(pl.select(pl.coalesce(reasons)).to_series().to_list(), pa.string())
    return add_text_hashes(songs.append_column("rejected", rejected), spec)


def add_text_hashes(songs: pa.Table, spec: TextSpec) -> pa.Table:
    """Add the hashes of the texts; in batches, since rendered texts take several times the memory of songs."""
    columns = pl.DataFrame(songs.select(SNAPSHOT_SCHEMA.names))
    accepted = columns.filter(pl.col("rejected").is_null())
    pieces = [accepted[:0], *accepted.iter_slices(BATCH_ROWS)]
    rendered = pl.concat([render_texts(piece, spec).drop("text") for piece in pieces])
    joined = columns.select("song_id").join(rendered, on="song_id", how="left", maintain_order="left")
    # from lists: the arrays of polars have other types
    hashes = [pa.array(joined[each.name].to_list(), each.type) for each in _TEXT_HASHES]
    return pa.table([*songs.select(FILE_SCHEMA.names[: -len(hashes)]).columns, *hashes], schema=FILE_SCHEMA)


def count_changes(before: pl.DataFrame | None, after: pl.DataFrame) -> Changes:
    """Count songs that are new, changed and deleted.

    Args:
        before: columns song_id and source_hash; None: there was no snapshot.
        after: the same columns.
    """
    if before is None:
        return Changes(n_new=after.height)
    both = after.join(before, on="song_id", how="inner", suffix="_before")
    n_changed = int((both["source_hash"] != both["source_hash_before"]).sum())
    return Changes(after.height - both.height, n_changed, before.height - both.height)


def digest_songs(songs: pa.Table) -> str:
    """A digest of the content; it does not depend on how the table is chunked. Copies no text.

    Args:
        songs: with the columns of SNAPSHOT_SCHEMA, and no bytes under nulls.
    """
    state = xxhash.xxh3_128()
    for column in songs.select(SNAPSHOT_SCHEMA.names).columns:
        for chunk in column.chunks:
            state.update(np.asarray(chunk.is_null()).data)
        if pa.types.is_string(column.type):
            ends = np.cumsum(pc.fill_null(pc.binary_length(column), 0).to_numpy(), dtype=np.int64)
            state.update(np.append([0], ends).astype(np.int32).data)
        for chunk in column.chunks:
            state.update(_values(chunk))
    return state.hexdigest()


def _values(chunk: pa.Array) -> memoryview:
    """The bytes of a chunk's values, without a copy."""
    _, *buffers = chunk.buffers()
    start, stop = chunk.offset, chunk.offset + len(chunk)
    if pa.types.is_string(chunk.type):
        if not len(chunk) or buffers[1] is None:
            return memoryview(b"")
        offsets = np.frombuffer(buffers[0], np.int32)
        start, stop, width = offsets[start], offsets[stop], 1
    else:
        width = chunk.type.byte_width
    return memoryview(buffers[-1])[start * width : stop * width]
