"""Whether bad texts are the texts' fault or the server's: counts of the last minute. Pure; times are seconds."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0
MAX_BAD_TEXTS = 3
MAX_BAD_SHARE = 0.01
"""More bad texts than these in the last minute, in number and as a share, are the server's fault."""


class ServerHealth:
    """Counts texts that got a vector, and texts that alone got none though others did.

    Args:
        clock: gives seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._good: deque[tuple[float, int]] = deque()
        self._n_good = 0
        self._bad: dict[bytes, float] = {}

    def count_good(self, n_texts: int) -> None:
        """So many texts got a vector now."""
        self._good.append((self._clock(), n_texts))
        self._n_good += n_texts

    def count_bad(self, text_hash: bytes) -> None:
        """A text that was sent alone got no vector."""
        self._bad[text_hash] = self._clock()

    def n_texts(self) -> tuple[int, int]:
        """Good and bad texts of the last minute."""
        since = self._clock() - WINDOW_S
        while self._good and self._good[0][0] < since:
            self._n_good -= self._good.popleft()[1]
        self._bad = {text_hash: at for text_hash, at in self._bad.items() if at >= since}
        return self._n_good, len(self._bad)

    def is_sick(self) -> bool:
        """Whether more texts are bad than texts can be at fault for."""
        n_good, n_bad = self.n_texts()
        return n_bad > MAX_BAD_TEXTS and n_bad > MAX_BAD_SHARE * (n_good + n_bad)
