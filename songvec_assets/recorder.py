"""What a step leaves when it ends, besides its work: totals of all runs in the database, and the file of metrics.

When to add here: something else that each step leaves. Keep out: which counts there are (`totals`), and what metrics
are made of them (`metrics`).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from songvec_assets import totals
from songvec_assets.searches import Searches
from songvec_assets.vectors.swap import LoadReport

if TYPE_CHECKING:  # prometheus_client, which a run needs only if it writes the file; the cache's readers
    from songvec_assets.cache.plan import FillReport
    from songvec_assets.metrics import StateCollector

Report = TypeVar("Report")


class Recorder:
    """Records what the steps of a run do."""

    def __init__(self, songs: Searches) -> None:
        self._songs = songs
        self._state: StateCollector | None = None

    def count(self, fills: "Iterable[FillReport]") -> None:
        """Count what fills of ranges sent, complete or not."""
        for each in fills:
            counts = {
                "embedded_songs": each.n_embedded,
                "embedded_tokens": each.n_tokens,
                "provider_retries": each.n_retries,
                "provider_rate_limited": each.n_limited,
            }
            if any(counts.values()):
                totals.add(self._songs.database, counts)
                self._write(at_once=False)

    def succeed(self, report: Report) -> Report:
        """Record what a step did; returns its report. If it did nothing, nothing is written but the file."""
        if isinstance(report, LoadReport):
            n_written, n_deleted = (sum(getattr(each, n) for each in report.loads) for n in ("n_written", "n_deleted"))
            totals.add(self._songs.database, {"rows_written": n_written, "rows_deleted": n_deleted})
        self._write(at_once=True)
        return report

    def _write(self, at_once: bool) -> None:
        if path := self._songs.settings.metrics_textfile:
            from songvec_assets.metrics import StateCollector

            self._state = self._state or StateCollector(self._songs)
            self._state.write(path, at_once)
