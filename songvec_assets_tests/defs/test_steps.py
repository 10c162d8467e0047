"""What of a step's progress reaches Dagster's log."""

import time
from dataclasses import dataclass, field

import pytest

from songvec_assets.defs.steps import LOG_EVERY_S, _ProgressLog
from songvec_assets.progress import Progress


@dataclass
class Log:
    """Keeps what is logged; stands for Dagster's log and for the context that has it."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    @property
    def log(self) -> "Log":
        return self

    def info(self, words: str) -> None:
        self.lines.append(("info", words))

    def warning(self, words: str) -> None:
        self.lines.append(("warning", words))


def test_trouble_is_a_warning_as_often_as_progress_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = 1000.0, Log()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    report = _ProgressLog(log)
    for second in range(12):
        now = 1000.0 + second
        report(Progress("embed songs", second, 100, note=f"answered 503 at {second}", is_trouble=True))
    warnings = [words for kind, words in log.lines if kind == "warning"]
    assert warnings == [f"answered 503 at {second}" for second in (0, int(LOG_EVERY_S), 2 * int(LOG_EVERY_S))]


def test_progress_without_trouble_warns_of_nothing() -> None:
    log = Log()
    _ProgressLog(log)(Progress("embed songs", 1, 100, note="$0.0001 so far"))
    assert [kind for kind, _ in log.lines] == ["info"]
