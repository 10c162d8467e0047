"""Postgres to Parquet: each range's songs are read, some ranges side by side, and written where their content changed.

What a snapshot file is, `snapshots.py` says. Memory is bounded by the ranges being read.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import polars as pl
import pyarrow as pa

from songvec_assets.errors import BulkDeletionError, DatabaseError, SongvecError, SourceError
from songvec_assets.files import replace_atomically
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress, ReportProgress, StopSignal, ignore_progress
from songvec_assets.songs.absence import AbsenceGuard
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.readers import Reader, Readers, is_server_gone
from songvec_assets.songs.snapshots import (
    SNAPSHOT_SCHEMA,
    Footer,
    compare_snapshot,
    count_songs,
    count_text_sizes,
    digest_songs,
    get_max_cached_song_id,
    merge_songs,
    read_footer,
    remove_foreign_cuts,
    snapshot_path,
    snapshot_ranges,
    write_snapshot,
)
from songvec_assets.songs.source import (
    IdSums,
    RangeCount,
    SongsSource,
    check_ids,
    count_ranges,
    count_unreachable_ids,
)

ExportMode = Literal["all", "append"]

N_READERS = 2
"""Connections that read side by side: one leaves the server idle while it writes, three take more than 450 MB."""

FULL_COMPARE_HOURS = 24.0

_FULL_COMPARE = "full_compare.json"
_BATCH_BYTES = 4 << 20
# no equivalent in UTF-8; invalid in the database's own encoding: PostgreSQL's appendix of error codes, read 2026-11
_UNDECODABLE = ("22P05", "22021")
_MAX_GONE = 3
_MAX_NAMED = 5


@dataclass(frozen=True)
class RangeExport:
    """What happened to one range's snapshot: counts of songs against the snapshot before.

    Attributes:
        set_aside: reason to number of songs.
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
        set_aside: reason to number of songs, of those with an id that a range can hold.
        unreachable: the same of those with an id that none can hold.
        text_sizes: songs that were read, by size.
    """

    ranges: list[RangeExport] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)
    unreachable: Counter[str] = field(default_factory=Counter)
    text_sizes: Counter[int] = field(default_factory=Counter)

    def add(self, exported: RangeExport) -> None:
        """Add a range."""
        self.ranges.append(exported)
        self.set_aside.update(exported.set_aside)
        self.text_sizes.update(exported.text_sizes)

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

    def __init__(self, report: ExportReport) -> None:
        self.reasons: dict[str, list[str]] = {}
        for each in report.failed:
            self.reasons.setdefault(str(each.error), []).append(each.range.key)
        reasons = (f"{_name_some(ranges)}: {error}" for error, ranges in self.reasons.items())
        super().__init__(
            f"{len(report.failed)} of {len(report.ranges)} ranges were not exported; the others are done and kept, the "
            f"same command again tries them anew. {_name_some(reasons, '; ')}"
        )
        self.report = report

    @property
    def is_partial(self) -> bool:
        """Whether a run may go on with the others: some there are, the database answers, and nobody is to confirm."""
        asks = any(isinstance(each.error, BulkDeletionError) for each in self.report.failed)
        return len(self.report.failed) < len(self.report.ranges) and not (asks or self.report.found_no_server)


def _name_some(names: Iterable[str], separator: str = ", ") -> str:
    known = list(names)
    rest = len(known) - _MAX_NAMED
    return separator.join(known[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def cache_songs_to_parquet(
    database: Database,
    source: SongsSource,
    folder: Path,
    tiling: Tiling,
    mode: ExportMode = "all",
    also: Iterable[SongIdRange] = (),
    progress: ReportProgress = ignore_progress,
    stop: StopSignal | None = None,
    n_readers: int = N_READERS,
    guard: AbsenceGuard | None = None,
    full_compare_hours: float = FULL_COMPARE_HOURS,
) -> ExportReport:
    """Bring the snapshots to the state of the source table.

    Args:
        database: where the songs are.
        source: which table and columns.
        folder: of the snapshot files.
        tiling: how song_ids are cut into ranges.
        mode: `all` compares every range; `append` reads only above the highest song_id already there, and ranges that
            have no snapshot.
        also: ranges that get a snapshot even where they hold no song: an empty one says that their songs are gone.
        progress: told the songs exported so far.
        stop: ends the export; ranges that are done stay.
        n_readers: ranges read side by side.
        guard: refuses songs that are missing in bulk; None: whatever is missing is deleted.
        full_compare_hours: after this time an export of `all` reads every range in full, whatever its updated_at
            column says; 0: each one does.

    Raises:
        BulkDeletionError: too many songs are missing; nothing was touched.
        IncompleteExportError: some ranges could not be read; all others are done. Only where three in a row found no
            server are the rest not tried.
        DatabaseError: the songs could not be counted.
        SettingsError: the open tail holds more songs than a range may, or songs have ids below the first range.
        SourceError: most songs have ids that no range can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    counts = count_ranges(database, source, tiling)
    check_ids(database, source, tiling, counts)
    check_stop = stop.check if stop else lambda: None
    # an append deletes no song that has a snapshot
    if guard and mode == "all":
        guard.check(database, source, folder, counts, check_stop)
    remove_foreign_cuts(folder, tiling)
    report, known = ExportReport(), set(snapshot_ranges(folder))
    is_full = mode == "all" and _owes_full_compare(folder, source, full_compare_hours)
    if mode == "append":
        export = _Export(source, folder, counts, guard, above=get_max_cached_song_id(folder))
        # first and alone: were a later range written and this one not, the next append would begin above its songs
        first = [each for each in sorted(counts) if export.holds_highest(each)]
        others = [each for each in sorted(counts) if export.is_above(each) or each not in known]
    else:
        report.unreachable.update(count_unreachable_ids(database, source))
        export = _Export(source, folder, counts, guard, frozenset(also), reads_in_full=is_full)
        first, others = [], sorted({*counts, *known, *export.kept})
    wanted = [*first, *others]
    total = sum(counts[each].n_songs for each in wanted if each in counts)
    with Readers(database, n_readers) as readers:
        for part in (first, others):
            for exported in readers.map(export.export_range, part, check=check_stop):
                report.add(exported)
                note = f"not exported: {_name_some(each.range.key for each in report.failed)}" if report.failed else ""
                progress(Progress("export songs", report.total("n_songs"), total, note=note))
                if report.found_no_server:
                    break
            if report.failed:
                break
    if report.failed:
        for each in wanted[len(report.ranges) :]:
            report.add(RangeExport(each, error=report.failed[-1].error))
        raise IncompleteExportError(report) from report.failed[0].error
    if is_full and source.updated_at:
        with replace_atomically(folder / _FULL_COMPARE) as file:
            file.write(json.dumps({"source": source.identity, "at": started}).encode())
    return report


