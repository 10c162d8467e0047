"""Commands that only look start at once: they load neither Dagster, nor matplotlib, nor the client of providers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets.postgres.engine import Database
from songvec_assets.settings import OFFLINE_MODEL
from songvec_assets_tests.scenarios.test_graph_core import run_all

HEAVY = ("dagster", "matplotlib", "aiohttp", "adbc_driver_manager", "pandas", "openai", "songvec_assets.defs")
FRAMES = ("polars", "pyarrow", "songvec_assets.wiring", "songvec_assets.cache")
CODE = f"""
import sys
from songvec_assets.cli import main
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
DATA = ("numpy", "polars", "pyarrow", "sqlalchemy", "psycopg2")


@pytest.fixture
def environment(
    database: Database, songs: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database whose two songs are loaded, by the offline model."""
    songs((1, "Sea", "Ann", "waves\nand salt"), (2, "Hill and " + "far " * 20, "Ben", "stones"))
    given = {
        "POSTGRES_URL": database.url, "SONGVEC_EMBEDDING_MODEL": OFFLINE_MODEL, "SONGVEC_STORAGE": str(tmp_path / "s"),
        "SONGVEC_EMBEDDING_DIMENSIONS": "64", "COLUMNS": "80",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    from songvec_assets.cli import base

    run_all(base.make_pipeline())


def type_in(*command: str, code: str = CODE) -> tuple[str, str]:
    """What a command prints on standard output and on standard error."""
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_search_and_status_load_only_what_they_need_and_fit_80_columns() -> None:
    Path("s").rename("away")  # a search needs no store
    searching = CODE.replace(str(HEAVY), str(HEAVY + FRAMES))
    found, said = type_in("search", "waves and salt", code=searching)
    assert said.splitlines()[-1] == "[]"
    assert said.startswith("Next: ")
    assert max(map(len, found.splitlines())) <= 80
    assert re.search(r"Sea — Ann\s+and salt\s", found), "below the song is the line that shares most with the query"
    assert len(re.findall("far", found)) == 20, "no name is cut"
    found, said = type_in("search", "salt", "-n", "1", "--json", code=searching)
    (hit,) = json.loads(found)
    assert (said.strip(), hit["name"], hit["best_line"]) == ("[]", "Sea", "and salt"), "no hint where a script reads"
    Path("away").rename("s")
    shown, said = type_in("status")
    assert (said.splitlines()[-1], max(map(len, shown.splitlines())) <= 80) == ("[]", True)


@pytest.mark.parametrize("command", ["settings", "--help"])
def test_what_needs_no_data_loads_nothing_that_reads_data(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, said = type_in(command, code=CODE.replace(str(HEAVY), str(HEAVY + DATA)))
    assert (said.splitlines()[-1], "songvec" in shown) == ("[]", True)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("columns", [45, 60])
def test_on_a_narrow_terminal_columns_of_zeros_are_left_out_and_no_word_is_divided(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown, _ = type_in("status")
    (header,) = (line.split() for line in shown.splitlines() if "Range" in line)
    assert header == ["Range", "Songs", "Cached", "Loaded"]
    assert max(map(len, shown.splitlines())) <= columns


def test_a_dumb_terminal_has_the_width_that_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "dumb")
    said = "import songvec_assets.cli.terminal as t; t.err._force_terminal = True; t.hint('word ' * 20)"
    _, shown = type_in(code=said)
    assert [len(line) <= 50 for line in shown.splitlines()] == [True, True, True]
