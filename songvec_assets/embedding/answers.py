"""What an answer other than 200 means: one table from status to action, and the words for it. Pure.

Sources: the provider's documentation and issue threads, read in November 2026.
"""

import enum
import math
import re
from email.utils import parsedate_to_datetime

import msgspec

from songvec_assets.embedding.wire import BYTE_ORDER_MARK


class Action(enum.Enum):
    """What to do about an answer other than 200."""

    RETRY = "try again, later and slower"
    STOP = "end the run: no request would fare better"
    MOVED = "end the run: the key is not sent to another address than the one that was set"
    SHRINK = "divide this request, and make those that follow smaller"
    ISOLATE = "divide this request until the text that is refused stands alone"


ACTIONS = {
    301: Action.MOVED, 302: Action.MOVED, 303: Action.MOVED, 307: Action.MOVED, 308: Action.MOVED,
    400: Action.ISOLATE, 401: Action.STOP, 402: Action.STOP, 403: Action.STOP, 404: Action.STOP,
    405: Action.STOP, 408: Action.RETRY, 409: Action.RETRY, 410: Action.STOP, 412: Action.STOP,
    413: Action.SHRINK, 422: Action.ISOLATE, 429: Action.RETRY, 500: Action.RETRY, 501: Action.STOP,
    502: Action.RETRY, 503: Action.RETRY, 504: Action.RETRY,
}  # fmt: skip

_WRONG_URL = "no embeddings are made at this URL: correct FIREWORKS_BASE_URL; that of most servers ends in /v1"
_ADVICE = {
    401: "the key is wrong or revoked: set FIREWORKS_API_KEY",
    402: "billing: settle the provider's account",
    403: "the key may not use this model: check the account's permissions",
    404: "the model is not served: serverless models get retired; see the provider's list, set "
    "SONGVEC_EMBEDDING_MODEL. Or the URL is wrong: correct FIREWORKS_BASE_URL; that of most servers ends in /v1",
    405: _WRONG_URL,
    410: "the model was retired: see the provider's list, set SONGVEC_EMBEDDING_MODEL",
    412: "the account is suspended or over its monthly budget: see the provider's billing page",
    501: _WRONG_URL,
}
_MAX_RETRY_AFTER_S = 600.0

_LIMIT = re.compile(r"(?:max\w*|at most|up to|limit\w*|no more than|larger than|exceeds?|<=)\D{0,40}(\d{1,5})\b", re.I)
"""Words of limits: TEI "batch size 33 > maximum allowed batch size 32", Gemini "at most 100 requests can be in one
batch", DashScope "batch size is invalid, it should not be larger than 10" (read 2026-11)."""

MAY_BE_BILLED = frozenset({408, 504, 524})
"""Statuses of a gateway that stopped waiting: the server behind it computes, and bills, the request all the same."""


class _ErrorBody(msgspec.Struct):
    """What servers put into `error`: OpenRouter and LiteLLM give the status there as `code`, as a number or as text."""

    code: int | str | None = None


class _Envelope(msgspec.Struct):
    error: _ErrorBody | str | None = None


class _NativeAnswer(msgspec.Struct):
    """What Ollama's own API answers: `embeddings` under /api/embed, `embedding` under /api/embeddings."""

    embedding: list[msgspec.Raw] | None = None
    embeddings: list[msgspec.Raw] | None = None


def status_of(status: int, body: bytes) -> int:
    """The status that an answer means: the code of an error object in it, else the one it came with.

    Some servers answer 200 and put the error into the body (OpenRouter does; read 2026-11).

    Args:
        status: of the response.
        body: its content.

    Returns:
        An HTTP status; 500 for a 200 whose error names no status.
    """
    try:
        error = msgspec.json.decode(body.removeprefix(BYTE_ORDER_MARK), type=_Envelope).error
    except msgspec.DecodeError:
        return status
    if error is None:
        return status
    code = str(error.code) if isinstance(error, _ErrorBody) else ""
    if code.isdecimal() and 400 <= int(code) < 600:
        return int(code)
    return 500 if status < 400 else status


def action_for(status: int) -> Action:
    """The action for a status; one that is not in the table is tried again: TEI answers 424 to a passing GPU error."""
    return ACTIONS.get(status, Action.RETRY)


def names_parameter(body: bytes) -> bool:
    """Whether an error is about a parameter that not all servers know."""
    return b"encoding_format" in body or b"dimensions" in body


def describe_answer(status: int, body: str, came_with: int, base_url: str) -> str:
    """The provider's words for a status, and what to do about it; `came_with`: the response's own status."""
    inside = "" if came_with == status else f", inside of a {came_with}"
    meant_base = compatible_base_of(base_url) if status in (404, 405) else None
    advice = ": ".join(filter(None, [_ADVICE.get(status), meant_base]))
    return f"answered {status}: {' '.join(body.split())[:300]}{inside}" + (f" ({advice})" if advice else "")


def base_url_of(url: str) -> str | None:
    """The base URL to set for a server whose embeddings are at `url`; None where no path of embeddings is there."""
    path, _, rest = url.partition("?")
    path = path.rstrip("/")
    return path.removesuffix("/embeddings") if path.endswith("/embeddings") and not rest else None


def is_native_answer(body: bytes) -> bool:
    """Whether it is an answer of Ollama's own API, which is not OpenAI's."""
    try:
        answer = msgspec.json.decode(body, type=_NativeAnswer)
    except msgspec.DecodeError:
        return False
    return answer.embedding is not None or answer.embeddings is not None


def compatible_base_of(base_url: str) -> str | None:
    """The base URL of OpenAI's API where one of Ollama's own API is set; None for any other."""
    base, n_found = re.subn(r"/api(/embed)?/?$", "/v1", base_url)
    return base if n_found else None


def hinted_texts(words: str, n_texts: int) -> int | None:
    """How many texts a refusal says that a request may hold; a hint to try, since it may mean something else.

    Args:
        words: of the refusal.
        n_texts: of the refused request.

    Returns:
        The smallest number behind a word such as "maximum" that is below `n_texts`; None where there is none.
    """
    named = [int(number) for number in _LIMIT.findall(words)]
    return min((number for number in named if 0 < number < n_texts), default=None)


def parse_retry_after(value: str, sent_at: str) -> float | None:
    """Seconds of a Retry-After header, a number or an HTTP date; None where it is absent, or neither.

    Args:
        value: of the header.
        sent_at: the HTTP date of the response, by the server's clock where it gives one.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - parsedate_to_datetime(sent_at)).total_seconds()
        except (ValueError, TypeError):  # no date, or one of them without a time zone
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None
