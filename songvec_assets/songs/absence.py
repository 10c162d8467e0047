"""Songs that are cached or loaded and no longer in the source: plausible deletions, or a reason to stop the export.

When to add here: another reason not to believe that songs were deleted. Keep out: which songs are cached or loaded (the
caller passes it) and what follows from a deletion. `share`s are fractions from 0 to 1.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import polars as pl

from songvec_assets.errors import BulkDeletionError
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.counts import IdSums, RangeCount, read_song_ids
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import SongsSource

MIN_MISSING = 20
"""Fewer missing songs of the catalogue never stop an export, whatever their share: small catalogues change."""
MIN_MISSING_OF_RANGE = 100
"""The same of one range."""

_MAX_NAMED = 5


class KnownSongs(Protocol):
    """The songs that something was paid or loaded for."""

    def counts(self) -> Mapping[SongIdRange, int]:
        """How many there are, by range; cheap, and at most a few too many or too few."""

    def song_ids(self, song_range: SongIdRange) -> pl.Series:
        """Those of one range, each once."""


@dataclass(frozen=True)
class AbsenceLimits:
    """How many known songs may be missing before an export stops.

    Attributes:
        share: of all known songs.
        range_share: of the known songs of one range.
    """

    share: float = 0.1
    range_share: float = 0.5


@dataclass(frozen=True)
class Absence:
    """Known songs that are missing in the source.

    Attributes:
        known: number of known songs by range.
        missing: number of those that are missing, by range; ranges without any are left out.
        is_empty: whether the source holds no song at all.
        limits: how many may be missing.
    """

    known: Mapping[SongIdRange, int]
    missing: Mapping[SongIdRange, int]
    is_empty: bool
    limits: AbsenceLimits

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
        return self.is_bulk_of_all or any(map(self.is_bulk_of, self.missing))

    @property
    def is_bulk_of_all(self) -> bool:
        """Whether enough are missing in all ranges together, or the source is empty."""
        too_many = self.n_missing >= MIN_MISSING and self.n_missing > self.limits.share * self.n_known
        return too_many or bool(self.n_missing and self.is_empty)

    def is_bulk_of(self, song_range: SongIdRange) -> bool:
        """Whether enough are missing in one range."""
        n_missing = self.missing.get(song_range, 0)
        n_allowed = self.limits.range_share * self.known.get(song_range, 0)
        return n_missing >= MIN_MISSING_OF_RANGE and n_missing > n_allowed

    def describe(self) -> str:
        """The numbers, and the ranges that lack most."""
        most = sorted(self.missing, key=lambda each: -self.missing[each])
        named = [f"{each.key}: {self.missing[each]:,} of {self.known.get(each, 0):,}" for each in most[:_MAX_NAMED]]
        more = f" and {len(most) - _MAX_NAMED:,} ranges more" if len(most) > _MAX_NAMED else ""
        return f"{self.n_missing:,} of {self.n_known:,} songs that are loaded or cached ({', '.join(named)}{more})"


def count_missing(song_ids: pl.Series, there: pl.Series) -> int:
    """Number of song_ids that are not among others."""
    return len(song_ids) - int(song_ids.is_in(there.implode()).sum())


@dataclass
class AbsenceGuard:
    """Stops an export that would take absence in bulk for deletion. Its methods may be called from any thread.

    Attributes:
        known: what to compare the source with.
        limits: how many songs may be missing.
        confirmed: whether somebody said for this run that the songs are deleted: nothing is compared then.
    """

    known: KnownSongs
    limits: AbsenceLimits = field(default_factory=AbsenceLimits)
    confirmed: bool = False
    _absence: Absence | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def find(
        self,
        database: Database,
        source: SongsSource,
        snapshots: Snapshots,
        counts: Mapping[SongIdRange, RangeCount],
        check_stop: Callable[[], None] = lambda: None,
    ) -> Absence:
        """Compare the known songs with the source.

        Reads ids only of ranges that gained or lost songs since their snapshot, or that hold fewer than are known.

        Args:
            database: where the source is.
            source: which table and columns.
            snapshots: as the export before left them.
            counts: of the source, by range.
            check_stop: called for each range; raises to end it.
        """
        known, missing = dict(self.known.counts()), {}
        for song_range, n_known in known.items():
            check_stop()
            there = counts.get(song_range, RangeCount()).ids
            snapshot = snapshots.read_ids(song_range)
            before = snapshot[1] if snapshot is not None and IdSums.of(snapshot[0]) == there else None
            if before is not None and n_known <= len(before):
                continue
            song_ids = self.known.song_ids(song_range)
            known[song_range] = len(song_ids)
            if before is not None:
                # what earlier exports found without a name counts, too: else an emptied column passes range by range
                missing[song_range] = count_missing(song_ids, before)
            elif IdSums.of(song_ids) != there:
                missing[song_range] = count_missing(song_ids, read_song_ids(database, source, song_range))
        return Absence(known, {each: n for each, n in missing.items() if n}, not counts, self.limits)

    def check(self, absence: Absence, source: SongsSource) -> None:
        """Refuse an export before it begins.

        Raises:
            BulkDeletionError: too many songs are missing.
        """
        self._absence = absence
        if absence.is_bulk:
            hidden = "Row security is active for this user and may hide them. " if source.row_security else ""
            raise BulkDeletionError(
                f"{absence.describe()} are no longer in {source.table}: nothing was changed. {hidden}Check whether the "
                "table was truncated, is filtered by a view or a policy, is still being loaded or restored, or is the "
                "wrong one (POSTGRES_URL, SONGVEC_SONGS_TABLE). If the songs are meant to be deleted, confirm it for "
                "one run with `--confirm-deletions`, or `confirm_deletions` in the run config"
            )

    def check_range(self, song_range: SongIdRange, embeddable: pl.Series) -> None:
        """Refuse what was read of a range, before its snapshot is replaced.

        It may be less than was counted, and rows may be there whose songs can no longer be embedded.

        Args:
            song_range: which.
            embeddable: the song_ids that can be embedded.

        Raises:
            BulkDeletionError: too many songs are missing, here or in all ranges read so far.
        """
        if self.confirmed:
            return
        song_ids = self.known.song_ids(song_range)
        n_missing = count_missing(song_ids, embeddable)
        with self._lock:
            before = self._absence or Absence(self.known.counts(), {}, False, self.limits)
            # also if it is refused: what vanishes from the next ranges is part of the same
            self._absence = absence = replace(
                before,
                known={**before.known, song_range: len(song_ids)},
                missing={**before.missing, song_range: n_missing},
            )
        if n_missing and (absence.is_bulk_of(song_range) or absence.is_bulk_of_all):
            raise BulkDeletionError(
                f"{absence.describe()} no longer have what the text template names, or vanished while they were read: "
                f"{song_range.key} was not exported. Check for a column that was emptied, or a table that is still "
                "being loaded. If this is intended, confirm it for one run with `--confirm-deletions`, or "
                "`confirm_deletions` in the run config"
            )
