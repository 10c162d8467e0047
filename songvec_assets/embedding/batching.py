"""Texts to requests within limits of count and size; halving a refused request. Pure.

Sizes are UTF-8 bytes: how many of them make a token is an estimate that gets better while requests are answered.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pack_requests(n_bytes: Sequence[int], max_texts: int, max_bytes: Callable[[], float]) -> Iterator[slice]:
    """Cut texts, in their order, into requests: as few as there must be, about equally full.

    Args:
        n_bytes: of each text.
        max_texts: texts a request at most.
        max_bytes: says, when a request is cut, how much it may hold at most; a text above that goes alone.

    Yields:
        Slices that cover all texts, none empty.
    """
    start, left = 0, sum(n_bytes)
    while start < len(n_bytes):
        limit = max_bytes()
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
    """Both halves of two or more items.

    Raises:
        ValueError: fewer than two: nothing is left to divide.
    """
    if len(items) < 2:
        raise ValueError(f"expected two or more items to divide, got {len(items)}")
    middle = len(items) // 2
    return items[:middle], items[middle:]
