"""Postgres to Parquet: changed songs are found by their hashes, read, and written to the snapshot of their range.

Per range the server scans the rows, or only those updated lately, and sends an id and a hash per song; texts are sent
only of changed songs. A few ranges are read in parallel, which bounds the memory.
When to add here: another way to find changed songs. Keep out: SQL (`source`), and the file format (`snapshots`).
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import adbc_driver_postgresql.dbapi as adbc
import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from songvec_assets.errors import BulkDeletionError, DatabaseError, SongvecError, SourceError, describe
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import SILENT, Progress, RunContext
from songvec_assets.songs.absence import Absence
from songvec_assets.songs.counts import IdSums, RangeCount, check_ids, count_ranges, count_unreachable_ids
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.readers import Reader, Readers, is_server_lost
from songvec_assets.songs.snapshots import (
    FILE_SCHEMA,
    NO_CHANGES,
    Changes,
    Footer,
    Snapshots,
    add_text_hashes,
    count_changes,
)
from songvec_assets.songs.source import HASHES, SONGS, SONGS_AS_BYTES, SongsSource
from songvec_assets.storage import Storage

ExportMode = Literal["all", "append"]

N_READERS = 2
"""Connections that read in parallel: with one, the server is idle while files are written; three take over 450 MB."""

FULL_COMPARE_HOURS = 24.0

_LOOKS = "looks.json"
_BATCH_BYTES = 4 << 20
# SQLSTATEs: no equivalent in UTF-8; invalid in the database's encoding (PostgreSQL's error codes, read 2026-11)
_UNDECODABLE = ("22P05", "22021")
_MOST_NAMED_SHARE = 0.25
"""If a larger share of a range's songs changed, the range is read as a whole."""
_MAX_UNREACHED = 3
_MAX_NAMED = 5


