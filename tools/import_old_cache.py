"""Copy what a store in the format before parts and manifests holds into that of now; pays nothing.

    python tools/import_old_cache.py STORAGE_FOLDER

`<range>.arrow` becomes the folder `<range>`, and is renamed to `<range>.arrow.imported`, which you may remove. Vectors
that do not fit their checksums are left out: the next run embeds those songs. Stop all runs before.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from songvec_assets.cache import manifest as manifests
from songvec_assets.cache.manifest import DataFile, Manifest, Rejection
from songvec_assets.cache.parts import PIECE_ROWS, CachedRows, PartIdentity, join_rows
from songvec_assets.cache.writing import PartWriter
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage

MARKER = b"\xff\xff\xff\xff"


def read_batches(content: pa.Buffer, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The whole batches of an old file, whatever damage lies between them or at its end."""
    batches, view, position = [], memoryview(content), len(schema.serialize())
    while position < content.size:
        stream = pa.BufferReader(content.slice(position))
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema)
            batch.validate(full=True)
            batches.append(batch)
            position += stream.tell()
        except (pa.ArrowException, EOFError, OSError):
            found = bytes(view[position + 8 :]).find(MARKER)
            position = content.size if found < 0 else position + 8 + found
    return batches


def read_rows(batch: pa.RecordBatch, dimensions: int) -> CachedRows | None:
    """The rows of a batch of vectors; None of rejections and deletions."""
    if batch.column("embedding").null_count:
        return None
    hashes = np.frombuffer(batch.column("text_hash").buffers()[1], "V16", batch.num_rows)
    vectors = batch.column("embedding").values.to_numpy().reshape(batch.num_rows, dimensions)
    return CachedRows(batch.column("song_id").to_numpy(), hashes, batch.column("checksum").to_numpy(), vectors)


def find_words(batch: pa.RecordBatch, modified_s: float) -> Iterator[tuple[int, object]]:
    """What a batch without vectors says of songs: a rejection, when one was deleted, or None: it is missing."""
    for row in batch.select(["song_id", "text_hash", "checksum", "reason"]).to_pylist():
        song_id, text_hash, reason = row["song_id"], row["text_hash"], row["reason"]
        if xxhash.xxh3_64_intdigest(np.int32(song_id).tobytes() + text_hash) != row["checksum"]:
            continue
        deleted_s = float(int.from_bytes(text_hash[8:], "little")) if text_hash.startswith(bytes(8)) else None
        yield song_id, Rejection(song_id, text_hash, reason) if reason else modified_s if deleted_s == 0 else deleted_s


def import_file(path: Path) -> tuple[int, int]:
    """Copy one range; songs with a sound vector, and rows left out."""
    content = pa.memory_map(str(path)).read_buffer()
    schema = pa.ipc.open_stream(content).schema
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    song_range, width = SongIdRange.from_key(metadata["range"]), int(metadata["dimensions"])
    words: dict[int, object] = {}
    sound: list[CachedRows] = []
    n_left_out = 0
    for batch in read_batches(content, schema):
        rows = read_rows(batch, width)
        if rows is None:
            words |= dict(find_words(batch, path.stat().st_mtime))
            continue
        good = np.flatnonzero(rows.find_sound())
        n_left_out += len(rows) - len(good)
        sound += [rows if len(good) == len(rows) else rows.take(good)] if len(good) else []
        for song_id in rows.song_ids.tolist():
            words.pop(song_id, None)
    storage, identity = LocalStorage(path.parent), PartIdentity(metadata["model"], width, song_range)
    files: tuple[DataFile, ...] = ()
    if sound:
        pieces = (each.embeddings[at : at + PIECE_ROWS] for each in sound for at in range(0, len(each), PIECE_ROWS))
        writer = PartWriter(storage, identity, 0)
        files = (writer.write_base(join_rows(sound), pieces),)
    found = Manifest(
        files=files,
        rejected=tuple(each for each in words.values() if isinstance(each, Rejection)),
        deleted_at={song_id: at for song_id, at in words.items() if isinstance(at, float)},
        damaged=tuple(song_id for song_id, each in words.items() if each is None),
    )
    storage.put(manifests.key_of(song_range), manifests.encode(found, identity))
    path.rename(path.with_name(f"{path.name}.imported"))
    return len({int(song_id) for each in sound for song_id in each.song_ids} - words.keys()), n_left_out


if __name__ == "__main__":
    for each in sorted(Path(sys.argv[1]).glob("embeddings/*/*.arrow")):
        print(f"{each}: {'{:,} songs, {:,} damaged rows left out'.format(*import_file(each))}", flush=True)
