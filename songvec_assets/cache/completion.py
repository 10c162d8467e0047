"""The end of a fill: record rejections, merge files if that is worth it, save the manifest, delete garbage.

Callers hold the range's lock. When to add here: another step that completes a range. Keep out: sending texts.
"""

import dataclasses
import time
from collections.abc import Collection, Sequence

import polars as pl
from msgspec.structs import replace

from songvec_assets.cache import manifest as manifests
from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.manifest import Completion, DataFile, Manifest, Rejection, digest_rows
from songvec_assets.cache.model_cache import copy_vectors
from songvec_assets.cache.parts import PIECE_ROWS, SMALL_ROWS, Rows
from songvec_assets.cache.writing import PartWriter
from songvec_assets.errors import StoreError
from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.ranges import SongIdRange

_MOST_FILES = 128
"""A range of 50,000 songs that is filled in one run has 25 to 100 parts, which need not be written twice."""
_DEAD_SHARE = _PARTS_SHARE = 0.2


def complete(
    cached: CachedRange,
    filled: Completion,
    retention_s: float,
    rejected: Collection[Rejection] = (),
    spared: Sequence[int] | pl.Series = (),
) -> None:
    """Record that a range is complete, and merge its files into one base if that is worth it.

    Args:
        cached: the range; parts that its writer wrote are read first. A later generation replaces the earlier one.
        filled: the snapshot, settings and counts of the fill; n_vectors, digest and ids are computed here.
        retention_s: seconds for which the vectors of deleted songs are kept.
        rejected: songs that the provider rejected in this fill.
        spared: row numbers; these rows are not dropped, though they may no longer be valid. See `FillPlan`.
    """
    since = time.time() - retention_s if retention_s else float("inf")
    cached.add_written()
    cached.manifest = cached.manifest.reject(rejected)
    if cached.replaces is not None:
        _copy_deleted(cached, cached.replaces, since)
    rows, kept = cached.rows, cached.deleted_rows(since)
    filled = replace(filled, n_vectors=rows.height, digest=digest_rows(rows), ids=IdSums.of(rows["song_id"]))
    consumed = tuple(name for name in cached.manifest.consumed if name in cached.files.sizes)
    manifest = replace(cached.manifest, complete=filled, consumed=consumed)
    # an older text may come back: then its vector is reused
    older = _older_rows(cached, kept)
    recent = older.filter(pl.col("row").is_in(pl.Series(spared, dtype=pl.Int64).implode()))
    n_dead = cached.n_rows - rows.height - kept.height - recent.height
    has_many_dead = n_dead > _DEAD_SHARE * cached.n_rows
    if has_many_dead or _is_merge_due(cached):
        older = recent if has_many_dead else older
        manifest = _merge(cached, manifest, pl.concat([older, kept]), rows)
    if manifest != cached.files.manifest:
        cached.save(manifest)
    cached.delete_garbage()


def erase(cached: CachedRange, song_ids: Collection[int]) -> int:
    """Erase songs: the files are written again without their vectors, and the manifest without their song_ids.

    Returns:
        The number of rows erased, valid or not.

    Raises:
        StoreError: songs are being embedded again into files that cannot replace the present ones yet.
    """
    if cached.files.last_generation > cached.manifest.generation:
        raise StoreError(
            f"{cached.folder} is being embedded again, and that has not ended: end it with `songvec run --reembed` "
            "over the same ranges, and then forget songs",
            "cache.unfinished",
        )
    rows = cached.rows
    kept = cached.deleted_rows(0.0)
    older = pl.concat([_older_rows(cached, kept), kept])
    left = ~pl.col("song_id").is_in([*song_ids])
    n_erased = cached.all_rows.filter(~left).height
    manifest = cached.manifest.without(song_ids)
    if not n_erased and manifest == cached.manifest:
        return 0
    if not rows.select(left.all()).item():
        manifest = replace(manifest, complete=None)  # the next fill counts what is left
    cached.save(_merge(cached, manifest, older.filter(left), rows.filter(left)))
    cached.delete_garbage()
    return n_erased


def write_rows(source: CachedRange, rows: pl.DataFrame, song_range: SongIdRange, manifest: Manifest) -> None:
    """Write another range with rows of this one; it replaces what that range held before.

    Args:
        source: the range that has the vectors.
        rows: of its `all_rows`.
        song_range: to write, of the same model.
        manifest: of that range, without files.
    """
    storage, identity = source.storage, dataclasses.replace(source.identity, range=song_range)
    writer = PartWriter(storage, identity, manifest.generation)
    files = _write_base(writer, source, rows)
    storage.put(manifests.key_of(song_range), manifests.encode(replace(manifest, files=files), identity))


def _copy_deleted(cached: CachedRange, replaced: CachedRange, since_s: float) -> None:
    """Copy the vectors of songs deleted at this time or later, which a later generation does not embed."""
    deleted_at = {song_id: at for song_id, at in cached.manifest.deleted_at.items() if at >= since_s}
    rows = replaced.find_sound(replaced.last_rows().filter(pl.col("song_id").is_in([*deleted_at])))
    copy_vectors(replaced, rows, cached)
    cached.add_written()
    cached.manifest = replace(cached.manifest, deleted_at=deleted_at)


def _older_rows(cached: CachedRange, kept: pl.DataFrame) -> pl.DataFrame:
    """Rows that are no longer valid, of songs that are not deleted; without damaged ones."""
    expired = {*cached.manifest.deleted_at} - {*kept["song_id"]}
    older = cached.all_rows.join(pl.concat([kept, cached.rows]), on="row", how="anti")
    older = older.filter(~pl.col("song_id").is_in([*expired, *cached.had_damaged]))
    return older.unique(["song_id", "checksum"], keep="last", maintain_order=True)


def _is_merge_due(cached: CachedRange) -> bool:
    files = cached.manifest.files
    n_based = sum(each.n_bytes for each in files if manifests.is_base(each.name))
    n_in_parts = sum(each.n_bytes for each in files if not manifests.is_base(each.name))
    has_small_batches = cached.n_batches > 1 and cached.n_rows < cached.n_batches * SMALL_ROWS
    return (
        bool(cached.damaged or cached.had_damaged)
        or len(files) > _MOST_FILES
        or (not n_based and has_small_batches)
        or (n_based > 0 and n_in_parts > _PARTS_SHARE * n_based)
    )


def _merge(cached: CachedRange, manifest: Manifest, kept: pl.DataFrame, rows: pl.DataFrame) -> Manifest:
    """Write a base of the kept rows followed by the valid rows; returns the manifest that names it."""
    # of a song's rows the last one is valid; valid rows are stored together, since loads read them
    chosen = pl.concat([kept, rows])
    files = _write_base(cached.open_writer(), cached, chosen)
    cached.files.sizes.update({each.name: each.n_bytes for each in files})
    deleted_at = {song_id: at for song_id, at in manifest.deleted_at.items() if song_id in {*kept["song_id"]}}
    consumed = tuple(each.name for each in manifest.files)
    return replace(manifest, files=files, deleted_at=deleted_at, damaged=(), consumed=consumed)


def _write_base(writer: PartWriter, source: CachedRange, rows: pl.DataFrame) -> tuple[DataFile, ...]:
    """Write rows of a range as one base; none if there are no rows."""
    pieces = (source.embeddings_at(piece["row"]) for piece in rows.iter_slices(PIECE_ROWS))
    return (writer.write_base(Rows.of_frame(rows), pieces),) if rows.height else ()