@dataclass(frozen=True)
class RangeExport:
    """What happened to one range's snapshot.

    Attributes:
        range: of the snapshot.
        footer: of the current snapshot; empty if there is none, or the range was not exported.
        changes: compared with the previous snapshot.
        written: whether the file was written or deleted.
        error: why the range was not exported; its snapshot is unchanged then. None: it was exported.
    """

    range: SongIdRange
    footer: Footer = field(default_factory=Footer)
    changes: Changes = NO_CHANGES
    written: bool = False
    error: SongvecError | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        ranges: every range that holds or held songs.
        unreachable: number of songs with an id that no range can hold, by reason.
    """

    ranges: list[RangeExport] = field(default_factory=list)
    unreachable: Counter[str] = field(default_factory=Counter)

    @property
    def n_songs(self) -> int:
        """Songs of the exported ranges."""
        return sum(each.footer.n_songs for each in self.ranges)

    @property
    def changes(self) -> Changes:
        """The changes of all ranges together."""
        return Changes(*map(sum, zip(*(each.changes for each in self.ranges), strict=True)))

    @property
    def rejected(self) -> Counter[str]:
        """Number of rejected songs by reason, not counting ids that no range can hold."""
        return sum((each.footer.rejected for each in self.ranges), Counter())

    @property
    def text_sizes(self) -> Counter[int]:
        """Number of songs by the size of their texts, see `count_text_sizes`."""
        return sum((each.footer.text_sizes for each in self.ranges), Counter())

    @property
    def failed(self) -> list[RangeExport]:
        """The ranges that were not exported."""
        return [each for each in self.ranges if each.error]

    @property
    def found_no_server(self) -> bool:
        """Whether each of the last ranges failed because there was no connection."""
        last = self.ranges[-_MAX_UNREACHED:]
        return len(last) == _MAX_UNREACHED and all(each.error and is_server_lost(each.error.__cause__) for each in last)


class IncompleteExportError(DatabaseError):
    """Some ranges were not exported; the others were.

    Attributes:
        report: of all ranges.
        reasons: keys of the failed ranges, by reason.
    """

    code = "source.not-exported"

    def __init__(self, report: ExportReport) -> None:
        self.reasons: dict[str, list[str]] = {}
        for each in report.failed:
            self.reasons.setdefault(describe(each.error), []).append(each.range.key)
        reasons = (f"{_name_some(ranges)}: {error}" for error, ranges in self.reasons.items())
        super().__init__(
            f"{len(report.failed)} of {len(report.ranges)} ranges were not exported; the others are done and kept, the "
            f"same command tries them again. {_name_some(reasons, '; ')}"
        )
        self.report = report

    @property
    def is_partial(self) -> bool:
        """Whether a run may go on with the exported ranges: there are some, and no cause needs a person first."""
        asks = any(isinstance(each.error, BulkDeletionError) for each in self.report.failed)
        return len(self.report.failed) < len(self.report.ranges) and not (asks or self.report.found_no_server)


def _name_some(names: Iterable[str], separator: str = ", ") -> str:
    known = list(names)
    rest = len(known) - _MAX_NAMED
    return separator.join(known[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class ExportOptions:
    """How an export is done.

    Attributes:
        mode: `all` compares every range; `append` reads only song_ids above the highest exported one, and ranges
            without a snapshot.
        kept: ranges that get a snapshot even if they hold no song: an empty snapshot records that all were deleted.
        guard: refuses the export if songs are missing in bulk; None: missing songs count as deleted.
        n_readers: ranges read in parallel.
        full_compare_hours: hours after which an export of `all` compares every song, whatever the updated_at column
            says; 0: always.
    """

    mode: ExportMode = "all"
    kept: Collection[SongIdRange] = ()
    guard: Absence | None = None
    n_readers: int = N_READERS
    full_compare_hours: float = FULL_COMPARE_HOURS


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


def cache_songs_to_parquet(
    database: Database,
    source: SongsSource,
    snapshots: Snapshots,
    tiling: Tiling,
    options: ExportOptions = _DEFAULT_OPTIONS,
    run: RunContext = SILENT,
) -> ExportReport:
    """Bring the snapshots to the state of the source table.

    Args:
        database: of the source.
        source: which table and columns.
        snapshots: to update.
        tiling: how song_ids are divided into ranges.
        options: how to export.
        run: receives the number of songs exported so far, and may stop the export; finished ranges are kept.

    Raises:
        BulkDeletionError: too many songs are missing; nothing was changed.
        IncompleteExportError: some ranges could not be read; all others are exported. After three ranges in a row
            without a connection, the rest are not tried.
        DatabaseError: the songs could not be counted.
        SettingsError: the open tail holds more songs than a range may, or songs have ids below the first range.
        SourceError: most songs have ids that no range can hold.
    """
    started, report, is_append = time.time(), ExportReport(), options.mode == "append"
    counts = count_ranges(database, source, tiling)
    check_ids(database, source, tiling, counts)
    # an append deletes no song of a snapshot made with these settings
    if options.guard and not is_append:
        options.guard.find(database, source, snapshots, counts, run)
        options.guard.check(source)
    snapshots.storage.delete_leftovers("")
    snapshots.delete_other_ranges(tiling)
    known, looks = set(snapshots.ranges()), Looks.read(snapshots.storage, source)
    is_full = not 0 <= started - looks.full_compare_at < options.full_compare_hours * 3600
    exporter = _Exporter(source, snapshots, counts, options)
    if is_append:
        above = exporter.above = snapshots.find_max_song_id()
        # before the others: if a later range were written and this one not, the next append would begin above its songs
        first = [each for each in sorted(counts) if exporter.is_split(each)]
        others = [each for each in sorted(counts) if each not in known or above is None or each.start > above]
    else:
        report.unreachable.update(count_unreachable_ids(database, source))
        exporter.newest = {} if is_full else looks.newest
        first, others = [], sorted({*counts, *known, *options.kept})
    _export_ranges(database, exporter, [first, others], report, run)
    if source.updated_at and not is_append:
        # a full compare that failed somewhere is still due
        compared_at = started if is_full and not report.failed else looks.full_compare_at
        seen = Looks(source.identity, compared_at, exporter.describe_looks(report, looks))
        if seen != looks:
            snapshots.storage.put(_LOOKS, msgspec.json.encode(seen))
    if report.failed:
        raise IncompleteExportError(report) from report.failed[0].error
    return report


def _export_ranges(
    database: Database, exporter: "_Exporter", groups: list[list[SongIdRange]], report: ExportReport, run: RunContext
) -> None:
    """Export groups of ranges in order; a failure ends it after its group, a lost server at once."""
    wanted = [each for group in groups for each in group]
    total = sum(exporter.count(each).n_songs for each in wanted)
    with Readers(database, exporter.options.n_readers) as readers:
        for group in groups:
            for exported in readers.map(exporter.export, group, run):
                report.ranges.append(exported)
                note = f"not exported: {_name_some(each.range.key for each in report.failed)}" if report.failed else ""
                run.report(Progress("export songs", report.n_songs, total, note=note))
                if report.found_no_server:
                    break
            if report.failed:
                break
    if report.failed:
        error = report.failed[-1].error
        report.ranges.extend(RangeExport(each, error=error) for each in wanted[len(report.ranges) :])


@dataclass
class _Exporter:
    """Exports ranges of one source; its methods may be called from any thread.

    Attributes:
        source: which table and columns.
        snapshots: which it writes.
        counts: of the source, by range.
        options: of the export.
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

    def describe_looks(self, report: ExportReport, before: Looks) -> dict[str, tuple[str, str]]:
        """`Looks.newest` after this export; ranges that failed keep their earlier entry."""
        newest = {}
        for each in report.ranges:
            key, digest, at = each.range.key, each.footer.digest, self.count(each.range).newest
            if each.error and key in before.newest:
                newest[key] = before.newest[key]
            elif digest and at:
                newest[key] = (digest, at)
        return newest

    def export(self, reader: Reader, song_range: SongIdRange) -> RangeExport:
        """Bring one range's snapshot to the state of its songs; the result has the error if that fails."""
        footer = self.snapshots.footer(song_range)
        if song_range not in self.counts and song_range not in self.options.kept:
            self.snapshots.delete(song_range)
            return RangeExport(song_range, changes=Changes(n_deleted=footer.n_songs), written=True)
        try:
            before = self.snapshots.try_to_read(song_range, ["song_id", "source_hash"])
            if before is not None and footer.text == self.source.spec.identity:
                after, newer = reader.read(partial(self._read_newer, song_range=song_range, before=before))
                if not newer.num_rows and len(after) == len(before):
                    return RangeExport(song_range, footer)
                try:
                    return self._write(song_range, self.snapshots.merge(song_range, newer, after), before)
                except (pa.ArrowException, OSError):  # damaged: as if there were none
                    before = None
            # there is no snapshot, or it was made with other settings, which may have rejected other songs
            songs = reader.read(lambda connection: read_songs_from_postgres(connection, self.source, song_range))
            return self._write(song_range, _to_snapshot(songs, self.source), before)
        except (DatabaseError, SourceError) as error:
            return RangeExport(song_range, error=error)

    def _read_newer(
        self, connection: adbc.Connection, song_range: SongIdRange, before: pl.DataFrame
    ) -> tuple[pl.Series, pa.Table]:
        """The song_ids that the range has now, and the changed rows, in one database snapshot."""
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for condition in self._conditions(song_range):
            seen = pl.DataFrame(_select(connection, self.source.select(HASHES, song_range, condition)))
            _check_unique(seen["song_id"], self.source)
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
        return after, _to_snapshot(songs.filter(pc.is_in(songs["song_id"], changed.to_arrow())), self.source)

    def _conditions(self, song_range: SongIdRange) -> list[str]:
        """Conditions on the rows to look at, to be tried in order until one covers all changes."""
        if self.above is not None and self.is_split(song_range):
            return [self.source.above(self.above)]
        digest, newest = self.newest.get(song_range.key, ("", ""))
        if digest and digest == self.snapshots.footer(song_range).digest:
            return [self.source.updated_since(newest), ""]
        return [""]

    def _write(self, song_range: SongIdRange, songs: pa.Table, before: pl.DataFrame | None) -> RangeExport:
        footer = Footer.of(songs, self.source.spec.identity)
        changes = NO_CHANGES
        if self.snapshots.footer(song_range).digest != footer.digest:
            if self.options.guard:
                is_embeddable = pc.is_null(songs["rejected"])
                self.options.guard.check_range(song_range, pl.Series(songs["song_id"].filter(is_embeddable)))
            changes = count_changes(before, pl.DataFrame(songs.select(["song_id", "source_hash"])))
        self.snapshots.write(song_range, songs, footer)
        return RangeExport(song_range, footer, changes, written=True)


