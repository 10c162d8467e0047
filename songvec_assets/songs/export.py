"""Postgres to Parquet: changed songs are found by their hashes, read, and written to the snapshot of their range.

Per range the server scans the rows, or only those updated lately, and sends an id and a hash per song; texts are sent
only of changed songs. A few ranges are read in parallel, which bounds the memory.
When to add here: another way to find changed songs. Keep out: SQL (`source`), reading it (`readers`), the file format
(`content`), and what is reported (`reports`).
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import adbc_driver_postgresql.dbapi as adbc
import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from songvec_assets.errors import DatabaseError, SourceError
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.content import FILE_SCHEMA, NO_CHANGES, Changes, Footer, count_changes, make_content
from songvec_assets.songs.counts import IdSums, RangeCount, check_ids, count_ranges, count_unreachable_ids
from songvec_assets.songs.missing import MissingSongs
from songvec_assets.songs.ranges import SongIdRange, Tiling, name_some
from songvec_assets.songs.readers import Reader, Readers, read_columns, read_songs_from_postgres
from songvec_assets.songs.reports import ExportReport, IncompleteExportError, RangeExport
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.source import HASHES, SongsSource
from songvec_assets.storage import Storage

ExportMode = Literal["all", "append"]

_LOOKS = "looks.json"
_MOST_NAMED_SHARE = 0.25
"""If a larger share of a range's songs changed, the range is read as a whole."""


@dataclass(frozen=True)
class ExportOptions:
    """How an export is done.

    Attributes:
        mode: `all` compares every range; `append` reads only song_ids above the highest exported one, and ranges
            without a snapshot.
        kept: ranges that get a snapshot even if they hold no song: an empty snapshot records that all were deleted.
        guard: refuses the export if songs are missing in bulk; None: missing songs count as deleted.
        n_readers: connections that read in parallel: with one, the server is idle while files are written; three take
            over 450 MB.
        full_compare_hours: hours after which an export of `all` compares every song, whatever the updated_at column
            says; 0: always.
    """

    mode: ExportMode = "all"
    kept: Collection[SongIdRange] = ()
    guard: MissingSongs | None = None
    n_readers: int = 2
    full_compare_hours: float = 24.0


_DEFAULT_OPTIONS = ExportOptions()


class Looks(msgspec.Struct, frozen=True):
    """How far earlier exports looked: an export by updated_at reads from there on.

    Attributes:
        source: identity of the table and columns.
        full_compare_at: when every song was last compared, seconds since the epoch.
        newest: by range key, the digest of the snapshot that was written and the latest updated_at in it, as text. It
            is valid for that snapshot only: another one may lack rows that were seen before.
    """

    source: str
    full_compare_at: float = 0.0
    newest: dict[str, tuple[str, str]] = {}

    @classmethod
    def read(cls, storage: Storage, source: SongsSource) -> "Looks":
        """The stored record of this source; an empty one, with which all songs are compared, if there is none."""
        try:
            stored = storage.read(_LOOKS)
            found = msgspec.json.decode(stored.content if stored else b"", type=cls)
        except msgspec.DecodeError:
            return cls(source.identity)
        return found if found.source == source.identity else cls(source.identity)

    def after(self, report: ExportReport, counts: Mapping[SongIdRange, RangeCount], full_compare_at: float) -> "Looks":
        """The record after an export of these counts; ranges that failed keep their entry."""
        newest = {}
        for each in report.ranges:
            key, counted = each.range.key, counts.get(each.range)
            if each.error and key in self.newest:
                newest[key] = self.newest[key]
            elif each.footer.digest and counted and counted.newest:
                newest[key] = (each.footer.digest, counted.newest)
        return Looks(self.source, full_compare_at, newest)


def cache_songs_to_parquet(
    source: SongsSource,
    snapshots: Snapshots,
    tiling: Tiling,
    options: ExportOptions = _DEFAULT_OPTIONS,
    run: RunContext = SILENT,
) -> ExportReport:
    """Bring the snapshots to the state of the source table.

    Args:
        run: receives the number of songs exported so far, and may stop the export; finished ranges are kept.

    Raises:
        BulkDeletionError: too many songs are missing; nothing was changed.
        IncompleteExportError: some ranges could not be read; all others are exported. After three ranges in a row
            without a connection, the rest are not tried.
        DatabaseError: the songs could not be counted.
        SettingsError: the open tail holds more songs than a range may, or songs have ids below the first range.
        SourceError: most songs have ids that no range can hold.
    """
    started = time.time()
    is_append = options.mode == "append"
    report = ExportReport()
    check_ids(source, tiling)
    counts = count_ranges(source, tiling)
    # an append deletes no song of a snapshot made with these settings
    if options.guard and not is_append:
        options.guard.find(source, snapshots, counts, run)
        options.guard.check(source)
    snapshots.storage.delete_leftovers("")
    snapshots.delete_other_ranges(tiling)
    known = {*snapshots.ranges()}
    exporter = _Exporter(source, snapshots, counts, options)
    if is_append:
        above = exporter.above = snapshots.find_max_song_id()
        # before the others: if a later range were written and this one not, the next append would begin above its songs
        first = [each for each in sorted(counts) if exporter.is_split(each)]
        others = [each for each in sorted(counts) if each not in known or above is None or each.start > above]
        _export_ranges(exporter, [first, others], report, run)
    else:
        report.unreachable.update(count_unreachable_ids(source))
        looks = Looks.read(snapshots.storage, source)
        is_full = not 0 <= started - looks.full_compare_at < options.full_compare_hours * 3600
        exporter.newest = {} if is_full else looks.newest
        _export_ranges(exporter, [sorted({*counts, *known, *options.kept})], report, run)
        # a full compare that failed somewhere is still due
        seen = looks.after(report, counts, started if is_full and not report.failed else looks.full_compare_at)
        if source.updated_at and seen != looks:
            snapshots.storage.put(_LOOKS, msgspec.json.encode(seen))
    if report.failed:
        raise IncompleteExportError(report) from report.failed[0].error
    return report


