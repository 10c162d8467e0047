"""A server in a thread of this process, over the sixty songs of the search room."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from songvec_assets.pipeline import Pipeline
from songvec_assets.searches import Searches
from songvec_assets.serve.guard import Limits
from songvec_assets.serve.server import listen, make_server
from songvec_assets_tests.search.conftest import pipeline, songs_provider

__all__ = ["pipeline", "songs_provider"]

Get = Callable[..., httpx2.Response]


@contextlib.contextmanager
def running_server(songs: Searches, limits: Limits | None = None) -> Iterator[str]:
    """Where it listens."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(songs, limits or Limits())
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(pipeline: Pipeline) -> Iterator[str]:
    """A server that allows what is allowed by default."""
    with running_server(pipeline) as address:
        yield address


@pytest.fixture
def get(address: str) -> Iterator[Get]:
    """Asks the server: `get("/search", q="a storm", where=[…])`."""
    with httpx2.Client(base_url=address, timeout=30) as client:

        def ask(path: str, method: str = "GET", headers: Any = None, **parameters: Any) -> httpx2.Response:
            return client.request(method, path, params=parameters, headers=headers)

        yield ask
