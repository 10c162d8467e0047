"""Progress in words: how far, how fast, how long still."""

import time

from songvec_assets.progress import Progress, describe_seconds


class Pace:
    """Units a second of each step, since it began; a step that begins again with less done begins anew."""

    def __init__(self) -> None:
        self._starts: dict[str, tuple[float, int, int]] = {}

    def rate(self, progress: Progress) -> float:
        """The pace so far; 0 at the start."""
        now = time.monotonic()
        started, first, before = self._starts.get(progress.step, (now, progress.done, progress.done))
        if progress.done < before:
            started, first = now, progress.done
        self._starts[progress.step] = (started, first, progress.done)
        return (progress.done - first) / (now - started) if now > started else 0.0


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
    if rate and progress.total > progress.done:
        line += f", {describe_seconds((progress.total - progress.done) / rate)} left"
    return line + (f" ({progress.note})" if progress.note else "")
