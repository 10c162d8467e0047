"""`songvec serve`, typed: it starts without Dagster, says where it listens, answers, and ends when it is asked to."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.errors import ServeError
from songvec_assets.serve import server
from songvec_assets_tests.cli.test_queries import CODE, environment

__all__ = ["environment"]


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_is_one_line_and_a_signal_ends_it(number: signal.Signals, tmp_path: Path) -> None:
    process: Any
    command = [sys.executable, "-c", CODE, "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"Serving searches on (http://127\.0\.0\.1:\d+); Ctrl\+C ends it\.\n", line)
            assert address, line
            found = httpx2.get(f"{address[1]}/search", params={"q": "waves and salt"}, timeout=60).json()
            assert (found["hits"][0]["name"], found["hits"][0]["best_line"]) == ("Sea", "and salt")
            process.send_signal(number)
            said, failed = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, ""), failed
    assert failed.splitlines() == ["[]"], "neither a query, nor a heavy library"


def test_what_would_be_open_to_others_is_refused_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "listen", lambda *_: pytest.fail("it listens"))
    refused = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"]).exception
    assert isinstance(refused, ServeError)
    assert refused.code == "serve.token"