def read_songs_from_postgres(
    connection: adbc.Connection, source: SongsSource, song_range: SongIdRange, condition: str = ""
) -> pa.Table:
    """Read a range's songs as Arrow, ordered by song_id.

    Args:
        connection: of ADBC.
        source: which table and columns.
        song_range: song_ids to read.
        condition: limits the rows; made by a method of SongsSource.

    Returns:
        Columns song_id (int32), name, artist, lyrics, source_hash; if some texts cannot be decoded, also undecodable:
        the reason, or null.
    """
    try:
        songs = _select(connection, source.select(SONGS, song_range, condition))
        # the server does not check texts that need no conversion to UTF-8. 10 ms per 50,000 songs
        songs.validate(full=True)
    except adbc.Error as error:
        if not (error.sqlstate or "").startswith(_UNDECODABLE):
            raise
        connection.rollback()
    except pa.ArrowInvalid:
        pass
    else:
        return songs
    return _decode(_select(connection, source.select(SONGS_AS_BYTES, song_range, condition)), source)


def _select(connection: adbc.Connection, statement: str) -> pa.Table:
    with connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
        cursor.execute(statement)
        return cursor.fetch_arrow_table()


def _decode(songs: pa.Table, source: SongsSource) -> pa.Table:
    """Decode texts one by one; what is invalid in the database's encoding gets a reason and replacement characters."""
    reasons: list[str | None] = [None] * songs.num_rows
    for column, name in enumerate(("name", "artist", "lyrics"), start=1):
        texts: list[str | None] = []
        for row, value in enumerate(songs[name].to_pylist()):
            try:
                texts.append(None if value is None else value.decode(source.codec))
            except UnicodeDecodeError:
                texts.append(value.decode(source.codec, "replace"))
                reasons[row] = reasons[row] or f"the song's {name} is not valid {source.codec.upper()}"
        songs = songs.set_column(column, name, pa.array(texts, pa.string()))
    return songs.append_column("undecodable", pa.array(reasons, pa.string()))