def _export_ranges(
    exporter: "_Exporter", groups: Sequence[Sequence[SongIdRange]], report: ExportReport, run: RunContext
) -> None:
    """Export groups of ranges in order; a failure ends it after its group, a lost server at once."""
    wanted = [each for group in groups for each in group]
    total = sum(exporter.count(each).n_songs for each in wanted)
    with Readers(exporter.source.database, exporter.options.n_readers) as readers:
        for group in groups:
            for exported in readers.map(exporter.export, group, run):
                report.ranges.append(exported)
                failed = [each.range.key for each in report.failed]
                note = f"not exported: {name_some(failed)}" if failed else ""
                run.report(Progress("export songs", report.n_songs, total, note=note))
                if report.found_no_server:
                    break
            if report.failed:
                error = report.failed[-1].error
                report.ranges.extend(RangeExport(each, error=error) for each in wanted[len(report.ranges) :])
                break


@dataclass
class _Exporter:
    """Exports ranges of one source; its methods may be called from any thread.

    Attributes:
        newest: see `Looks`; empty: every song is compared.
        above: if the export appends, the highest song_id of all snapshots.
    """

    source: SongsSource
    snapshots: Snapshots
    counts: Mapping[SongIdRange, RangeCount]
    options: ExportOptions
    newest: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    above: int | None = None

    def is_split(self, song_range: SongIdRange) -> bool:
        """Whether an append reads only the upper part of the range."""
        return self.above is not None and song_range.start <= self.above < song_range.stop - 1

    def count(self, song_range: SongIdRange) -> RangeCount:
        """What the source holds in a range."""
        return self.counts.get(song_range, RangeCount())

    def export(self, reader: Reader, song_range: SongIdRange) -> RangeExport:
        """Bring one range's snapshot to the state of its songs; the result has the error if that fails."""
        footer = self.snapshots.footer(song_range)
        if song_range not in self.counts and song_range not in self.options.kept:
            self.snapshots.delete(song_range)
            return RangeExport(song_range, changes=Changes(n_deleted=footer.n_songs), written=True)
        try:
            before = self.snapshots.try_to_read(song_range, ["song_id", "source_hash"])
            if before is not None and footer.text == self.source.spec.identity:
                conditions = self._conditions(song_range, footer)
                after, newer = reader.read(partial(self._read_newer, song_range, before, conditions))
                if not newer.num_rows and len(after) == len(before):
                    return RangeExport(song_range, footer)
                try:
                    return self._write(song_range, footer, before, self.snapshots.merge(song_range, newer, after))
                except (pa.ArrowException, OSError):  # damaged: as if there were none
                    before = None
            # there is no snapshot, or it was made with other settings, which may have rejected other songs
            songs = reader.read(partial(read_songs_from_postgres, source=self.source, song_range=song_range))
            return self._write(song_range, footer, before, make_content(songs, self.source.spec))
        except (DatabaseError, SourceError) as error:
            return RangeExport(song_range, error=error)

    def _conditions(self, song_range: SongIdRange, footer: Footer) -> list[str]:
        """Conditions on the rows to look at, to be tried in order until one covers all changes."""
        if self.above is not None and self.is_split(song_range):
            return [self.source.above(self.above)]
        digest, newest = self.newest.get(song_range.key, ("", ""))
        return [self.source.updated_since(newest), ""] if digest and digest == footer.digest else [""]

    def _read_newer(
        self, song_range: SongIdRange, before: pl.DataFrame, conditions: list[str], connection: adbc.Connection
    ) -> tuple[pl.Series, pa.Table]:
        """The song_ids that the range has now, and the changed rows, in one database snapshot."""
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for condition in conditions:
            seen = pl.DataFrame(read_columns(connection, self.source, HASHES, song_range, condition))
            after = seen["song_id"]
            if condition:
                after = pl.concat([before["song_id"], after]).unique().sort()
            # otherwise songs were deleted, or inserted with an old time: look at all rows
            if self.is_split(song_range) or IdSums.of(after) == self.count(song_range).ids:
                break
        changed = seen.join(before, on=["song_id", "source_hash"], how="anti")["song_id"]
        if changed.is_empty():
            return after, FILE_SCHEMA.empty_table()
        if len(changed) <= _MOST_NAMED_SHARE * len(after):
            condition = self.source.among(changed)
        songs = read_songs_from_postgres(connection, self.source, song_range, condition)
        return after, make_content(songs.filter(pc.is_in(songs["song_id"], changed.to_arrow())), self.source.spec)

    def _write(
        self, song_range: SongIdRange, replaced: Footer, before: pl.DataFrame | None, songs: pa.Table
    ) -> RangeExport:
        footer, changes = Footer.of(songs, self.source.spec.identity), NO_CHANGES
        if replaced.digest != footer.digest:
            if self.options.guard:
                is_embeddable = pc.is_null(songs["rejected"])
                self.options.guard.check_range(song_range, pl.Series(songs["song_id"].filter(is_embeddable)))
            changes = count_changes(before, pl.DataFrame(songs.select(["song_id", "source_hash"])))
        self.snapshots.write(song_range, songs, footer)
        return RangeExport(song_range, footer, changes, written=True)
