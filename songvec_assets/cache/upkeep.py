"""Shards written anew: without their dead rows, cut into other ranges; and damage marked, to be embedded anew.

Hold the range's lock.
"""

from pathlib import Path

import polars as pl

from songvec_assets.cache.format import ShardIdentity, build_batch
from songvec_assets.cache.shards import PIECE_ROWS, Shard
from songvec_assets.files import replace_atomically

_DEAD_SHARE = 0.2


def compact_if_worth_it(shard: Shard) -> bool:
    """Write the file anew, ordered by song_id, where over a fifth of its rows are dead, or stretches damaged."""
    live = shard.live_rows()
    if shard.n_rows - live.height <= _DEAD_SHARE * shard.n_rows and not shard.n_bytes_skipped:
        return False
    write_shard(shard.path, shard.identity, shard, live)
    shard.read()
    return True


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


def write_shard(path: Path, identity: ShardIdentity, source: Shard, live: pl.DataFrame) -> None:
    """Write a new shard from live rows of another, in their order; it takes `path`'s place when it is whole.

    Rows keep their checksums: what a disk changed stays to be found.
    """
    with replace_atomically(path) as file:
        file.write(identity.schema.serialize())
        for piece in live.iter_slices(PIECE_ROWS):
            for rows in (piece.filter(pl.col("reason").is_null()), piece.filter(pl.col("reason").is_not_null())):
                if not rows.height:
                    continue
                ids, hashes, reasons = (rows[name].to_list() for name in ("song_id", "text_hash", "reason"))
                embeddings = source.embeddings_at(rows["row"].to_list()) if reasons[0] is None else None
                checksums = rows["checksum"].to_numpy()
                file.write(build_batch(identity, ids, hashes, reasons, embeddings, checksums).serialize())
