"""An export that failed in part says so, and whether a run may go on."""

from songvec_assets.errors import BulkDeletionError, DatabaseError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.reports import ExportReport, IncompleteExportError, RangeExport

FIRST, SECOND = SongIdRange(0, 100), SongIdRange(100, 200)


def test_a_run_does_not_go_on_where_all_failed_or_a_person_is_to_confirm() -> None:
    failed, done = RangeExport(FIRST, error=DatabaseError("no")), RangeExport(SECOND)
    asks = RangeExport(FIRST, error=BulkDeletionError("so many?"))
    assert IncompleteExportError(ExportReport([failed, done])).is_partial
    assert not IncompleteExportError(ExportReport([failed])).is_partial
    assert not IncompleteExportError(ExportReport([asks, done])).is_partial
