"""URLs of databases, as libpq reads them: checked, and passed to each driver unchanged.

When to add here: another tool's options that users' URLs contain. Keep out: connections. No error shows a URL, since it
may hold a password.
"""

import re
from urllib.parse import parse_qsl

import psycopg2
from psycopg2.extensions import parse_dsn

from songvec_assets.errors import SettingsError

_OPTIONS_OF_TOOLS = {
    "Prisma": {
        "pgbouncer", "schema", "connection_limit", "pool_timeout", "socket_timeout", "single_use_connections",
        "sslaccept", "sslidentity",
    },
    "Prisma or asyncpg": {"statement_cache_size"},
    "SQLAlchemy's asyncpg": {"prepared_statement_cache_size"},
    "asyncpg": {"command_timeout", "server_settings"},
    "JDBC": {"currentSchema", "prepareThreshold", "ApplicationName", "loginTimeout"},
    "JDBC or asyncpg": {"ssl"},
    "pgx": {"search_path", "pool_max_conns", "default_query_exec_mode"},
    "node-postgres": {"uselibpqcompat"},
    "Supabase": {"workaround", "supa"},
    "Rails": {"prepared_statements", "pool", "encoding"},
    "Django": {"conn_max_age"},
}  # fmt: skip
"""Options that libpq does not know, by the tool that does."""

_REPLACEMENTS = {
    **dict.fromkeys(
        ("schema", "currentSchema", "search_path"), "write options=-csearch_path%3D and the schema instead"
    ),
    **dict.fromkeys(("ssl", "sslaccept"), "write sslmode=require instead"),
    "sslidentity": "write sslcert and sslkey instead",
    "server_settings": "write options=-c… instead",
}
"""What to write instead; all other options are left out."""


def libpq_uri(url: str) -> str:
    """The URL without the name of SQLAlchemy's driver, which libpq does not know; otherwise unchanged."""
    return re.sub(r"^(postgres|postgresql\+psycopg2)://", "postgresql://", url)


def parse_url(url: str, variable: str = "POSTGRES_URL") -> dict[str, str]:
    """The parts of a URL, under libpq's names: `host` and `port` may be lists.

    Args:
        url: as given, with one or several hosts, or none if an option names it.
        variable: the environment variable of the URL.

    Raises:
        SettingsError: it does not parse, or has an option of another tool.
    """
    uri = libpq_uri(url)
    if not uri.startswith("postgresql://"):
        raise SettingsError(f"{variable}: expected postgresql://user:password@host:5432/database, got another form")
    try:
        parts: dict[str, str] = parse_dsn(uri)
    except psycopg2.ProgrammingError:
        _check_options(uri, variable)
        raise SettingsError(
            f"{variable} does not parse: expected postgresql://user:password@host:5432/database, with special "
            "characters of the password percent-encoded, and options of libpq only"
        ) from None
    # libpq ends a password at its first @, and takes a / in it for the end of the port
    if "@" in "".join(parts.get(name, "") for name in ("host", "port")):
        raise SettingsError(f"{variable} has an @ in its password: percent-encode it as %40")
    cut_off = "user" not in parts and "@" in parts.get("dbname", "")
    if cut_off or not all(re.fullmatch(r"\d{0,5}", port) for port in parts.get("port", "").split(",")):
        raise SettingsError(
            f"{variable} does not parse: expected a number as the port; a / or : in the password is percent-encoded"
        )
    return parts


def _check_options(uri: str, variable: str) -> None:
    found = [
        f"{name} is {tool}'s: {_REPLACEMENTS.get(name, 'leave it out')}"
        for name in dict(parse_qsl(uri.partition("?")[2], keep_blank_values=True))
        for tool, names in _OPTIONS_OF_TOOLS.items()
        if name in names
    ]
    if found:
        raise SettingsError(f"{variable} has options that libpq does not know: {'; '.join(found)}")


def describe_url(url: str) -> str:
    """Hosts, ports and database, without user and password."""
    parts = parse_url(url)
    if "service" in parts and "host" not in parts:
        return f"service {parts['service']}"
    hosts = (parts.get("host") or parts.get("hostaddr") or "localhost").split(",")
    ports = parts.get("port", "").split(",")
    # a single port applies to all hosts
    pairs = zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False)
    return ",".join(f"{host}:{port or 5432}" for host, port in pairs) + f"/{parts.get('dbname', parts.get('user', ''))}"
