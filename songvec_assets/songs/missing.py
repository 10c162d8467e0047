"""Songs that are cached or loaded but missing in the source: plausible deletions, or a reason to stop the export.

When to add here: another reason not to believe that songs were deleted. Keep out: which songs are cached or loaded (the
caller passes it) and what follows from a deletion. `share`s are fractions from 0 to 1.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import polars as pl

from songvec_assets.errors import BulkDeletionError
from songvec_assets.progress import RunContext
from songvec_assets.songs.counts import IdSums, RangeCount, read_song_ids
from songvec_assets.songs.ranges import SongIdRange, name_some
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import SongsSource

MIN_MISSING = 20
"""Fewer missing songs in all ranges never stop an export, whatever their share: small catalogues change."""
MIN_MISSING_OF_RANGE = 100
"""The same for a single range."""

_CONFIRM = "confirm it for one run with `--confirm-deletions`, or `confirm_deletions` in the run config"


def count_missing(song_ids: pl.Series, others: pl.Series) -> int:
    """Number of song_ids that are not among others."""
    return len(song_ids) - int(song_ids.is_in(others.implode()).sum())


@dataclass
class MissingSongs:
    """Known songs that are missing in the source; stops an export that would delete them in bulk.

    Attributes:
        known: number of songs that are cached or loaded, by range; approximate until the range is read.
        read_known: returns the distinct song_ids that are cached or loaded in a range.
        share: share of all known songs that may be missing.
        range_share: share of the known songs of a single range that may be missing.
        missing: number of missing songs, by range.
        is_empty: whether the source holds no song at all.
    """

    known: dict[SongIdRange, int]
    read_known: Callable[[SongIdRange], pl.Series]
    share: float
    range_share: float
    missing: dict[SongIdRange, int] = field(default_factory=dict)
    is_empty: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def find(
        self,
        source: SongsSource,
        snapshots: Snapshots,
        counts: Mapping[SongIdRange, RangeCount],
        run: RunContext,
    ) -> None:
        """Compare the known songs with the source.

        Reads ids only of ranges that gained or lost songs since their snapshot, or that hold fewer than are known.

        Args:
            snapshots: as the previous export left them.
        """
        self.is_empty = not counts
        for song_range, n_known in self.known.items():
            run.check_stop()
            in_source = counts.get(song_range, RangeCount()).ids
            songs = snapshots.try_to_read(song_range, ["song_id", "rejected"])
            embeddable = None
            if songs is not None and IdSums.of(songs["song_id"]) == in_source:
                embeddable = songs.filter(pl.col("rejected").is_null())["song_id"]
                if n_known <= len(embeddable):
                    continue
            known = self.read_known(song_range)
            if embeddable is None and IdSums.of(known) != in_source:
                embeddable = read_song_ids(source, song_range)
            # songs that earlier exports rejected count too: else an emptied column would pass, range by range
            self._note(song_range, known, known if embeddable is None else embeddable)

    def _note(self, song_range: SongIdRange, known: pl.Series, found: pl.Series) -> None:
        self.known[song_range] = len(known)
        self.missing[song_range] = count_missing(known, found)

    @property
    def n_known(self) -> int:
        """Known songs of all ranges."""
        return sum(self.known.values())

    @property
    def n_missing(self) -> int:
        """Missing songs of all ranges."""
        return sum(self.missing.values())

    @property
    def is_bulk(self) -> bool:
        """Whether enough songs are missing to stop an export."""
        return self._is_bulk_of_all() or any(map(self._is_bulk_of, self.missing))

    def _is_bulk_of_all(self) -> bool:
        is_large = self.n_missing >= MIN_MISSING and self.n_missing > self.share * self.n_known
        return is_large or bool(self.n_missing and self.is_empty)

    def _is_bulk_of(self, song_range: SongIdRange) -> bool:
        n_missing, n_known = self.missing.get(song_range, 0), self.known.get(song_range, 0)
        return n_missing >= MIN_MISSING_OF_RANGE and n_missing > self.range_share * n_known

    def describe(self) -> str:
        """The numbers, and the ranges with the most missing songs."""
        most = sorted(filter(self.missing.get, self.missing), key=lambda each: -self.missing[each])
        named = name_some([f"{each.key}: {self.missing[each]:,} of {self.known.get(each, 0):,}" for each in most])
        return f"{self.n_missing:,} of {self.n_known:,} songs that are loaded or cached ({named})"

    def check(self, source: SongsSource) -> None:
        """Refuse an export before it begins.

        Raises:
            BulkDeletionError: too many songs are missing.
        """
        if self.is_bulk:
            hidden = "Row security is active for this user and may hide them. " if source.row_security else ""
            raise BulkDeletionError(
                f"{self.describe()} are no longer in {source.table}: nothing was changed. {hidden}Check whether the "
                "table was truncated, is filtered by a view or a policy, is still being loaded or restored, or is the "
                f"wrong one (POSTGRES_URL, SONGVEC_SONGS_TABLE). If the songs are meant to be deleted, {_CONFIRM}"
            )

    def check_range(self, song_range: SongIdRange, embeddable: pl.Series) -> None:
        """Refuse the rows that were read of a range, before its snapshot is replaced. Callable from any thread.

        Rows may have been deleted since they were counted, or may no longer have the texts to embed.

        Args:
            embeddable: song_ids of the rows that can be embedded.

        Raises:
            BulkDeletionError: too many songs are missing, here or in all ranges read so far.
        """
        known = self.read_known(song_range)
        with self._lock:
            # also if the range is refused: its missing songs count towards the share of all ranges
            self._note(song_range, known, embeddable)
            is_bulk = self._is_bulk_of(song_range) or self._is_bulk_of_all()
            missing = self.describe()
        if self.missing[song_range] and is_bulk:
            raise BulkDeletionError(
                f"{missing} no longer have the fields of the text template, or were deleted while they were read: "
                f"{song_range.key} was not exported. Check for a column that was emptied, or a table that is still "
                f"being loaded. If this is intended, {_CONFIRM}"
            )
