"""Benchmarks that no other test runs, by their commands and at a small size: each comes to the end of its tables.

Figures and goals are not judged: the exit code of a goal that was missed is as good as any other.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "last"),
    [
        (("end_to_end", "--rounds", "1", "--songs", "300", "--only", "songvec run"), "no ratios: AsyncOpenAI + COPY"),
        (("cache_fill", "--rounds", "1", "--songs", "1000"), "| median | "),
        (("object_store", "--rounds", "1", "0", "0", "--songs", "500"), "| load, nothing to do | "),
        (("serving", "--short"), "all the while: "),
        (("other_ranges", "--ranges", "2"), "copying a range: "),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_it_comes_to_its_end(command: tuple[str, ...], last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), done.stderr
    assert last in done.stdout, done.stdout
