"""What FIREWORKS_BASE_URL may be: the root of an OpenAI-compatible API. Pure.

When to add here: another mistake that the URL itself shows. Keep out: what answers there (`transport`, `answers`).
"""

import re
from urllib.parse import urlsplit, urlunsplit

from songvec_assets.errors import SettingsError


def check_base_url(url: str) -> None:
    """Refuse a URL that cannot be the root of an API, if possible with the correct one.

    Raises:
        SettingsError: it cannot.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SettingsError("FIREWORKS_BASE_URL has a user or password, which logs would show: use FIREWORKS_API_KEY")
    try:
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of an invalid port
        is_address = False
    if not is_address:
        raise SettingsError(f"FIREWORKS_BASE_URL must be http:// or https:// with a host and a valid port, got {url!r}")
    path = re.sub("(/embeddings|/chat/completions|/completions|/models)/*$", "", parts.path)
    root = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    if root != urlunsplit(parts):
        rest = ", or a gateway that adds the rest" if parts.query else ""
        raise SettingsError(
            "FIREWORKS_BASE_URL must be the root of the API, to which /embeddings is added, without ? and #: set "
            f"FIREWORKS_BASE_URL={root}{rest}"
        )
