"""What requests mean, and what is answered: parameters, JSON, and the HTTP status of each error code. Pure.

When to add here: another parameter, or the status of a new code. Keep out: who may ask, and how often (`guard`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qsl

import msgspec
from starlette.responses import Response

from songvec_assets.errors import SearchError, ServeError, SongvecError
from songvec_assets.search.nearest import Hit
from songvec_assets.search.query import Condition, Mode, parse_condition

MAX_PARAMETERS = 100
STATUSES = {
    "search.unknown-song": 404,
    "search.no-index": 409,
    "search": 400,
    "serve.unauthorized": 401,
    "serve.cross-site": 403,
    "serve.not-found": 404,
    "serve.method": 405,
    "serve.body": 413,
    "serve.host": 421,
    "serve.rate": 429,
    "serve.failed": 500,
    "serve.busy": 503,
    "serve": 400,
    "budget": 402,
    "provider": 502,
    "database.failed": 500,
    "database": 503,
    "table": 503,
}
"""By code, else by the part before its dot; all others are 500: somebody has to see to this machine."""
_HEADERS = {
    "serve.unauthorized": {"WWW-Authenticate": "Bearer"},
    "serve.method": {"Allow": "GET, HEAD"},
    "serve.body": {"Connection": "close"},
    "serve.busy": {"Retry-After": "1"},
    "database.full": {"Retry-After": "1"},
}


@dataclass(frozen=True)
class Notice:
    """Why the answer differs from the request: an error's code and message."""

    code: str
    message: str


@dataclass(frozen=True)
class Found:
    """The answer to a search.

    Attributes:
        hits: best first.
        mode: by which they were found: `text`, with a notice, if the words could not be embedded.
        seconds: that it took here.
        notice: why the mode is not the requested one.
    """

    hits: Sequence[Hit]
    mode: Mode
    seconds: float
    notice: Notice | None = None


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, unchecked where `Query` checks."""

    query: str | int
    limit: int
    mode: Mode
    where: Sequence[Condition]
    explain: bool


def read_search(query_string: bytes) -> Wanted:
    """The search that `/search?…` asks for.

    Raises:
        SearchError: a parameter does not parse.
        ServeError: a parameter is unknown, or given twice.
    """
    given = _read_parameters(query_string, ("q", "limit", "mode", "where", "explain"))
    return _want(given.get("q", [""])[0], given)


def read_similar(song_id: str, query_string: bytes) -> Wanted:
    """The search that `/similar/{song_id}?…` asks for; see `read_search`."""
    given = _read_parameters(query_string, ("limit", "where", "explain"))
    return _want(_read_int("a song_id", song_id), given)


def _want(query: str | int, given: Mapping[str, Sequence[str]]) -> Wanted:
    explain = given.get("explain", ["false"])[0]
    if explain not in ("true", "false"):
        raise SearchError(f"expected explain=true or false, got {explain!r}")
    return Wanted(
        query,
        limit=_read_int("a limit from 1 to 1000", given.get("limit", ["10"])[0]),
        mode=cast("Mode", given.get("mode", ["vector"])[0]),
        where=[*map(parse_condition, given.get("where", ()))],
        explain=explain == "true",
    )


def _read_parameters(query_string: bytes, known: Sequence[str]) -> dict[str, list[str]]:
    try:
        pairs = parse_qsl(
            query_string.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
        )
    except ValueError as error:
        raise SearchError(
            f"expected up to {MAX_PARAMETERS} parameters as percent-encoded UTF-8, got something else ({error})"
        ) from None
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in known or (name in given and name != "where"):
            raise ServeError(f"expected each of {', '.join(known)} once at most (where: any number), got {name[:40]!r}")
        given.setdefault(name, []).append(value)
    return given


def _read_int(what: str, given: str) -> int:
    # not `int` alone: it takes "1_0", " 7" and digits of other scripts
    digits = given.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise SearchError(f"expected {what}, got {given[:40]!r}")
    return int(given)


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON. A value that is not finite is null."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def answer_error(error: SongvecError, **headers: str) -> Response:
    """The response that an error is: `{"error": {"code": …, "message": …}}`."""
    content = {"error": Notice(error.code, str(error))}
    return answer(content, find_status(error.code), _HEADERS.get(error.code, {}) | headers)


def find_status(code: str) -> int:
    """The HTTP status of an error's code."""
    return STATUSES.get(code) or STATUSES.get(code.partition(".")[0], 500)
