"""The examples, run in a folder of their own as a person does."""

from pathlib import Path

import pytest

from songvec_assets_tests import warm
from songvec_assets_tests.test_pipeline import HEAVY, loaded_by

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the sample songs are loaded and indexed."""
    folder = tmp_path_factory.mktemp("demo")
    run_example("notebook", folder)
    return folder


def test_a_search_imports_neither_dagster_nor_what_draws_or_asks_a_provider(demo: Path) -> None:
    command = """
import contextlib
from songvec_assets.cli import main
sys.argv = ["songvec", "search", "a storm at sea"]
with contextlib.suppress(SystemExit):
    main()
assert "songvec_assets.search.nearest" in sys.modules
"""
    assert not loaded_by(command, demo, HOME=str(demo)) & {*HEAVY}


def run_example(name: str, folder: Path) -> str:
    process = warm.start([str(EXAMPLES / f"{name}.py")], folder, {"HOME": str(folder)})
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("search", "5 vectors of 512 values"),
        ("nightly_refresh", "176 songs are loaded, 0 missing"),
        ("notebook", "songs 1 and 2 have similarity"),
        ("plain_sql", " — "),
    ],
)
def test_each_example_runs(demo: Path, name: str, shown: str) -> None:
    assert shown in run_example(name, demo)
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 30


def test_the_examples_are_those(demo: Path) -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"search", "nightly_refresh", "notebook", "plain_sql"}
