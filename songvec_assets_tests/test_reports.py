"""What status, dry run and run return: frozen, with a total, as JSON, and in words."""

import json
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from songvec_assets.embedding.budget import MonthSpending
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.errors import (
    BudgetExceededError,
    DamagedCacheError,
    ProviderError,
    ReembeddingError,
    SettingsError,
    StoppedError,
    StoreError,
)
from songvec_assets.postgres.locks import Holder
from songvec_assets.reports import RunPlan, Status, Step, continues_without
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.reports import ExportReport, IncompleteExportError, RangeExport
from songvec_assets.vectors.index.catalog import IndexInfo
from songvec_assets.vectors.plan import LoadPlan

COLUMNS = "key n_songs n_unexported n_cached n_rejected n_loaded n_indexed n_missing n_orphans".split()
RANGES = pl.DataFrame(
    [("000000000-000000100", 40, 2, 38, 1, 37, 37, 4, 0), ("000000100-000000200", 10, 0, 10, 0, 10, 10, 0, 1)],
    COLUMNS,
    orient="row",
)
INDEX = IndexInfo(47, 6, 3, 1_500_000)
STATUS = Status(
    RANGES, {"song_embeddings": "vector(64) by m"}, None, [(7, "refused")], {"negative id": 2}, "",
    MonthSpending(1.25, 0.5), ["a range is damaged"],
)  # fmt: skip
ABSENCE: Any = SimpleNamespace(n_missing=0, n_known=50, is_bulk=False, describe=lambda: "5 of 50 songs")
PLAN = RunPlan(
    50,
    ABSENCE,
    Estimate(50, 3, 60, 0.0006, 0.5),
    None,
    None,
    MonthSpending(1.25, 0.0),
)


def test_the_total_is_the_sum_of_the_ranges() -> None:
    assert STATUS.total == dict(zip(COLUMNS, ("all", 50, 2, 48, 1, 47, 47, 4, 1), strict=True))


def test_a_status_is_json_with_the_total_and_the_month() -> None:
    told = json.loads(json.dumps(replace(STATUS, index=INDEX).as_dict()))
    assert (told["missing"], told["total"]["n_loaded"], told["ranges"][1]["n_orphans"]) == (4, 47, 1)
    assert (told["month_usd"], told["month_reserved_usd"], told["index"]["lists"]) == (1.25, 0.5, 6)
    assert json.loads(json.dumps(STATUS.as_dict()))["index"] is None
    since = datetime(2026, 11, 29, 15, 0, tzinfo=UTC)
    held = replace(STATUS, holders=[Holder("loading", "", "1a2b3c4d", 4711, "worker-2", since, 200.0)])
    [told] = json.loads(json.dumps(held.as_dict()))["holders"]
    assert (told["task"], told["run_id"], told["since"]) == ("loading", "1a2b3c4d", "2026-11-29T15:00:00+00:00")
    assert "Loading for 3 min: process 4711 on worker-2, run 1a2b3c4d" in held.describe()


def test_a_status_in_words_names_what_is_wrong() -> None:
    lines = STATUS.describe()
    assert lines[:2] == ["Table song_embeddings: vector(64) by m", "Index: none yet"]
    for line in (
        "Cannot be read: a range is damaged",
        "Rejected: song 7: refused",
        "Rejected: 2 × negative id",
        "Not exported yet: 2 songs: `songvec run` exports them",
    ):
        assert line in lines
    calm = replace(STATUS, index=INDEX, caution="policies may hide songs", pgvector="an old version")
    words = "\n".join(calm.describe())
    assert "6 lists over 47 rows, 1.5 MB, 3 probes, recall not measured" in words
    assert "Source: policies may hide songs" in words
    assert "Server: an old version" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "delete: no song; 50 are loaded or cached, and all of them are in the source"),
        (
            {"missing": SimpleNamespace(**vars(ABSENCE) | {"n_missing": 5})},
            "delete: 5 of 50 songs are no longer in the source; their rows would be deleted from the table",
        ),
        (
            {"missing": SimpleNamespace(**vars(ABSENCE) | {"n_missing": 5, "is_bulk": True})},
            "A run would stop before it changes anything, unless it is given --confirm-deletions",
        ),
        ({}, "3 texts, about 60 tokens, about $0.0006"),
        ({}, "no budget per run"),
        ({"max_usd": 5.0}, "the run's budget is $5.00"),
        ({"max_usd_a_month": 20.0}, "of $20.00"),
        ({}, "load: nothing is cached yet"),
        ({"load": SimpleNamespace(n_changed=1200, n_rows=5000, damaged={})}, "load: 1,200 of 5,000 rows cached so far"),
        ({}, "index: there is none yet"),
        ({"index": INDEX}, "index: ivfflat, 6 lists over 47 rows"),
        ({"boilerplate": ["lyrics: 3 have stamps"]}, "lyrics: 3 have stamps"),
    ],
)
def test_a_plan_in_words_has_a_line_per_step(changes: dict[str, Any], words: str) -> None:
    lines = replace(PLAN, **changes).describe()
    assert words in "\n".join(lines)
    assert len(lines) == 5 + len(changes.get("boilerplate", ()))


def test_reports_are_frozen() -> None:
    for report in (STATUS, PLAN):
        with pytest.raises(FrozenInstanceError):
            report.index = INDEX  # type: ignore[misc, union-attr]


def test_a_plan_names_the_ranges_that_a_load_could_not_read() -> None:
    load = LoadPlan(frozenset(), 0, damaged={SongIdRange(100, 200): "manifest.json does not parse"})
    [line] = [each for each in replace(PLAN, load=load).describe() if each.startswith("load: ")]
    assert line.endswith("; not range 000000100-000000200, which cannot be read: manifest.json does not parse")


DONE = RangeExport(SongIdRange(0, 100))
FAILED = RangeExport(SongIdRange(100, 200), error=StoreError("the disk is full"))


@pytest.mark.parametrize(
    ("step", "error", "goes_on"),
    [
        ("export", IncompleteExportError(ExportReport([DONE, FAILED])), True),
        ("export", IncompleteExportError(ExportReport([FAILED])), False),
        ("export", StoreError("another database's"), False),
        ("embed", BudgetExceededError("over"), True),
        ("embed", ProviderError("down"), True),
        ("embed", StoreError("a range's manifest"), True),
        ("embed", ReembeddingError("confirm it"), False),
        ("embed", SettingsError("wrong"), False),
        ("load", DamagedCacheError("a range"), True),
        ("load", StoreError("nothing is cached"), False),
        ("load", StoppedError("interrupted"), False),
    ],
)
def test_a_run_goes_on_only_without_ranges_and_not_to_a_swap(step: Step, error: Exception, goes_on: bool) -> None:
    assert continues_without(step, error, is_swap=False) is goes_on
    assert continues_without(step, error, is_swap=True) is (goes_on and step == "export")