def _to_snapshot(songs: pa.Table, source: SongsSource) -> pa.Table:
    """Check a range's rows, give the songs that cannot be embedded a reason, and hash the texts of the others."""
    _check_unique(pl.Series(songs["song_id"]), source)
    reasons = [pl.Series(songs["undecodable"])] if "undecodable" in songs.column_names else []
    for column in ("name", "artist", "lyrics"):
        # only required columns are read: lyrics, most of a song's bytes, are required only if nothing else is embedded
        if column in source.spec.required:
            is_blank = pl.Series(songs[column]).fill_null("").str.strip_chars() == ""
            reasons.append(pl.select(pl.when(is_blank).then(pl.lit(f"the song has no {column}"))).to_series())
    # from a list: polars leaves bytes under its nulls, which the digest would include
    rejected = pa.array(pl.select(pl.coalesce(reasons)).to_series().to_list(), pa.string())
    return add_text_hashes(songs.append_column("rejected", rejected), source.spec)


def _check_unique(song_ids: pl.Series, source: SongsSource) -> None:
    repeated = song_ids.filter(song_ids.diff() == 0)
    if len(repeated):
        raise SourceError(
            f"column {source.song_id_column!r} of {source.table} must be unique, {repeated[0]} is there more than "
            "once: name another column with SONGVEC_SONG_ID_COLUMN",
            "source.id-column",
        )
