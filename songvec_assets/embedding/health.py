"""Whether the texts or the server are at fault for bad texts, by counts of the last minute. Pure; times are seconds.

When to add here: another sign of a failing server. Keep out: what is done about it (`cache.rejections`).
"""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0
MAX_BAD_TEXTS = 3
MAX_BAD_SHARE = 0.01
"""If the last minute has more bad texts than both, by number and by share, the server is at fault."""
MAX_KNOWN_TEXTS = 10_000


class ServerHealth:
    """Counts texts that got a vector, and texts that got none when sent alone although others did.

    Args:
        clock: returns seconds; for tests.

    Attributes:
        last_good_at: when a text last got a vector.
        n_refused_in_a_row: texts that the server refused since.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._good: deque[tuple[float, int]] = deque()
        self._bad: dict[bytes, float] = {}
        self._n_known = 0
        self.last_good_at = float("-inf")
        self.n_refused_in_a_row = 0

    def count_known(self, n_texts: int) -> None:
        """Count texts that have vectors from earlier runs: a rerun sends only the rest, which failed before."""
        self._n_known = min(MAX_KNOWN_TEXTS, self._n_known + n_texts)

    def count_good(self, n_texts: int) -> None:
        """Count texts that got a vector now."""
        self.last_good_at, self.n_refused_in_a_row = self._clock(), 0
        self._good.append((self.last_good_at, n_texts))

    def count_bad(self, text_hash: bytes) -> None:
        """Count a text that was sent alone and got no vector."""
        self._bad[text_hash] = self._clock()

    @property
    def n_bad(self) -> int:
        """Bad texts of the last minute."""
        since = self._clock() - WINDOW_S
        self._bad = {text_hash: at for text_hash, at in self._bad.items() if at >= since}
        return len(self._bad)

    @property
    def n_texts(self) -> int:
        """All texts of the last minute, and those with vectors from earlier runs."""
        since = self._clock() - WINDOW_S
        while self._good and self._good[0][0] < since:
            self._good.popleft()
        return sum(n_texts for _, n_texts in self._good) + self._n_known + self.n_bad

    def is_failing(self) -> bool:
        """Whether more texts are bad than can be the fault of texts."""
        n_bad = self.n_bad
        return n_bad > MAX_BAD_TEXTS and n_bad > MAX_BAD_SHARE * self.n_texts
