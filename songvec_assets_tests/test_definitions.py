"""The code location, loaded as Dagster loads it."""

import os
import subprocess
import sys

import pytest

from songvec_assets.settings import (
    variables,
)


@pytest.mark.slow
def test_the_code_location_loads_with_an_empty_environment_and_without_warnings() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in variables()}
    loaded = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import songvec_assets.definitions"],
        cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (loaded.returncode, loaded.stderr) == (0, "")
