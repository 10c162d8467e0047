"""Progress as a person in a terminal sees it: bars; and plain lines where there is no terminal."""

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from songvec_assets.defs.pace import Pace, describe_progress, describe_time_left
from songvec_assets.progress import Progress


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
