"""What a closing terminal does to a process, each in a process of its own."""

import signal
import subprocess
import sys

_ENDING = """
import os, signal
from songvec_assets.signals import interrupted_by_hangup

class Late:
    def __del__(self):  # while Python takes its modules apart, after its handlers are gone
        os.kill(os.getpid(), signal.SIGHUP)

late = Late()
try:
    with interrupted_by_hangup():
        {what}
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def ended(what: str) -> int:
    """Exit code of a process that does something within the block and gets SIGHUP at its very end."""
    return subprocess.run([sys.executable, "-c", _ENDING.format(what=what)], check=False, timeout=60).returncode


def test_a_second_sighup_does_not_hide_the_exit_code_of_an_interrupted_process() -> None:
    assert ended("os.kill(os.getpid(), signal.SIGHUP)") == 130


def test_a_process_that_was_not_interrupted_keeps_the_default_to_its_end() -> None:
    assert ended("pass") == -signal.SIGHUP
