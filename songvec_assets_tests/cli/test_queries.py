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

HEAVY = ("dagster", "matplotlib", "openai", "adbc_driver_manager", "pandas")
CODE = f"""
import sys
from songvec_assets.cli import main
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


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


def type_in(*command: str) -> tuple[str, str]:
    """What a command prints on standard output and on standard error."""
    ran = subprocess.run([sys.executable, "-c", CODE, *command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


@pytest.mark.usefixtures("environment")
def test_search_and_status_load_only_what_they_need_and_fit_80_columns() -> None:
    found, said = type_in("search", "waves and salt")
    assert said.splitlines()[-1] == "[]"
    assert said.startswith("Next: ")
    assert max(map(len, found.splitlines())) <= 80
    assert re.search(r"Sea — Ann\s+and salt\n", found), "below the song is the line that shares most with the query"
    assert len(re.findall("far", found)) == 20, "no name is cut"
    found, said = type_in("search", "salt", "-n", "1", "--json")
    (hit,) = json.loads(found)
    assert (said.strip(), hit["name"], hit["best_line"]) == ("[]", "Sea", "and salt"), "no hint where a script reads"
    shown, said = type_in("status")
    assert (said.splitlines()[-1], max(map(len, shown.splitlines())) <= 80) == ("[]", True)
