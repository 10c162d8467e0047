"""Packing texts into requests within limits of count and size; halving a refused request. Pure.

Sizes are UTF-8 bytes: bytes per token are an estimate that improves with each answer.
When to add here: another limit of a request. Keep out: sending, and what happens to refused texts (`cache.requests`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_TRY_AFTER = 8
"""A larger request is tried after twice this number of accepted ones; after each further refusal the number doubles."""


class LearnedLimits:
    """A server's limits per request, learned from the sizes that it accepted and refused.

    A refusal does not say whether there were too many texts or too many bytes: both limits apply until an accepted
    request shows which one it was. Now and then a request may be larger than all accepted ones, halfway to the refused
    size; after each refusal less often.
    """

    def __init__(self) -> None:
        self.most_texts = self.most_bytes = 0
        self._refused: list[tuple[int, int]] = []
        self._n_accepted = 0
        self._try_after = _TRY_AFTER

    @property
    def are_known(self) -> bool:
        """Whether anything was refused for its size."""
        return bool(self._refused)

    def count_accepted(self, n_texts: int, n_bytes: int) -> None:
        """Record that a request of this size was accepted."""
        self.most_texts, self.most_bytes = max(self.most_texts, n_texts), max(self.most_bytes, n_bytes)
        self._n_accepted += 1

    def count_refused(self, n_texts: int, n_bytes: int, is_for_size: bool) -> bool:
        """Record that a request was refused whose parts were all accepted.

        Args:
            n_texts, n_bytes: of the request.
            is_for_size: whether the server named the size as the reason.

        Returns:
            Whether this is the first learned limit.
        """
        if n_texts <= self.most_texts and n_bytes <= self.most_bytes:
            if not is_for_size:  # requests of this size were accepted: the cause was transient
                return False
            self.most_bytes = n_bytes // 2
        self._n_accepted, self._try_after = 0, 2 * self._try_after
        is_first = not self.are_known
        self._refused.append((n_texts, n_bytes))
        return is_first

    def refused(self) -> tuple[float, float]:
        """The numbers of texts and of bytes from which on requests are refused; infinite if not known."""
        # if as many texts were accepted, the bytes were too many; and the other way round
        by_texts = [(n, size) for n, size in self._refused if n > self.most_texts and size <= self.most_bytes]
        by_bytes = [(n, size) for n, size in self._refused if n <= self.most_texts]
        n_least = min((n for n, _ in by_texts), default=math.inf)
        least = min((size for _, size in by_bytes), default=math.inf)
        unknown = [(n, size) for n, size in self._refused if n < n_least and size < least]
        return min([n_least, *(n for n, _ in unknown)]), min([least, *(size for _, size in unknown)])

    def are_exceeded_by(self, n_texts: int, n_bytes: int) -> bool:
        """Whether a request of that size is known to be refused, and can be divided."""
        n_refused, refused = self.refused()
        return n_texts > 1 and (n_texts >= n_refused or n_bytes >= refused)

    def next_request(self) -> tuple[float, float]:
        """Maximum texts and bytes of the next request; infinite if no limit is known."""
        tries_more = self._n_accepted >= self._try_after and self.are_known
        if tries_more:
            self._n_accepted = 0
        (n_refused, refused), allowed = self.refused(), []
        for most, bound in ((self.most_texts, n_refused), (self.most_bytes, refused)):
            known = min(most, bound - 1)
            allowed.append(bound if bound == math.inf else max(1, (known + bound) // 2 if tries_more else known))
        return allowed[0], allowed[1]


def pack_requests(n_bytes: Sequence[int], limits: Callable[[], tuple[float, float]]) -> Iterator[slice]:
    """Divide texts, in order, into as few requests as possible, about equally full.

    Args:
        n_bytes: of each text.
        limits: called before each request; returns its maximum texts and bytes. A text above the limit is sent alone.

    Yields:
        Slices that cover all texts, none empty.
    """
    start, left = 0, sum(n_bytes)
    while start < len(n_bytes):
        max_texts, limit = limits()
        n_requests = max(math.ceil(left / limit), math.ceil((len(n_bytes) - start) / max_texts))
        even, others_hold = left / n_requests, (n_requests - 1) * max_texts
        stop, size = start + 1, n_bytes[start]
        while (
            stop < min(start + max_texts, len(n_bytes))
            and size + n_bytes[stop] <= limit
            and (size < even or len(n_bytes) - stop > others_hold)
        ):
            size += n_bytes[stop]
            stop += 1
        yield slice(start, stop)
        start, left = stop, left - size


def bisect(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """Both halves of two or more items."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
