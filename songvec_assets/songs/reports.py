"""What an export did, range by range, and the error that says which ranges were not exported.

When to add here: another figure of an export. Keep out: how it is found (`export`).
"""

from collections import Counter
from dataclasses import dataclass, field

from songvec_assets.errors import BulkDeletionError, DatabaseError, SongvecError, describe
from songvec_assets.songs.content import NO_CHANGES, Changes, Footer
from songvec_assets.songs.ranges import SongIdRange, name_some
from songvec_assets.songs.readers import is_server_lost

_MAX_UNREACHED = 3


@dataclass(frozen=True)
class RangeExport:
    """What happened to one range's snapshot.

    Attributes:
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
        self.report = report
        self.reasons: dict[str, list[str]] = {}
        for each in report.failed:
            self.reasons.setdefault(describe(each.error), []).append(each.range.key)
        reasons = [f"{name_some(ranges)}: {error}" for error, ranges in self.reasons.items()]
        super().__init__(
            f"{len(report.failed)} of {len(report.ranges)} ranges were not exported; the others are done and kept, the "
            f"same command tries them again. {name_some(reasons, '; ')}"
        )

    @property
    def is_partial(self) -> bool:
        """Whether a run may go on with the exported ranges: there are some, and no cause needs a person first."""
        asks = any(isinstance(each.error, BulkDeletionError) for each in self.report.failed)
        return len(self.report.failed) < len(self.report.ranges) and not (asks or self.report.found_no_server)
