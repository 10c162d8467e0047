"""Postgres to Parquet: songs that changed are found by their hashes, read, and written to the snapshot of their range.

A range costs a scan at the server that sends an id and a hash per song, or only of rows that were updated lately; texts
are sent of changed songs only. Some ranges are read at once; memory is bounded by these. What a snapshot is:
`snapshots`. When to add here: another way to find what changed. Keep out: what is SQL (`source`).
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import adbc_driver_postgresql.dbapi as adbc
import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from songvec_assets.errors import BulkDeletionError, DatabaseError, SongvecError, SourceError, StoreError, describe
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, RunContext
from songvec_assets.songs.absence import AbsenceGuard
from songvec_assets.songs.counts import IdSums, RangeCount, check_ids, count_ranges, count_unreachable_ids
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.readers import Reader, Readers, is_server_gone
from songvec_assets.songs.snapshots import (
    FILE_SCHEMA,
    SNAPSHOT_SCHEMA,
    Changes,
    Footer,
    Snapshots,
    add_text_hashes,
    count_changes,
    hash_content,
)
from songvec_assets.songs.source import SongsSource
from songvec_assets.storage import Storage

ExportMode = Literal["all", "append"]

N_READERS = 2
"""Connections that read at once: one leaves the server idle while it writes, three take more than 450 MB."""

FULL_COMPARE_HOURS = 24.0

_LOOKS = "looks.json"
_BATCH_BYTES = 4 << 20
# no equivalent in UTF-8; invalid in the database's own encoding: PostgreSQL's appendix of error codes, read 2026-11
_UNDECODABLE = ("22P05", "22021")
_MOST_NAMED_SHARE = 0.25
"""If a larger share of a range's songs changed, the range is read as a whole."""
_MAX_GONE = 3
_MAX_NAMED = 5


