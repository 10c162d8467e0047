"""What shows of a server without the key and without a text: whether its URL leads elsewhere.

When to add here: another thing that a dry run can see before anything is sent. Keep out: requests that may be billed.
"""

import http.client
import urllib.error
import urllib.request
from typing import NoReturn
from urllib.parse import urljoin

from songvec_assets.embedding.answers import base_url_of
from songvec_assets.errors import ProviderError

_TIMEOUT_S = 5.0
_REDIRECTS = range(300, 400)


def check_redirect(base_url: str) -> None:
    """Refuse a URL that redirects, such as one with http where the server wants https.

    Sends neither key nor text. A server that does not answer is no matter here: the first request says why.

    Raises:
        ProviderError: it does; names the URL to set.
    """
    opener = urllib.request.build_opener(_Staying)
    try:
        opener.open(_embeddings_url(base_url), timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as answer:
        answer.close()
        if answer.code in _REDIRECTS and answer.headers.get("location"):
            refuse_redirect(base_url, answer.code, answer.headers["location"])
    except (OSError, http.client.HTTPException):
        return


def refuse_redirect(base_url: str, status: int, location: str) -> NoReturn:
    """Refuse a URL whose server answered with a redirect to this location.

    Raises:
        ProviderError: always; names the URL to set.
    """
    url = urljoin(_embeddings_url(base_url), location)
    moved_to = base_url_of(url)
    advice = f"set FIREWORKS_BASE_URL={moved_to}" if moved_to else "correct FIREWORKS_BASE_URL"
    raise ProviderError(
        f"{base_url} answered {status}: it redirects to {url}, where the key was not sent: {advice}"
    ) from None


def _embeddings_url(base_url: str) -> str:
    return f"{base_url.rstrip('/')}/embeddings"


class _Staying(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it is an answer like any other."""

    def redirect_request(self, *_: object) -> None:
        """Nothing is asked elsewhere."""
