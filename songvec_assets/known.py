"""The songs that were paid for or are served: those with a vector in the cache, or a row in the serving table.

What a deletion in the source is compared with. Reads ledgers, manifests and narrow columns; no vector.
When to add here: another place where a song may be known. Keep out: whether its absence is plausible (`songs/absence`).
"""

from dataclasses import dataclass
from functools import cached_property

import polars as pl

from songvec_assets.cache.shards import ModelCache
from songvec_assets.errors import StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.ledger import Ledger
from songvec_assets.vectors.table import VectorTable


@dataclass(frozen=True)
class CachedOrLoaded:
    """Songs of a model's cache and of the serving table: after a change of the model the cache alone is empty.

    Attributes:
        database, cache: where they are.
        tiling: how song_ids are cut; the ledger may still have the tail of another stop.
    """

    database: Database
    cache: ModelCache
    tiling: Tiling

    @property
    def _ledger(self) -> Ledger:
        return VectorTable(self.database).ledger

    @cached_property
    def _loaded(self) -> dict[SongIdRange, int]:
        return {song_range: entry.n_songs for song_range, entry in self._ledger.read().items()}

    def _is_cut(self, song_range: SongIdRange) -> bool:
        return self.tiling.range_of(song_range.start) == song_range

    def counts(self) -> dict[SongIdRange, int]:
        """Songs by range; of a range where the cache and the table differ, the greater number."""
        counts = {each: n_songs for each, n_songs in self._loaded.items() if self._is_cut(each)}
        for other in self._loaded.keys() - counts.keys():
            for song_id in self._ledger.read_song_ids(other):
                song_range = self.tiling.range_of(song_id)
                counts[song_range] = counts.get(song_range, 0) + 1
        for song_range in self.cache.ranges():
            counts[song_range] = max(counts.get(song_range, 0), self._count_cached(song_range))
        return {song_range: n_songs for song_range, n_songs in sorted(counts.items()) if n_songs}

    def song_ids(self, song_range: SongIdRange) -> pl.Series:
        """The songs of one range, each once; without those whose deletion was accepted, and only the load is due."""
        cached, deleted = self._read_cached(song_range)
        found = [cached]
        for each in self._loaded:
            if each.start < song_range.stop and song_range.start < each.stop:
                loaded = self._ledger.read_song_ids(each)
                found.append(loaded.filter(loaded.is_between(song_range.start, song_range.stop - 1)))
        known = pl.concat(found).unique()
        return known.filter(~known.is_in(deleted.implode()))

    def _count_cached(self, song_range: SongIdRange) -> int:
        return self.cache.summarize(song_range).n_vectors

    def _read_cached(self, song_range: SongIdRange) -> tuple[pl.Series, pl.Series]:
        """Songs with a vector, and deleted ones."""
        try:
            cached = self.cache.open(song_range)
            return cached.rows["song_id"], cached.deleted_song_ids()
        except StoreError:  # the fill or the load names what is wrong with the files
            return pl.Series([], dtype=pl.Int32), pl.Series([], dtype=pl.Int32)