@dataclass(frozen=True)
class RangeExport:
    """What happened to one range's snapshot: numbers of songs compared with the snapshot before.

    Attributes:
        set_aside: number of rejected songs by reason.
        text_sizes: songs by size, see `count_text_sizes`.
        written: whether the file was.
        error: why the range was not exported, if it was not: its snapshot is as it was before.
    """

    range: SongIdRange
    n_songs: int = 0
    n_new: int = 0
    n_changed: int = 0
    n_gone: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    text_sizes: Counter[int] = field(default_factory=Counter, compare=False, repr=False)
    written: bool = False
    error: SongvecError | None = None

    @property
    def n_set_aside(self) -> int:
        """Songs that cannot be embedded."""
        return self.set_aside.total()


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        ranges: every range that holds songs now or did before.
        unreachable: number of songs with an id that no range can hold, by reason.
    """

    ranges: list[RangeExport] = field(default_factory=list)
    unreachable: Counter[str] = field(default_factory=Counter)

    @property
    def set_aside(self) -> Counter[str]:
        """Number of rejected songs by reason, of those with an id that a range can hold."""
        return sum((each.set_aside for each in self.ranges), Counter())

    @property
    def text_sizes(self) -> Counter[int]:
        """Songs of the snapshots, by size."""
        return sum((each.text_sizes for each in self.ranges), Counter())

    def total(self, name: str) -> int:
        """The sum of a count over all ranges."""
        return sum(getattr(each, name) for each in self.ranges)

    @property
    def failed(self) -> list[RangeExport]:
        """The ranges that were not exported."""
        return [each for each in self.ranges if each.error]

    @property
    def found_no_server(self) -> bool:
        """Whether the last ranges failed, one after the other, for want of a connection."""
        last = self.ranges[-_MAX_GONE:]
        return len(last) == _MAX_GONE and all(each.error and is_server_gone(each.error.__cause__) for each in last)


class IncompleteExportError(DatabaseError):
    """Some ranges were not exported; the others were.

    Attributes:
        report: of all ranges.
        reasons: keys of the ranges that failed, by the reason.
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
        """Whether a run may go on with the others: there are some, the database answers, and nobody is to confirm."""
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
        mode: `all` compares every range; `append` reads only above the highest song_id already there, and ranges that
            have no snapshot.
        kept: ranges that get a snapshot even if they hold no song: an empty one says that their songs were deleted.
        guard: refuses songs that are missing in bulk; None: whatever is missing is deleted.
        n_readers: ranges read at once.
        full_compare_hours: after this time an export of `all` compares every song, whatever its updated_at column says;
            0: each one does.
    """

    mode: ExportMode = "all"
    kept: Collection[SongIdRange] = ()
    guard: AbsenceGuard | None = None
    n_readers: int = N_READERS
    full_compare_hours: float = FULL_COMPARE_HOURS


_DEFAULT_OPTIONS = ExportOptions()


class Looks(msgspec.Struct, frozen=True):
    """What earlier exports looked at: from there on, one by updated_at reads.

    Attributes:
        source: identity of the table and columns.
        full_compare_at: when every song was compared last, seconds since the epoch.
        newest: by range key, the digest of the snapshot as it was left, and the latest updated_at that was looked at,
            as text. It holds for that snapshot only: another one may lack what was seen before.
    """

    source: str
    full_compare_at: float = 0.0
    newest: dict[str, tuple[str, str]] = {}

    @classmethod
    def read(cls, storage: Storage, source: SongsSource) -> "Looks":
        """What is known of a source; nothing, if it is another one or cannot be read: then all songs are compared."""
        try:
            stored = storage.read(_LOOKS)
            found = msgspec.json.decode(stored.content if stored else b"", type=cls)
        except msgspec.DecodeError:
            return cls(source.identity)
        return found if found.source == source.identity else cls(source.identity)

    def write(self, storage: Storage) -> None:
        """Keep it with the snapshots."""
        storage.put(_LOOKS, msgspec.json.encode(self))


def cache_songs_to_parquet(
    database: Database,
    source: SongsSource,
    snapshots: Snapshots,
    tiling: Tiling,
    options: ExportOptions = _DEFAULT_OPTIONS,
    run: RunContext | None = None,
) -> ExportReport:
    """Bring the snapshots to the state of the source table.

    Args:
        database: where the songs are.
        source: which table and columns.
        snapshots: which are brought to that state.
        tiling: how song_ids are divided into ranges.
        options: see there.
        run: receives the number of songs exported so far, and ends the export; ranges that are done stay.

    Raises:
        BulkDeletionError: too many songs are missing; nothing was touched.
        IncompleteExportError: some ranges could not be read; all others are done. Only if three in a row found no
            server, the rest are not tried.
        DatabaseError: the songs could not be counted.
        SettingsError: the open tail holds more songs than a range may, or songs have ids below the first range.
        SourceError: most songs have ids that no range can hold.
    """
    run = run or RunContext()
    started, report, is_append = time.time(), ExportReport(), options.mode == "append"
    counts = count_ranges(database, source, tiling)
    check_ids(database, source, tiling, counts)
    # an append deletes no song that has a snapshot
    guard = options.guard
    if guard and not guard.confirmed and not is_append:
        guard.check(guard.find(database, source, snapshots, counts, run.check_stop), source)
    snapshots.storage.delete_leftovers("")
    snapshots.delete_other_ranges(tiling)
    known, looks = set(snapshots.ranges()), Looks.read(snapshots.storage, source)
    is_full = not 0 <= started - looks.full_compare_at < options.full_compare_hours * 3600
    if is_append:
        exporter = RangeExporter(source, snapshots, counts, options, above=snapshots.find_max_song_id())
        # first and alone: were a later range written and this one not, the next append would begin above its songs
        first = [each for each in sorted(counts) if exporter.is_split(each)]
        others = [each for each in sorted(counts) if exporter.is_above(each) or each not in known]
    else:
        report.unreachable.update(count_unreachable_ids(database, source))
        exporter = RangeExporter(source, snapshots, counts, options, {} if is_full else looks.newest)
        first, others = [], sorted({*counts, *known, *options.kept})
    _export_ranges(database, exporter, [first, others], report, run)
    if source.updated_at and not is_append:
        # a full compare that failed somewhere is still due
        compared_at = started if is_full and not report.failed else looks.full_compare_at
        seen = Looks(source.identity, compared_at, exporter.describe_looks(report, looks))
        if seen != looks:
            seen.write(snapshots.storage)
    if report.failed:
        raise IncompleteExportError(report) from report.failed[0].error
    return report


def _export_ranges(
    database: Database,
    exporter: "RangeExporter",
    parts: list[list[SongIdRange]],
    report: ExportReport,
    run: RunContext,
) -> None:
    """Export some ranges, part after part; after a failure no further part, and without a server no further range."""
    wanted = [each for part in parts for each in part]
    total = sum(exporter.count(each).n_songs for each in wanted)
    with Readers(database, exporter.options.n_readers) as readers:
        for part in parts:
            for exported in readers.map(exporter.export, part, check=run.check_stop):
                report.ranges.append(exported)
                note = f"not exported: {_name_some(each.range.key for each in report.failed)}" if report.failed else ""
                run.report(Progress("export songs", report.total("n_songs"), total, note=note))
                if report.found_no_server:
                    break
            if report.failed:
                break
    if report.failed:
        error = report.failed[-1].error
        report.ranges.extend(RangeExport(each, error=error) for each in wanted[len(report.ranges) :])


@dataclass(frozen=True)
class RangeExporter:
    """Exports ranges of one source; its methods may be called from any thread.

    Attributes:
        source: which table and columns.
        snapshots: which it writes.
        counts: of the source, by range.
        options: of the export.
        newest: see `Looks`; empty: every song is compared.
        above: the highest song_id of all snapshots, if the export appends.
    """

    source: SongsSource
    snapshots: Snapshots
    counts: Mapping[SongIdRange, RangeCount]
    options: ExportOptions
    newest: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    above: int | None = None

    def is_above(self, song_range: SongIdRange) -> bool:
        """Whether an append reads the range from its start."""
        return self.above is None or song_range.start > self.above

    def is_split(self, song_range: SongIdRange) -> bool:
        """Whether an append reads only the upper part of the range."""
        return self.above is not None and song_range.start <= self.above < song_range.stop - 1

    def count(self, song_range: SongIdRange) -> RangeCount:
        """What the source holds in a range."""
        return self.counts.get(song_range, RangeCount())

    def describe_looks(self, report: ExportReport, before: Looks) -> dict[str, tuple[str, str]]:
        """What `Looks` keeps of these ranges; those that failed stay as they were."""
        newest = {}
        for song_range, failed in ((each.range, bool(each.error)) for each in report.ranges):
            digest, at = self.snapshots.digest(song_range), self.count(song_range).newest
            if failed and song_range.key in before.newest:
                newest[song_range.key] = before.newest[song_range.key]
            elif not failed and digest and at:
                newest[song_range.key] = (digest, at)
        return newest

    def export(self, reader: Reader, song_range: SongIdRange) -> RangeExport:
        """Bring one range's snapshot to the state of its songs, or say why not."""
        if song_range not in self.counts and song_range not in self.options.kept:
            n_gone = self.snapshots.count(song_range)
            self.snapshots.delete(song_range)
            return RangeExport(song_range, n_gone=n_gone, written=True)
        try:
            before = self.snapshots.read_source_hashes(song_range, self.source.spec)
            after, newer = reader.read(lambda connection: self._read(connection, song_range, before))
            footer = self.snapshots.footer(song_range)
            if before is None or footer is None:
                return self._write(song_range, newer, Changes(newer.num_rows, 0, 0))
            is_whole = footer.text == self.source.spec.identity
            # an append renders no songs that it does not read
            if not newer.num_rows and len(after) == len(before) and (is_whole or self.is_split(song_range)):
                return RangeExport(song_range, footer.n_songs, set_aside=footer.set_aside, text_sizes=footer.text_sizes)
            try:
                songs = self.snapshots.merge(song_range, newer, after["song_id"].to_numpy())
                changes = self._count_changes(song_range, before, songs, is_whole)
            except (pa.ArrowException, OSError, StoreError):  # damaged: as if there were none
                _, songs = reader.read(lambda connection: self._read(connection, song_range, None))
                changes = Changes(songs.num_rows, 0, 0)
            return self._write(song_range, songs, changes, is_whole or not self.is_split(song_range))
        except (DatabaseError, SourceError) as error:
            return RangeExport(song_range, error=error)

    def _read(
        self, connection: adbc.Connection, song_range: SongIdRange, before: pl.DataFrame | None
    ) -> tuple[pl.DataFrame, pa.Table]:
        """The song_ids that the range has now, and the rows that differ from before, as of one moment."""
        if before is None:
            songs = read_songs_from_postgres(connection, self.source, song_range)
            return pl.DataFrame(songs.select(["song_id"])), _to_snapshot(songs, self.source)
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for condition in self._conditions(song_range, before):
            seen = _read_hashes(connection, self.source, song_range, condition)
            after = seen.select("song_id")
            if condition:
                after = pl.concat([before.select("song_id"), after]).unique().sort("song_id")
            # else songs were deleted, or came with an old time: look at all of them
            if self.is_split(song_range) or IdSums.of(after["song_id"]) == self.count(song_range).ids:
                break
        changed = seen.join(before, on=["song_id", "source_hash"], how="anti")["song_id"]
        if changed.is_empty():
            return after, FILE_SCHEMA.empty_table()
        if len(changed) <= _MOST_NAMED_SHARE * len(after):
            condition = self.source.among(changed)
        songs = read_songs_from_postgres(connection, self.source, song_range, condition)
        return after, _to_snapshot(songs.filter(pc.is_in(songs["song_id"], changed.to_arrow())), self.source)

    def _conditions(self, song_range: SongIdRange, before: pl.DataFrame) -> list[str]:
        """Which rows to look at; the next one if the rows of one are not all that changed."""
        if self.above is not None and self.is_split(song_range):
            return [self.source.above(self.above)]
        digest, newest = self.newest.get(song_range.key, (None, ""))
        is_hashed = not before["source_hash"].null_count()
        if is_hashed and digest == self.snapshots.digest(song_range):
            return [self.source.updated_since(newest), ""]
        return [""]

    def _count_changes(self, song_range: SongIdRange, before: pl.DataFrame, songs: pa.Table, is_whole: bool) -> Changes:
        if is_whole:
            return count_changes(before, pl.DataFrame(songs.select(["song_id", "source_hash"])))
        after = pl.DataFrame(songs.select(SNAPSHOT_SCHEMA.names))
        contents = (self.snapshots.read(song_range), after)
        return count_changes(*map(hash_content, contents))

    def _write(self, song_range: SongIdRange, songs: pa.Table, changes: Changes, is_whole: bool = True) -> RangeExport:
        footer = Footer.of(songs, self.source.spec.identity if is_whole else "")
        if self.snapshots.digest(song_range) == footer.digest:
            changes = Changes(0, 0, 0)
        elif self.options.guard:
            accepted = pl.Series(songs["song_id"]).filter(pl.Series(songs["set_aside"]).is_null())
            self.options.guard.check_range(song_range, accepted)
        self.snapshots.write(song_range, songs, footer)
        counts = footer.n_songs, *changes
        return RangeExport(song_range, *counts, footer.set_aside, footer.text_sizes, written=True)


