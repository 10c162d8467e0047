"""Texts to requests within limits of count and tokens; halving a refused request. Pure.

A token here is an estimate: it shapes requests and quota, never what text is sent.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pack_requests(n_tokens: Sequence[int], max_texts: int, max_tokens: int) -> Iterator[slice]:
    """Cut texts, in their order, into requests.

    Args:
        n_tokens: estimated tokens of each text.
        max_texts: texts a request at most.
        max_tokens: tokens a request at most; a text above that goes alone.

    Yields:
        Slices that cover all texts, none empty.
    """
    start, total = 0, 0
    for position, tokens in enumerate(n_tokens):
        if position > start and (total + tokens > max_tokens or position - start == max_texts):
            yield slice(start, position)
            start, total = position, 0
        total += tokens
    if start < len(n_tokens):
        yield slice(start, len(n_tokens))


def bisect(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """Both halves of two or more items.

    Raises:
        ValueError: fewer than two: nothing is left to divide.
    """
    if len(items) < 2:
        raise ValueError(f"expected two or more items to divide, got {len(items)}")
    middle = len(items) // 2
    return items[:middle], items[middle:]
