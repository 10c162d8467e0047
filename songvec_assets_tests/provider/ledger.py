"""What the provider was asked and what it charged for: the figures that tests and campaigns audit.

Counts only; what is billed is decided by the endpoint.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO

from msgspec import Struct, json

MAX_TEXTS_KEPT = 1_000_000
_STARTED = time.monotonic()


class Figures(Struct):
    """The body of `GET /ledger`. Times: seconds since the process started. Sizes: of refused ones, too."""

    requests: int = 0
    requests_by_status: dict[str, int] = {}
    texts_billed: int = 0
    distinct_texts_billed: int = 0
    texts_billed_twice: int = 0
    tokens_billed: int = 0
    loads: int = 0
    max_in_flight: int = 0
    max_texts_in_request: int = 0
    max_tokens_in_request: int = 0
    first_at: float | None = None
    last_at: float | None = None


class Ledger:
    """Figures since the last reset. Billings are kept by digest, the texts themselves up to a limit.

    Args:
        file: an unbuffered file that gets one JSON line a billed request, before the request is answered.
    """

    def __init__(self, file: BinaryIO | None) -> None:
        self.file = file
        self.figures = Figures()
        self._billings: Counter[bytes] = Counter()
        self._texts: dict[bytes, str] = {}

    def arrive(self, n_in_flight: int) -> None:
        """A request for embeddings arrived; so many are under way with it."""
        figures = self.figures
        figures.requests += 1
        figures.last_at = time.monotonic() - _STARTED
        figures.first_at = figures.first_at or figures.last_at
        figures.max_in_flight = max(figures.max_in_flight, n_in_flight)

    def measure(self, n_texts: int, n_tokens: int) -> None:
        """A request could be read and has this size, whatever it will be answered."""
        self.figures.max_texts_in_request = max(self.figures.max_texts_in_request, n_texts)
        self.figures.max_tokens_in_request = max(self.figures.max_tokens_in_request, n_tokens)

    def bill(self, texts: Sequence[str], digests: Sequence[bytes], n_tokens: int, keep_texts: bool) -> None:
        """A request was computed: it costs, whether or not its answer arrives."""
        self._billings.update(digests)
        if keep_texts and len(self._texts) < MAX_TEXTS_KEPT:
            self._texts.update(zip(digests, texts, strict=True))
        figures = self.figures
        figures.tokens_billed += n_tokens
        figures.texts_billed += len(texts)
        figures.distinct_texts_billed = len(self._billings)
        figures.texts_billed_twice = figures.texts_billed - len(self._billings)
        if self.file:
            hashes = [digest.hex() for digest in digests]
            line = {"time": time.time(), "n_texts": len(texts), "tokens": n_tokens, "hashes": hashes}
            self.file.write(json.encode(line) + b"\n")

    def answer(self, status: int) -> None:
        """A request is answered with this status; 0: its connection is reset."""
        name = str(status or "reset")
        self.figures.requests_by_status[name] = self.figures.requests_by_status.get(name, 0) + 1

    def texts(self) -> dict[str, int]:
        """Times billed of every text that was kept."""
        return {text: self._billings[digest] for digest, text in self._texts.items()}
