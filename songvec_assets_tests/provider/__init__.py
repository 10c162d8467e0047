"""A provider of embeddings to test against: OpenAI-compatible, in its own process, misbehaving on request.

Here is what tests use: `running_provider` starts one, `Provider` controls and audits it, and `vector_of`,
`count_tokens` and `digest_of` say what it computes. The server itself is in the modules beside.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .modes import MODES
from .vectors import count_tokens, digest_of, vector_of

__all__ = ["Provider", "count_tokens", "digest_of", "running_provider", "vector_of"]

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Provider:
    """A provider that runs.

    Attributes:
        base_url: what an OpenAI client takes, ending in `/v1`.
        api_key: the key that it accepts.
        pid: its process, for measurements.
    """

    base_url: str
    api_key: str
    pid: int

    def control(self, mode: str | None = None, **faults: Any) -> None:
        """Replace all faults by those of a real server (`modes.MODES`), and these (fields of `faults.Faults`).

        None: behave well.

        Counts, draws and the quota's window begin anew.

        Raises:
            ValueError: a fault is unknown or has a wrong value.
        """
        self._ask("PUT", "/control", json.dumps((MODES[mode].faults if mode else {}) | faults))

    def ledger(self) -> dict[str, Any]:
        """What was asked and billed since the last reset; see `ledger.Ledger.figures`."""
        figures: dict[str, Any] = self._ask("GET", "/ledger")
        return figures

    def count_in_flight(self) -> int:
        """Requests that are not answered yet; right only if the ledger was not reset while some were in flight."""
        figures = self.ledger()
        return int(figures["requests"] - sum(figures["requests_by_status"].values()))

    def texts(self) -> dict[str, int]:
        """How often each text was billed."""
        texts: dict[str, int] = self._ask("GET", "/ledger/texts")
        return texts

    def begin_again(self) -> None:
        """Be as if just started: no faults, an empty ledger; requests still in flight are nobody's."""
        self._ask("PUT", "/new")

    def reset_ledger(self) -> None:
        """Begin the ledger anew; a ledger file goes on."""
        self._ask("DELETE", "/ledger")

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        connection = HTTPConnection(urlsplit(self.base_url).netloc, timeout=60)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            answer = json.load(response)
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"{method} {path}: {answer['error']['message']}")
        return answer


@contextmanager
def running_provider(
    *, ledger_file: Path | None = None, model: str | None = None, api_key: str = "test-key", **control: Any
) -> Iterator[Provider]:
    """Start a provider with these faults, and end it with the block, or with this process however it ends.

    Args:
        ledger_file: gets one JSON line a billed request.
        model: the one that it serves; None: that of Fireworks.
        api_key: the one that it accepts; `none` is what a client without a key sends.
        **control: fields of `faults.Faults`.
    """
    command = [sys.executable, "-m", __name__, "--exit-with-parent", "--api-key", api_key]
    command += ["--control", json.dumps(control)]
    if model:
        command += ["--model", model]
    if ledger_file:
        command += ["--ledger", str(ledger_file.resolve())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=_ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout
            announced = process.stdout.readline()
            if not announced:
                raise RuntimeError(f"the provider ended before it listened; its stderr says why: {command}")
            yield Provider(announced.split()[-1], api_key, process.pid)
        finally:
            # Nothing is lost: the ledger file is written through at every line.
            process.kill()
