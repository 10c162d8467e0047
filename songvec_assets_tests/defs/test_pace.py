"""Progress in words."""

import time

import pytest

from songvec_assets.defs.pace import Pace, describe_progress
from songvec_assets.progress import Progress


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
def test_progress_tells_how_far_how_fast_and_how_long_still(progress: Progress, rate: float, line: str) -> None:
    assert describe_progress(progress, rate) == line


def test_a_pace_is_that_of_a_step_since_it_began_and_begins_anew_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace, rates = Pace(), []
    for now, done in ((0.0, 100), (10.0, 300), (20.0, 500), (21.0, 0), (23.0, 100)):  # noqa: B007 - the clock reads it
        rates.append(pace.rate(Progress("load rows", done, 1_000, unit="rows")))
    assert rates == [0.0, 20.0, 20.0, 0.0, 50.0]
    assert pace.rate(Progress("build index", 50, 100, unit="%")) == 0.0
