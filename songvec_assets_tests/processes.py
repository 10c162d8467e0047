"""What a test does to a process that it started, where the moment matters."""

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.warm import WarmProcess


def send_signal(process: "subprocess.Popen[Any] | WarmProcess", number: signal.Signals) -> None:
    """Send a signal, and wait until the process has received it."""
    process.send_signal(number)
    wait_until(lambda: not _is_pending(process.pid, number))


def _is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has yet to receive a signal; False where /proc does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"^(?:Sig|Shd)Pnd:\t(\w+)", status, re.M))
