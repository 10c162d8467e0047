"""What a bad answer means: its status and body become an error, or the request is retried. Pure.

When to add here: another status, or another form of error body. Keep out: connections (`transport`), and when and how
often to retry (`client`, `contact`). Sources: the providers' documentation and issue threads, read in November 2026.
"""

import math
import re
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin

import msgspec

from songvec_assets.embedding.wire import BYTE_ORDER_MARK
from songvec_assets.errors import ProviderError, RequestRefusedError, RequestTooLargeError

REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""These end the run: the key is sent to no other address than the configured one."""
RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Retried, like every status that is not listed here: TEI answers 424 to a transient GPU error."""
REFUSALS: dict[int, type[RequestRefusedError]] = {
    400: RequestRefusedError, 413: RequestTooLargeError, 422: RequestRefusedError
}  # fmt: skip
"""The request is divided until the refused text is alone."""
MAY_BE_BILLED = frozenset({408, 504, 524})
"""Statuses of a gateway that stopped waiting: the server behind it still computes, and bills, the request."""

_WRONG_URL = "no embeddings are made at this URL: correct FIREWORKS_BASE_URL; that of most servers ends in /v1"
ENDS = {
    401: ("provider.key-refused", "the key is wrong or revoked: set FIREWORKS_API_KEY"),
    402: ("provider.billing", "billing: settle the provider's account"),
    403: ("provider.not-permitted", "the key may not use this model: check the account's permissions"),
    404: (
        "provider.model-not-served",
        "the model is not served: serverless models get retired; see the provider's list, set "
        "SONGVEC_EMBEDDING_MODEL. Or the URL is wrong: correct FIREWORKS_BASE_URL; that of most servers ends in /v1",
    ),
    405: ("provider.wrong-url", _WRONG_URL),
    410: (
        "provider.model-not-served",
        "the model was retired: see the provider's list, set SONGVEC_EMBEDDING_MODEL",
    ),
    412: (
        "provider.billing",
        "the account is suspended or over its monthly budget: see the provider's billing page",
    ),
    501: ("provider.wrong-url", _WRONG_URL),
}
"""Statuses that end the run, since every request would fail: the error's code, and what to do."""
_MAX_RETRY_AFTER_S = 600.0

_LIMIT = re.compile(r"(?:max\w*|at most|up to|limit\w*|no more than|larger than|exceeds?|<=)\D{0,40}(\d{1,5})\b", re.I)
"""Numbers in messages about limits: TEI "batch size 33 > maximum allowed batch size 32", Gemini "at most 100 requests
can be in one batch", DashScope "batch size is invalid, it should not be larger than 10" (read 2026-11)."""


class _ErrorBody(msgspec.Struct):
    """The object `error` in a body: OpenRouter and LiteLLM give the status as `code`, a number or text."""

    code: int | str | None = None


class _Envelope(msgspec.Struct):
    error: _ErrorBody | str | None = None


class _NativeAnswer(msgspec.Struct):
    """An answer of Ollama's native API: `embeddings` from /api/embed, `embedding` from /api/embeddings."""

    embedding: list[msgspec.Raw] | None = None
    embeddings: list[msgspec.Raw] | None = None


def status_of(status: int, body: bytes) -> int:
    """The status that an answer means: the code of an error object in its body, else its HTTP status.

    Some servers answer 200 and put the error into the body (OpenRouter does; read 2026-11).

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


def describe_answer(status: int, body: str, came_with: int, base_url: str) -> str:
    """The provider's message and what to do about it; `came_with`: the HTTP status, if the body has another one."""
    inside = "" if came_with == status else f", inside of a {came_with}"
    meant_base = compatible_base_of(base_url) if status in (404, 405) else None
    advice = ": ".join(filter(None, [ENDS.get(status, ("", ""))[1], meant_base]))
    return f"answered {status}: {' '.join(body.split())[:300]}{inside}" + (f" ({advice})" if advice else "")


def find_refusal(status: int, body: bytes, message: str, is_first: bool) -> ProviderError | None:
    """The error to raise for an answer; None: the request is retried.

    Args:
        status: as `status_of` gives it; not a redirect.
        is_first: whether there was no good answer yet.
    """
    if status in ENDS:
        return ProviderError(message, ENDS[status][0])
    # LiteLLM answers 500 to a parameter that the server behind it does not know (its #42426)
    names_parameter = b"encoding_format" in body or b"dimensions" in body
    refusal = RequestRefusedError if status == 500 and is_first and names_parameter else REFUSALS.get(status)
    return refusal(message) if refusal else None


def refuse_redirect(base_url: str, status: int, location: str) -> ProviderError:
    """The error for a server that redirects to this location; the message has the URL to set."""
    url = urljoin(f"{base_url.rstrip('/')}/embeddings", location)
    path, _, rest = url.partition("?")
    path = path.rstrip("/")
    is_embeddings = path.endswith("/embeddings") and not rest
    advice = (
        f"set FIREWORKS_BASE_URL={path.removesuffix('/embeddings')}" if is_embeddings else "correct FIREWORKS_BASE_URL"
    )
    return ProviderError(
        f"{base_url} answered {status}: it redirects to {url}, where the key was not sent: {advice}",
        "provider.wrong-url",
    )


def is_native_answer(body: bytes) -> bool:
    """Whether an answer is of Ollama's native API instead of the OpenAI-compatible one."""
    try:
        answer = msgspec.json.decode(body, type=_NativeAnswer)
    except msgspec.DecodeError:
        return False
    return answer.embedding is not None or answer.embeddings is not None


def compatible_base_of(base_url: str) -> str | None:
    """The OpenAI-compatible base URL, if the given one is of Ollama's native API; else None."""
    base, n_found = re.subn(r"/api(/embed)?/?$", "/v1", base_url)
    return base if n_found else None


def hinted_texts(message: str, n_texts: int) -> int | None:
    """The maximum texts per request that a refusal seems to name; a hint, since the number may mean something else.

    Args:
        n_texts: of the refused request.

    Returns:
        The smallest number after a word such as "maximum" that is below `n_texts`; None if there is none.
    """
    named = [int(number) for number in _LIMIT.findall(message)]
    return min((number for number in named if 0 < number < n_texts), default=None)


def parse_retry_after(value: str, sent_at: str) -> float | None:
    """Seconds of a Retry-After header, a number or an HTTP date; None if it is absent or neither.

    Args:
        sent_at: the HTTP date of the response, by the server's clock if the response has one.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - parsedate_to_datetime(sent_at)).total_seconds()
        except (ValueError, TypeError):  # not a date, or one of the two has no time zone
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None