def read_songs_from_postgres(
    connection: adbc.Connection, source: SongsSource, song_range: SongIdRange, condition: str = ""
) -> pa.Table:
    """Read a range's songs as Arrow, ordered by song_id.

    Args:
        connection: of ADBC.
        source: which table and columns.
        song_range: song_ids to read.
        condition: of SongsSource: only rows that it holds for.

    Returns:
        Columns song_id (int32), name, artist, lyrics, source_hash; if some cannot be decoded, also undecodable: why, or
        null.
    """
    rows = source.rows(song_range, condition)
    try:
        songs = _select(connection, source.select_songs(rows))
        # the server converts texts to UTF-8, and checks none that need no conversion. 10 ms for 50,000 songs
        songs.validate(full=True)
    except adbc.Error as error:
        if not (error.sqlstate or "").startswith(_UNDECODABLE):
            raise
        connection.rollback()
    except pa.ArrowInvalid:
        pass
    else:
        return songs
    return _decode(_select(connection, source.select_songs(rows, as_bytes=True)), source)


def _read_hashes(
    connection: adbc.Connection, source: SongsSource, song_range: SongIdRange, condition: str
) -> pl.DataFrame:
    seen = _select(connection, source.select_hashes(source.rows(song_range, condition)))
    _check_unique(seen, source)
    return pl.DataFrame(seen)


