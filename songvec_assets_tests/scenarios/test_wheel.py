"""The package as somebody gets it who installs it: its wheel alone, in an empty folder and an environment of its own.

Libraries are those of the environment that runs the tests: nothing is downloaded.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from songvec_assets.defs.instance import WORKSPACE
from songvec_assets.settings import variables
from songvec_assets_tests.cli.test_commands import ROOT, SET_AT_START, Project

pytestmark = pytest.mark.slow

BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
FOUND = "import songvec_assets; print(songvec_assets.__file__)"
DEV = """
import os, sys
from songvec_assets import cli
os.execv = lambda _, command: print(os.environ["DAGSTER_HOME"], command[5], " ".join(command[1:]), sep="\\n")
sys.argv = ["songvec", "dev"]
cli.main()
"""
"""Which server `songvec dev` would become."""


class Installed(Project):
    """An empty folder, and an environment that has the wheel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "empty"
        self.folder.mkdir()
        self.folder.chmod(0o755)
        self.venv = venv = folder / "venv"
        built = subprocess.run(
            [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        wheel = folder / built.stdout.split()[-1]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)], check=True)
        # a folder added by a .pth file has its own .pth files left unread: that of the editable install among them
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))
        (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        dropped = {*variables(), "DAGSTER_HOME", "PYTHONPATH", "VIRTUAL_ENV", *SET_AT_START}
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {"PATH": f"{venv / 'bin'}:{os.defpath}", "COLUMNS": "200"}


@pytest.fixture
def installed() -> Iterator[Installed]:
    """See `Installed`; not below pytest's folder: the embedded server's user must be able to reach it."""
    with tempfile.TemporaryDirectory(prefix="songvec-wheel-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Installed(Path(folder))


@pytest.mark.timeout(600)
def test_the_demo_runs_and_the_command_that_it_names_shows_its_run(installed: Installed) -> None:
    code, output = installed.run("python", "-c", FOUND, cold=True)
    assert str(installed.venv) in output, "the wheel's files, not the clone's"
    code, output = installed.run("songvec", "demo", cold=True)
    assert code == 0, output
    assert "Next: songvec dev shows this run in the Dagster UI; songvec search “…” finds more." in output
    # that a server so started shows the run is tested from a clone: what may lack here are files
    code, output = installed.run("python", "-c", DEV, cold=True)
    assert code == 0, output
    _hint, home, workspace, command = output.splitlines()
    assert command == f"-m dagster dev --workspace {workspace} --port 3000"
    assert Path(home) == installed.folder / ".songvec" / "dagster"
    assert (Path(home) / "dagster.yaml").is_file()
    assert installed.venv in Path(workspace).parents
    assert Path(workspace).read_text() == WORKSPACE.read_text()
