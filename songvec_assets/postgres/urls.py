"""URLs of databases: checked, as SQLAlchemy and as libpq read them. No error holds a URL: it may hold a password."""

from urllib.parse import quote, urlencode

import sqlalchemy as sa

from songvec_assets.errors import SettingsError


def normalize_url(url: str, variable: str = "POSTGRES_URL") -> str:
    """Name the driver in a `postgres://` or `postgresql://` URL.

    Raises:
        SettingsError: not a Postgres URL.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise SettingsError(f"{variable}: expected postgresql://user:password@host:5432/database, got another form")
    return f"postgresql+psycopg2://{rest}"


def parse_url(url: str, variable: str = "POSTGRES_URL") -> sa.URL:
    """A Postgres URL with its driver named.

    Args:
        url: as it was given.
        variable: that it was given by.

    Raises:
        SettingsError: it does not parse.
    """
    try:
        parsed = sa.make_url(normalize_url(url, variable))
    except (sa.exc.ArgumentError, ValueError):
        raise SettingsError(
            f"{variable} does not parse: expected postgresql://user:password@host:5432/database, with special "
            "characters of the password percent-encoded"
        ) from None
    if "@" in (parsed.host or ""):
        raise SettingsError(f"{variable} has an @ in its password: percent-encode it as %40")
    return parsed


def libpq_uri(url: str) -> str:
    """The URL as libpq reads it: every part percent-encoded, which SQLAlchemy leaves undone for spaces."""
    parsed = parse_url(url)
    login = ":".join(quote(part, safe="") for part in (parsed.username, parsed.password) if part is not None)
    host = f"[{parsed.host}]" if ":" in (parsed.host or "") else parsed.host or ""
    query = urlencode(parsed.query, doseq=True, quote_via=quote)
    port = f":{parsed.port}" if parsed.port else ""
    database = quote(parsed.database or "", safe="")
    return f"postgresql://{login}{'@' if login else ''}{host}{port}/{database}{'?' if query else ''}{query}"