def _select(connection: adbc.Connection, statement: str) -> pa.Table:
    with connection.cursor() as cursor:
        cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
        cursor.execute(statement)
        return cursor.fetch_arrow_table()


def _decode(songs: pa.Table, source: SongsSource) -> pa.Table:
    """Decode texts one by one; what is no text in the database's encoding is named, and shown as far as it can be."""
    reasons: list[str | None] = [None] * songs.num_rows
    for place, name in enumerate(("name", "artist", "lyrics"), start=1):
        texts: list[str | None] = []
        for row, value in enumerate(songs[name].to_pylist()):
            try:
                texts.append(None if value is None else value.decode(source.codec))
            except UnicodeDecodeError:
                texts.append(value.decode(source.codec, "replace"))
                reasons[row] = reasons[row] or f"the song's {name} is not valid {source.codec.upper()}"
        songs = songs.set_column(place, name, pa.array(texts, pa.string()))
    return songs.append_column("undecodable", pa.array(reasons, pa.string()))


def _to_snapshot(songs: pa.Table, source: SongsSource) -> pa.Table:
    """Check a range's rows, name what cannot be embedded, and hash the texts of the others."""
    _check_unique(songs, source)
    # texts stay where they are: lyrics are most of a song, and are looked at only if nothing else is embedded
    reasons = pl.repeat(None, songs.num_rows, dtype=pl.String, eager=True)
    for column in ("lyrics", "artist", "name"):
        if column in source.spec.required:
            blank = pl.Series(songs[column]).fill_null("").str.strip_chars() == ""
            reasons = pl.select(pl.when(blank).then(pl.lit(f"the song has no {column}")).otherwise(reasons)).to_series()
    if "undecodable" in songs.column_names:
        reasons = pl.Series(songs["undecodable"]).zip_with(pl.Series(songs["undecodable"]).is_not_null(), reasons)
    # from a list: polars leaves words under its nulls, and the digest would see them
    set_aside = pa.array(reasons.to_list(), pa.string())
    return add_text_hashes(songs.append_column("set_aside", set_aside), source.spec)


def _check_unique(songs: pa.Table, source: SongsSource) -> None:
    song_ids = songs["song_id"].to_numpy()
    twice = song_ids[1:][np.diff(song_ids) == 0]
    if len(twice):
        raise SourceError(
            f"column {source.song_id_column!r} of {source.table} must be unique, {twice[0]} is there more than once: "
            "name another with SONGVEC_SONG_ID_COLUMN",
            "source.id-column",
        )
