"""What `songvec` prints: tables, progress as bars or plain lines, and the last line of a run that was done in part.

When to add here: another table, or another way to show progress. Keep out: what the figures are, and when to print.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import astuple
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from songvec_assets.cli.run import RunResult
from songvec_assets.defs.pace import Pace, describe_progress, describe_time_left
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.progress import Progress, describe_seconds
from songvec_assets.search.nearest import Hit
from songvec_assets.status import Status

_MOST_REASONS, _MOST_KEYS = 2, 3


def run_table(result: RunResult) -> Table:
    """A row an asset."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("Asset", no_wrap=True, min_width=21)
    for name in ("Rows", "Seconds", "Tokens", "Cost", "Skipped", "New", "Changed"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(row.asset, *row.cells())
    return table


def describe_incomplete_run(result: RunResult, status: Status | None, loads: bool) -> str:
    """What is missing after a run that went on without some ranges, and why: one line.

    Args:
        result: the run's.
        status: as it is now; None where it could not be measured.
        loads: whether the run was to load what it embedded.
    """
    missing = [] if status is None else [
        n_songs for each in status.ranges
        if (n_songs := each.n_missing if loads else each.n_songs + each.n_unexported - each.n_cached - each.n_set_aside)
    ]  # fmt: skip
    if status is None:
        counted = "some songs may be missing"
    elif missing:
        songs = "1 song is" if sum(missing) == 1 else f"{sum(missing):,} songs are"
        counted = f"{songs} missing, in {len(missing):,} of {len(status.ranges):,} ranges"
    else:
        counted = "no song is missing, but some are not up to date"
    done = (
        "the rest could not be done" if result.failures else f"the rest is {'loaded and indexed' if loads else 'kept'}"
    )
    reasons = [f"{_name_some(keys)}: {reason}" if keys else reason for reason, keys in result.incomplete.items()]
    rest = f"; and {len(reasons) - _MOST_REASONS:,} more reasons" if len(reasons) > _MOST_REASONS else ""
    return f"Incomplete: {counted}; {done}. {'; '.join(reasons[:_MOST_REASONS])}{rest}"


def _name_some(keys: Sequence[str]) -> str:
    rest = len(keys) - _MOST_KEYS
    return ", ".join(keys[:_MOST_KEYS]) + (f" and {rest:,} more" if rest > 0 else "")


def estimate_table(estimate: Estimate, offline: bool) -> Table:
    """What a run would cost."""
    table = Table(show_header=False, box=box.SIMPLE_HEAD)
    for name, value in {
        "Songs in the snapshot": f"{estimate.n_songs:,}",
        "Texts to embed": f"{estimate.n_texts:,}",
        "Tokens, about": f"{estimate.n_tokens:,}",
        "Price, about": f"${estimate.usd:,.{2 if estimate.usd >= 1 else 4}f}"
        + (" (a local model costs nothing)" if offline else ""),
        "Time at full quota": "none" if offline else describe_seconds(estimate.hours * 3600),
    }.items():
        table.add_row(name, value)
    return table


def status_table(status: Status) -> Table:
    """A row a range, and their sum."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("Songs by range", no_wrap=True, min_width=19)
    for name in ("Songs", "New", "Cached", "Rejected", "Loaded", "Indexed", "Missing", "Orphans"):
        table.add_column(name, justify="right", overflow="fold")
    for each in (*status.ranges, status.total):
        key, *counts = astuple(each)
        table.add_row(key, *(f"{count:,}" for count in counts), style="bold" if key == "all" else None)
    return table


def hits_table(hits: Sequence[Hit]) -> Table:
    """The songs found, nearest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("Near", width=5)
    for name, ratio in {"Song": 3, "Artist": 2, "First line": 4}.items():
        table.add_column(name, no_wrap=True, ratio=ratio)
    for hit in hits:
        first_line = (hit.lyrics or "").partition("\n")[0]
        table.add_row(f"{hit.similarity:.3f}", *map(Text, (hit.name, hit.artist, first_line)))
    return table


class Bars:
    """One bar a step."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("{task.fields[pace]}"),
            # not rich's own column: it would count what took no work
            TextColumn("{task.fields[left]}"),
            TextColumn(
                "[{task.fields[style]}]{task.fields[note]}[/]",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._pace = Pace()

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Show how far a step has come."""
        step = progress.step
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, count="", pace="", left="", note="", style="dim")
        percent = progress.unit == "%"
        rate = self._pace.rate(progress)
        self._bars.update(
            self._tasks[step],
            completed=progress.done,
            total=progress.total or None,
            count=f"{progress.done:,}" + ("%" if percent else f"/{progress.total:,}" if progress.total else ""),
            pace=f"{rate:,.0f}/s" if rate and not percent else "",
            left=describe_time_left(progress, rate),
            note=progress.note,
            style="yellow" if progress.is_trouble else "dim",
        )


class Lines:
    """A line every few seconds, and one when a step has reached its total."""

    EVERY_S = 5.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._next = 0.0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left open."""

    def __call__(self, progress: Progress) -> None:
        """Print how far a step has come."""
        now = time.monotonic()
        rate = self._pace.rate(progress)
        if now >= self._next or progress.done == progress.total:
            self._next = now + self.EVERY_S
            self._console.print(describe_progress(progress, rate), markup=False, highlight=False, soft_wrap=True)
