"""Progress as lines: how far, how fast, how long still; and how often."""

import contextlib
import time
from io import StringIO

import pytest
from rich.console import Console

from songvec_assets.cli.terminal import bars
from songvec_assets.progress import Progress, ProgressLines, RateMeter, describe_progress


@pytest.mark.parametrize(
    ("progress", "rate", "line"),
    [
        (Progress("load rows", 0, 0, unit="rows", note="waiting"), 0.0, "load rows: 0 rows (waiting)"),
        (Progress("load rows", 20, 50, unit="rows"), 0.5, "load rows: 20 of 50 rows, 0/s, 60 s left"),
        (Progress("load rows", 50_000, 50_000, unit="rows"), 1_000.0, "load rows: 50,000 of 50,000 rows, 1,000/s"),
        (Progress("build index", 25, 100, unit="%"), 0.1, "build index: 25%, 12 min left"),
        (Progress("build index", 0, 100, unit="%", note="estimated: 5 min"), 0.0, "build index: 0% (estimated: 5 min)"),
    ],
)  # fmt: skip
def test_progress_reads_how_far_how_fast_and_how_long_still(progress: Progress, rate: float, line: str) -> None:
    assert describe_progress(progress, rate) == line


def test_a_rate_is_that_of_a_step_since_it_began_and_starts_again_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    for now, done in ((0.0, 100), (10.0, 300), (20.0, 500), (21.0, 0), (23.0, 100)):  # noqa: B007 - the clock reads it
        rates.append(meter.measure(Progress("load rows", done, 1_000, unit="rows")))
    assert rates == [0.0, 20.0, 20.0, 0.0, 50.0]
    assert meter.measure(Progress("build index", 50, 100, unit="%")) == 0.0


def test_a_phase_that_counts_in_another_unit_has_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    phases = ((0.0, 0, "rows"), (50.0, 0, "blocks"), (60.0, 100, "blocks"), (61.0, 100, "rows"), (71.0, 600, "rows"))
    for now, done, unit in phases:  # noqa: B007 - the clock reads it
        rates.append(meter.measure(Progress("build index", done, 1_000, unit=unit)))
    assert rates == [0.0, 0.0, 10.0, 0.0, 50.0]


RESUMED = (
    # seconds, done, of which cached
    (0.0, 9_000, 9_000),
    (30.0, 20_000, 20_000),  # finding them takes time, too
    (31.0, 20_137, 20_000),
    (40.0, 22_370, 21_000),
)
"""A resumed run: 137 songs per second are embedded, the others are in the cache."""


def _resumed(seconds: float, done: int, n_free: int) -> Progress:
    return Progress("embed songs", done, 36_070, n_free=n_free)


def test_rate_and_time_left_are_those_of_what_took_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    for now, done, n_free in RESUMED:
        rates.append(meter.measure(_resumed(now, done, n_free)))
    assert rates == [0.0, 0.0, 137.0, 137.0]


def test_a_wait_before_the_first_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that fails for a minute is slow, however fast its first answer comes after that."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter, rates = RateMeter(), []
    for now, done in ((0.0, 100), (59.0, 100), (60.0, 160)):  # noqa: B007 - the clock reads it
        rates.append(meter.measure(Progress("embed songs", done, 1_000, n_free=100, is_trouble=True)))
    assert rates == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("face", ["bars", "lines"])
def test_both_faces_show_the_rate_of_what_is_embedded(monkeypatch: pytest.MonkeyPatch, face: str) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(width=120, record=True, force_terminal=True, file=StringIO())
    lines: list[str] = []
    with bars(console) if face == "bars" else contextlib.nullcontext(ProgressLines(lines.append)) as show:
        for now, done, n_free in RESUMED:
            show(_resumed(now, done, n_free))
    last = [line for line in [*console.export_text().splitlines(), *lines] if line.strip()][-1]
    assert ("22,370" in last, "137/s" in last, "100 s left" in last or "2 min left" in last) == (True, True, True), last


def test_a_line_comes_every_five_seconds_and_when_a_step_reaches_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = 1000.0, list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    show = ProgressLines(lines.append)
    for second in range(9):
        now = 1000.0 + second
        show(Progress("load rows", second, 8, unit="rows"))
        show(Progress("load rows", second, 8, unit="rows"))
    assert [line.split(",")[0] for line in lines] == [f"load rows: {n} of 8 rows" for n in (0, 5, 8)]


def test_trouble_is_a_warning_as_often_as_progress_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines, warnings = 1000.0, list[str](), list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    show = ProgressLines(lines.append, warnings.append)
    for second in range(12):
        now = 1000.0 + second
        show(Progress("embed songs", second, 100, note=f"answered 503 at {second}", is_trouble=True))
    assert warnings == [f"answered 503 at {second}" for second in (0, 5, 10)]
    show(Progress("embed songs", 13, 100, note="$0.0001 so far"))
    assert (len(warnings), len(lines)) == (3, 3), "a note that is no trouble warns of nothing"
