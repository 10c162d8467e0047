"""The tables that are printed, and the last line of an incomplete run."""

import io
from typing import Any

import polars as pl
import pytest
from rich.console import Console
from rich.table import Table

from songvec_assets.cache.plan import FillReport
from songvec_assets.cli.render import describe_incomplete_run, estimate_table, hits_table, run_table, status_table
from songvec_assets.cli.run import RunResult
from songvec_assets.defs.steps import Incomplete
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.search.nearest import Hit
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.load import RangeLoad
from songvec_assets.vectors.swap import LoadReport
from songvec_assets_tests.test_reports import STATUS


def show(table: Table, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_has_a_row_per_asset_with_totals_over_its_ranges() -> None:
    fills = [
        FillReport(SongIdRange(start, start + 100), n_embedded=1000, n_unchanged=5, n_new=990, n_tokens=7000, usd=0.5)
        for start in (0, 100)
    ]
    result = RunResult(list(fills), {"embedding_cache": 1.234})
    (row,) = [line.split() for line in show(run_table(result, 100)).splitlines() if "embedding_cache" in line]
    assert row == ["embedding_cache", "2,010", "1.23", "14,000", "$1.00", "10", "1,980", "0"]
    assert run_table(RunResult(), 100).row_count == 0


@pytest.mark.parametrize("n_changed", [0, 12_345])
def test_twelve_million_songs_fit_80_columns_with_whole_numbers(n_changed: int) -> None:
    whole = SongIdRange(0, 16_000_000)
    fill = FillReport(whole, n_embedded=12_000_000, n_new=12_000_000, n_changed=n_changed, n_tokens=299_935_902, usd=30)
    load = LoadReport("serving", [RangeLoad(whole, 12_000_000)])
    shown = show(run_table(RunResult([fill, load], {"embedding_cache": 1512.064}), 80), 80).splitlines()
    assert max(map(len, shown)) <= 80
    heads, row, last = [line.split() for line in shown if line.strip(" ─")]
    changed = [f"{n_changed:,}"] if n_changed else []
    assert row == ["embedding_cache", "12,000,000", "1,512", "299,935,902", "$30.00", "12,000,000", *changed]
    assert last == ["song_embeddings_table", "12,000,000", "–"]
    assert ("Changed" in heads, "Unchanged" in heads) == (n_changed > 0, False)


def test_a_status_has_a_row_per_range_and_the_total_last() -> None:
    lines = [line.split() for line in show(status_table(STATUS, 100)).splitlines() if line.strip()]
    assert lines[0][:3] == ["Range", "Songs", "New"]
    assert lines[-1] == ["all", "50", "2", "48", "1", "47", "47", "4", "1"]


@pytest.mark.parametrize(
    ("usd", "offline", "shown"),
    [(12.345, False, "$12.35"), (0.00012, False, "$0.0001"), (0.0, True, "a local model costs nothing")],
)
def test_an_estimate_shows_dollars_as_exactly_as_they_matter(usd: float, offline: bool, shown: str) -> None:
    words = show(estimate_table(Estimate(3_000_000, 1_234, 56_789, usd, 0.5), offline))
    assert shown in words
    assert "3,000,000" in words
    assert ("none" in words) == offline


def test_hits_fit_the_width_and_markup_in_a_name_is_text() -> None:
    hits = [Hit(1, "[bold]Sea" + " far" * 30, "Ann", "waves", 0.9876, "waves " * 30), Hit(2, "Hill", "Ben", None, 0.5)]
    words = show(hits_table(hits), 60)
    assert max(map(len, words.splitlines())) <= 60
    for part in ("0.988", "[bold]Sea", "waves waves", "…", "Hill — Ben", "(no lyrics)"):
        assert part in words


def incomplete(*reasons: dict[str, list[str]], failures: tuple[str, ...] = ()) -> RunResult:
    return RunResult([Incomplete(each) for each in reasons], failures=list(failures))


def test_an_incomplete_run_says_how_many_songs_are_missing_where_and_why_in_one_line() -> None:
    line = describe_incomplete_run(incomplete({"refused": ["a", "b", "c", "d"]}, {"down": []}), STATUS, loads=True)
    assert line == (
        "Incomplete: 4 songs are missing, in 1 of 2 ranges; the rest is loaded and indexed. "
        "a, b, c and 1 more: refused; down"
    )


@pytest.mark.parametrize(
    ("result", "status", "loads", "words"),
    [
        (incomplete({"x": []}), None, True, "some songs may be missing; the rest is loaded and indexed"),
        (incomplete({"x": []}), STATUS, False, "3 songs are missing, in 1 of 2 ranges; the rest is kept"),
        (incomplete({"x": []}, failures=("no",)), STATUS, True, "the rest could not be done"),
        (incomplete({"x": []}, {"y": []}, {"z": []}), STATUS, True, "x; y; and 1 more reasons"),
    ],
)
def test_it_says_what_became_of_the_rest(result: RunResult, status: Any, loads: bool, words: str) -> None:
    assert words in describe_incomplete_run(result, status, loads)


def test_one_song_is_one_song_and_none_is_said_so() -> None:
    class Fake:
        def __init__(self, n_missing: int) -> None:
            self.ranges = STATUS.ranges.head(1).with_columns(n_missing=pl.lit(n_missing))

    one, none = (describe_incomplete_run(incomplete({"x": []}), Fake(n), loads=True) for n in (1, 0))  # type: ignore[arg-type]
    assert "1 song is missing" in one
    assert "no song is missing, but some are not up to date" in none
