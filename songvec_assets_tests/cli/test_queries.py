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
    lines = found.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("Sea" in line and "Ann" in line and "waves" in line for line in lines)
    assert re.search(r"Hill and [far ]{26,}…", found), "a name gets what the width allows"
    found, said = type_in("search", "waves and salt", "-n", "1", "--json")
    assert (said.strip(), [hit["name"] for hit in json.loads(found)]) == ("[]", ["Sea"]), "no hint where a script reads"
    shown, said = type_in("status")
    assert (said.splitlines()[-1], max(map(len, shown.splitlines())) <= 80) == ("[]", True)
