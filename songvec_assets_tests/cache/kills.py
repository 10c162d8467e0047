"""A process that ends in the middle of its writes, simulated: after some calls of the storage, all others raise."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from songvec_assets.storage.local import LocalStorage


class KilledError(BaseException):
    """Where the process ends."""


@contextlib.contextmanager
def killed_after(n_calls: int, methods: tuple[str, ...]) -> Iterator[None]:
    """Let a number of calls of these methods of `Storage` pass; from then on they raise KilledError."""
    n_left = n_calls

    def or_die(do: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any) -> Any:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise KilledError
            return do(*given)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in methods:
            patch.setattr(LocalStorage, name, or_die(getattr(LocalStorage, name)))
        yield
