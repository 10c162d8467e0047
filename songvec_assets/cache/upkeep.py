"""Shards written anew: without their dead rows, cut into other ranges; and damage marked, to be embedded anew.

Hold the range's lock.
"""

import time
from pathlib import Path

import polars as pl

from songvec_assets.cache.format import ShardIdentity, build_batch
from songvec_assets.cache.shards import PIECE_ROWS, Shard
from songvec_assets.files import replace_atomically

_DEAD_SHARE = 0.2


def compact_if_worth_it(shard: Shard, retention_s: float = 0.0) -> bool:
    """Rewrite the file, ordered by song_id, where over a fifth of its rows are dead, or stretches damaged.

    Args:
        shard: which.
        retention_s: for how long the vectors of deleted songs are kept, and count as alive.
    """
    kept = rows_to_keep(shard, time.time() - retention_s if retention_s else float("inf"))
    if shard.n_rows - kept.height <= _DEAD_SHARE * shard.n_rows and not shard.n_bytes_skipped:
        return False
    write_shard(shard.path, shard.identity, shard, kept)
    shard.read()
    return True


def rows_to_keep(shard: Shard, deleted_since_s: float = 0.0) -> pl.DataFrame:
    """What a rewritten shard must hold: its live rows, and those of songs deleted since then (see `retained_rows`).

    Args:
        shard: which.
        deleted_since_s: seconds since 1970; 0: whenever they were deleted.

    Returns:
        The columns of `all_rows`. What is retained comes last: the live rows stay together, as loads read them.
    """
    live = shard.live_rows().with_columns(has_vector=pl.col("reason").is_null())
    retained = shard.retained_rows(deleted_since_s)
    return pl.concat([live.select(retained.columns), retained])


def discard_damaged_rows(shard: Shard) -> list[int]:
    """Mark rows whose checksum does not fit as damaged, so that the next fill embeds those songs anew.

    Reads every vector.

    Returns:
        Their song_ids.
    """
    vectors = shard.live_rows().filter(pl.col("reason").is_null())
    damaged = vectors.join(shard.find_sound(vectors), on="song_id", how="anti")["song_id"].to_list()
    shard.append_damaged(damaged)
    return damaged


def write_shard(path: Path, identity: ShardIdentity, source: Shard, rows: pl.DataFrame) -> None:
    """Write a new shard from rows of another (see `rows_to_keep`), in their order; it replaces `path` when it is whole.

    Rows with a vector keep their checksums: what a disk changed stays to be found. Those of the others were checked
    when they were read, and a tombstone may have got its time since.
    """
    with replace_atomically(path) as file:
        file.write(identity.schema.serialize())
        for piece in rows.iter_slices(PIECE_ROWS):
            for has_vector in (True, False):
                part = piece.filter(pl.col("has_vector") == has_vector)
                if not part.height:
                    continue
                ids, hashes, reasons = (part[name].to_list() for name in ("song_id", "text_hash", "reason"))
                embeddings = source.embeddings_at(part["row"].to_list()) if has_vector else None
                checksums = part["checksum"].to_numpy() if has_vector else None
                file.write(build_batch(identity, ids, hashes, reasons, embeddings, checksums).serialize())
