"""What all commands do with the terminal: the two outputs, errors and hints in one line, interrupts, progress.

When to add here: another way to show progress. Keep out: tables (`render`), and what the commands do.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from songvec_assets.progress import Progress, ProgressLines, RateMeter

EXIT_FAILED, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 3, 130

# rich takes a terminal that cannot redraw a line for one of 80 columns
_width, _height = shutil.get_terminal_size() if os.environ.get("TERM") == "dumb" else (None, None)
# names of songs and words of servers are shown as they are
out = Console(width=_width, height=_height, emoji=False)
err = Console(width=_width, height=_height, stderr=True, emoji=False)


def say(words: str, style: str | None = None) -> None:
    """Print words as they are, without markup."""
    out.print(words, style=style, markup=False, highlight=False)


def warn(words: str) -> None:
    """Print on standard error what a person should see while a command goes on."""
    err.print(words, style="yellow", markup=False)


def fail(message: str) -> NoReturn:
    """End the command with an error, whose code is at the end of the message: see `errors.describe`."""
    # one line stays one line if another program reads it
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=not err.is_terminal)
    sys.exit(EXIT_FAILED)


def hint(words: str) -> None:
    """Print what to do next, on standard error: what a script reads is on standard output."""
    err.print(f"Next: {words}", style="bold", markup=False, highlight=False, soft_wrap=not err.is_terminal)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """On Ctrl+C, print that what was done is kept, and end with EXIT_INTERRUPTED."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, SystemExit):  # the terminal, or the reader of the pipe, may have ended it
            warn("Interrupted. What was done is kept: the same command continues from there.")
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def showing_progress() -> Iterator[Callable[[Progress], None]]:
    """Bars on a terminal that can redraw a line, else plain lines."""
    if not err.is_terminal:
        yield _lines(err)
        return
    # the terminal itself: Dagster redirects a step's standard error to a file
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding)
    console = Console(file=terminal, emoji=False)
    try:
        with contextlib.nullcontext(_lines(console)) if console.is_dumb_terminal else bars(console) as show:
            yield show
    finally:
        with contextlib.suppress(OSError):  # the terminal was closed
            terminal.close()


def _lines(console: Console) -> ProgressLines:
    return ProgressLines(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Callable[[Progress], None]]:
    """One bar per step."""
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    shown = RichProgress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[count]}", justify="right"),
        TextColumn("{task.fields[rate]}"),
        # not rich's own column: it counts songs that took no work
        TextColumn("{task.fields[left]}"),
        TextColumn(
            "[{task.fields[style]}]{task.fields[note]}[/]",
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        expand=True,
    )
    tasks: dict[str, TaskID] = {}
    rates = RateMeter()

    def show(progress: Progress) -> None:
        if progress.step not in tasks:
            tasks[progress.step] = shown.add_task(progress.step, count="", rate="", left="", note="", style="dim")
        percent = progress.unit == "%"
        speed = rates.measure(progress)
        shown.update(
            tasks[progress.step],
            completed=progress.done,
            total=progress.total or None,
            count=f"{progress.done:,}" + ("%" if percent else f"/{progress.total:,}" if progress.total else ""),
            rate=f"{speed.rate:,.0f}/s" if speed.rate and not percent else "",
            left=speed.time_left,
            note=escape(progress.note),
            style="yellow" if progress.is_trouble else "dim",
        )

    shown.start()
    try:
        yield show
    finally:
        with contextlib.suppress(OSError):  # the terminal was closed
            shown.stop()
