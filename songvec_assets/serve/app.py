"""The application: which path answers with what. It can be mounted into another one.

When to add here: another path; describe it in `static/openapi.json`. Keep out: what a search does (`searching`).
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from songvec_assets.errors import ServeError, SongvecError, describe
from songvec_assets.searches import Searches
from songvec_assets.serve.answers import Notice, answer, answer_error, find_status, read_search, read_similar
from songvec_assets.serve.guard import Guard, Limits, is_authorized
from songvec_assets.serve.metrics import Metrics
from songvec_assets.serve.searching import Searcher
from songvec_assets.serve.workers import Workers

log = logging.getLogger(__name__)

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/openapi.json": ("openapi.json", "application/json"),
}
OPEN = frozenset({*_FILES, "/healthz"})
"""Paths that show no song and cost nothing. All others need the token, and count in the rate."""


def create_app(songs: Searches, limits: Limits | None = None) -> Guard:
    """The application; closes `songs` at its end.

    Args:
        songs: searched; opened when that is first needed.
        limits: what is allowed; None: loopback, without a token.
    """
    allowed = limits or Limits()
    searcher, metrics = Searcher(songs, Workers()), Metrics(songs)

    async def search(request: Request) -> Response:
        wanted = read_search(request.scope["query_string"])
        return answer(await metrics.measure(wanted, searcher.find(wanted)))

    async def similar(request: Request) -> Response:
        wanted = read_similar(request.path_params["song_id"], request.scope["query_string"])
        return answer(await metrics.measure(wanted, searcher.find(wanted)))

    async def show_metrics(_: Request) -> Response:
        return await metrics.answer()

    async def health(request: Request) -> Response:
        may_know = is_authorized(request.headers, allowed.token)
        try:
            serving = await searcher.check()
        except SongvecError as error:
            message = str(error) if may_know else "searches fail; with the token this says why"
            return answer({"error": Notice(error.code, message)}, 503)
        return answer({"status": "ok"} | (serving if may_know else {}))

    async def answer_failure(request: Request, error: Exception) -> Response:
        named = _name_failure(request.url.path, error)
        metrics.count_error(named.code)
        return answer_error(named)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await searcher.close()
        songs.close()

    routes = [
        Route("/search", search),
        Route("/similar/{song_id}", similar),
        Route("/healthz", health),
        Route("/metrics", show_metrics),
        *(Route(path, _serve_file(*file)) for path, file in _FILES.items()),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers=dict.fromkeys((SongvecError, HTTPException, Exception), answer_failure),
        lifespan=lifespan,
    )
    # a redirect would be made of the Host header
    app.router.redirect_slashes = False
    return Guard(app, allowed, OPEN, metrics.count_error)


def _serve_file(name: str, media_type: str) -> Callable[[Request], Response]:
    content = (resources.files("songvec_assets.serve") / "static" / name).read_bytes()
    # no-cache: after an update the next visit has the new page
    return lambda _: Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _name_failure(path: str, error: Exception) -> SongvecError:
    """What is answered to a request for a path that failed."""
    if isinstance(error, HTTPException):
        words = f"expected /search, /similar/{{song_id}}, /healthz or /metrics, got {path[:100]!r}"
        return ServeError(words, "serve.not-found")
    if not isinstance(error, SongvecError):
        return ServeError("something unexpected failed: see the server's log", "serve.failed")
    if find_status(error.code) >= 500:
        # without the query: what people search for is nobody's business
        log.warning("%s: %s", path, describe(error))
    return error
