"""The songs that were paid for or are served: those with a vector in the cache, or a row in the serving table.

Deletions in the source are compared with them. Reads ledgers, manifests and narrow columns; no vector.
When to add here: another place where a song may be known. Keep out: whether its absence is plausible (`songs/missing`).
"""

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.errors import StoreError
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.vectors.ledger import Ledger
from songvec_assets.vectors.table import VectorTable


@dataclass(frozen=True)
class CachedOrLoaded:
    """Songs of a model's cache and of the serving table: after a change of the model the cache alone is empty.

    Attributes:
        tiling: how song_ids are divided; the ledger may still have the tail of another stop.
    """

    database: Database
    cache: ModelCache
    tiling: Tiling

    @cached_property
    def _ledger(self) -> Ledger:
        return VectorTable(self.database).ledger

    @cached_property
    def _loaded(self) -> dict[SongIdRange, int]:
        return {song_range: entry.n_songs for song_range, entry in self._ledger.read().items()}

    def counts(self) -> dict[SongIdRange, int]:
        """Songs by range; if the cache and the table differ, the greater number."""
        counts: Counter[SongIdRange] = Counter()
        for each, n_songs in self._loaded.items():
            if self.tiling.range_of(each.start) == each:
                counts[each] += n_songs
            else:
                counts.update(map(self.tiling.range_of, self._ledger.read_song_ids(each)))
        for each in self.cache.ranges():
            counts[each] = max(counts[each], self.cache.summarize(each).n_vectors)
        return {song_range: n_songs for song_range, n_songs in sorted(counts.items()) if n_songs}

    def song_ids(self, song_range: SongIdRange) -> pl.Series:
        """The songs of one range, each once; without those whose deletion was accepted and awaits the next load."""
        known, deleted = [pl.Series("song_id", [], dtype=pl.Int32)], []
        # the fill or the load names what is wrong with the files
        with contextlib.suppress(StoreError):
            cached = self.cache.open(song_range)
            known, deleted = [cached.rows["song_id"]], [*cached.manifest.deleted_at]
        for loaded in map(self._ledger.read_song_ids, filter(song_range.overlaps, self._loaded)):
            known.append(loaded.filter(loaded.is_between(song_range.start, song_range.stop - 1)))
        song_ids = pl.concat(known).unique()
        return song_ids.filter(~song_ids.is_in(deleted))
