"""Progress in words: how far, how fast, how long still."""

import time
from dataclasses import dataclass

from songvec_assets.progress import Progress, describe_seconds


class Pace:
    """Units per second of each step since its work began; a step that starts again with less done, or in
    another unit, is measured again.

    Units that took no work (`Progress.n_free`) do not count, nor does the time before the first one that took some.
    """

    def __init__(self) -> None:
        self._starts: dict[str, _Start] = {}

    def rate(self, progress: Progress) -> float:
        """The rate so far; 0 at the start."""
        now = time.monotonic()
        worked = progress.done - progress.n_free
        start = self._starts.setdefault(progress.step, _Start(now, worked, progress))
        only_skipped = worked == start.n_worked and progress.n_free > start.latest.n_free
        another_phase = progress.unit != start.latest.unit
        if progress.done < start.latest.done or only_skipped or another_phase:
            start.at, start.n_worked = now, worked
        start.latest = progress
        return (worked - start.n_worked) / (now - start.at) if now > start.at else 0.0


@dataclass
class _Start:
    """When a step's work began, how many units were worked on by then, and the latest report."""

    at: float
    n_worked: int
    latest: Progress


def describe_time_left(progress: Progress, rate: float) -> str:
    """`12 min left`; empty where the rate or the total is not known, or nothing is left."""
    if not rate or progress.total <= progress.done:
        return ""
    return f"{describe_seconds((progress.total - progress.done) / rate)} left"


def describe_progress(progress: Progress, rate: float) -> str:
    """One line: done, total, rate, time left.

    Args:
        progress: as the core told it.
        rate: units a second.
    """
    percent = progress.unit == "%"
    line = f"{progress.step}: {progress.done:,}" + ("%" if percent else "")
    if progress.total and not percent:
        line += f" of {progress.total:,} {progress.unit}"
    elif not percent:
        line += f" {progress.unit}"
    if rate and not percent:
        line += f", {rate:,.0f}/s"
    if left := describe_time_left(progress, rate):
        line += f", {left}"
    return line + (f" ({progress.note})" if progress.note else "")