def _owes_full_compare(folder: Path, source: SongsSource, hours: float) -> bool:
    """Whether it is time to read every range in full: the newest times hide some changes, for no longer than this."""
    if not source.updated_at:
        return True
    try:
        last = json.loads((folder / _FULL_COMPARE).read_bytes())
        age_s = time.time() - last["at"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return True
    return last["source"] != source.identity or not 0 <= age_s < hours * 3600


def read_songs_from_postgres(
    connection: adbc.Connection,
    source: SongsSource,
    song_range: SongIdRange,
    above: int | None = None,
    updated_since: str | None = None,
) -> pa.Table:
    """Read a range's songs as Arrow, ordered by song_id.

    Args:
        connection: of ADBC.
        source: which table and columns.
        song_range: song_ids to read.
        above: only song_ids above this one.
        updated_since: only rows whose updated_at column is not before this time, or null.

    Returns:
        Columns song_id (int32), name, artist, lyrics; where some cannot be decoded, also undecodable: why, or null.
    """
    lowest = song_range.start if above is None else max(song_range.start, above + 1)

    def select(as_bytes: bool) -> pa.Table:
        with connection.cursor() as cursor:
            cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
            cursor.execute(source.select_statement(lowest, song_range.stop, updated_since, as_bytes))
            return cursor.fetch_arrow_table()

    try:
        songs = select(as_bytes=False)
        # the server converts texts to UTF-8, and checks none that need no conversion. 10 ms for 50,000 songs
        songs.validate(full=True)
        return songs
    except adbc.Error as error:
        if not (error.sqlstate or "").startswith(_UNDECODABLE):
            raise
        connection.rollback()
    except pa.ArrowInvalid:
        pass
    return _decode(select(as_bytes=True), source)


def _decode(songs: pa.Table, source: SongsSource) -> pa.Table:
    """Decode texts one by one; what is no text in the database's encoding is named, and shown as far as it can be."""
    reasons: list[str | None] = [None] * songs.num_rows
    columns = [songs["song_id"]]
    for name in ("name", "artist", "lyrics"):
        texts: list[str | None] = []
        for place, value in enumerate(songs[name].to_pylist()):
            try:
                texts.append(None if value is None else value.decode(source.codec))
            except UnicodeDecodeError:
                texts.append(value.decode(source.codec, "replace"))
                reasons[place] = reasons[place] or f"the song's {name} is not valid {source.codec.upper()}"
        columns.append(pa.array(texts, pa.string()))
    return pa.table([*columns, pa.array(reasons, pa.string())], ["song_id", "name", "artist", "lyrics", "undecodable"])


@dataclass(frozen=True)
class _Export:
    """What all ranges of an export share; its methods may be called from any thread."""

    source: SongsSource
    folder: Path
    counts: dict[SongIdRange, RangeCount]
    guard: AbsenceGuard | None
    kept: frozenset[SongIdRange] = frozenset()
    above: int | None = None
    reads_in_full: bool = False

    def is_above(self, song_range: SongIdRange) -> bool:
        """Whether an append reads the range from its start."""
        return self.above is None or song_range.start > self.above

    def holds_highest(self, song_range: SongIdRange) -> bool:
        """Whether an append reads only a part of the range."""
        return self.above is not None and song_range.start <= self.above < song_range.stop - 1

    def export_range(self, reader: Reader, song_range: SongIdRange) -> RangeExport:
        """Bring one range's snapshot to the state of its songs, or say why not."""
        count = self.counts.get(song_range, RangeCount())
        if not count.n_songs and song_range not in self.kept:
            n_gone = count_songs(self.folder, song_range)
            snapshot_path(self.folder, song_range).unlink()
            return RangeExport(song_range, n_gone=n_gone, written=True)
        try:
            return self._write(song_range, *self._read(reader, song_range, count))
        except (DatabaseError, SourceError) as error:
            return RangeExport(song_range, error=error)

    def _read(self, reader: Reader, song_range: SongIdRange, count: RangeCount) -> tuple[pa.Table, str | None]:
        """The range's rows, and the newest time among those that were looked at."""
        path = snapshot_path(self.folder, song_range)
        before = read_footer(path)
        # a snapshot that is damaged is none
        with contextlib.suppress(pa.ArrowException, OSError):
            if before and self.holds_highest(song_range):
                return merge_songs(path, self._select(reader, song_range, above=self.above)), before.newest
            if before and self._knows_times(before) and not self.reads_in_full:
                songs = merge_songs(path, self._select(reader, song_range, updated_since=before.newest))
                # else songs went, or came with an old time: look at all of them
                if IdSums.of(pl.Series(songs["song_id"])) == count.ids:
                    return songs, count.newest
        return self._select(reader, song_range), count.newest

    def _knows_times(self, before: Footer) -> bool:
        return before.newest is not None and before.source == self.source.identity

    def _select(self, reader: Reader, song_range: SongIdRange, **newer: Any) -> pa.Table:
        return _to_snapshot(
            reader.read(partial(read_songs_from_postgres, source=self.source, song_range=song_range, **newer)),
            self.source,
        )

    def _write(self, song_range: SongIdRange, songs: pa.Table, newest: str | None) -> RangeExport:
        path = snapshot_path(self.folder, song_range)
        before, footer = read_footer(path), Footer(digest_songs(songs), self.source.identity, newest)
        exported = partial(
            RangeExport, song_range, songs.num_rows,
            set_aside=_count_reasons(songs), text_sizes=count_text_sizes(songs),
        )  # fmt: skip
        if before and before.digest == footer.digest and (newest is None or self._knows_times(before)):
            return exported()
        if self.guard and not (before and before.digest == footer.digest):
            embeddable = pl.Series(songs["song_id"]).filter(pl.Series(songs["set_aside"]).is_null())
            self.guard.check_range(song_range, embeddable)
        changes = compare_snapshot(path, songs)
        write_snapshot(path, songs, footer)
        return exported(*changes, written=True)


def _to_snapshot(songs: pa.Table, source: SongsSource) -> pa.Table:
    """Check a range's rows and name what cannot be embedded."""
    song_ids = songs["song_id"].to_numpy()
    twice = song_ids[1:][np.diff(song_ids) == 0]
    if len(twice):
        raise SourceError(
            f"column {source.song_id_column!r} of {source.table} must be unique, {twice[0]} is there more than once: "
            "name another with SONGVEC_SONG_ID_COLUMN"
        )
    # texts stay where they are: lyrics are most of a song, and are looked at only where nothing else is embedded
    reasons = pl.repeat(None, songs.num_rows, dtype=pl.String, eager=True)
    for column in ("lyrics", "artist", "name"):
        if column in source.required:
            blank = pl.Series(songs[column]).fill_null("").str.strip_chars() == ""
            reasons = pl.select(pl.when(blank).then(pl.lit(f"the song has no {column}")).otherwise(reasons)).to_series()
    if "undecodable" in songs.column_names:
        reasons = pl.Series(songs["undecodable"]).zip_with(pl.Series(songs["undecodable"]).is_not_null(), reasons)
    # built anew: polars leaves words under its nulls, and the digest would see them
    return pa.table([*songs.columns[:4], pa.array(reasons.to_list(), pa.string())], schema=SNAPSHOT_SCHEMA)


def _count_reasons(songs: pa.Table) -> Counter[str]:
    return Counter(songs["set_aside"].drop_null().to_pylist())
