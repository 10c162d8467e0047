"""URLs of databases, as libpq reads them: checked, and handed to each driver unchanged.

When to add here: options of another tool that people's URLs carry. Keep out: connections. No error holds a URL: it may
hold a password.
"""

import re
from urllib.parse import parse_qsl

import psycopg2
from psycopg2.extensions import parse_dsn

from songvec_assets.errors import SettingsError

_SEARCH_PATH = "write options=-csearch_path%3D and the schema instead"
_SSL = "write sslmode=require instead"
_OTHERS = {
    "pgbouncer": "Prisma",
    "schema": ("Prisma", _SEARCH_PATH),
    "connection_limit": "Prisma",
    "pool_timeout": "Prisma",
    "socket_timeout": "Prisma",
    "single_use_connections": "Prisma",
    "sslaccept": ("Prisma", _SSL),
    "sslidentity": ("Prisma", "write sslcert and sslkey instead"),
    "statement_cache_size": "Prisma or asyncpg",
    "prepared_statement_cache_size": "SQLAlchemy's asyncpg",
    "command_timeout": "asyncpg",
    "server_settings": ("asyncpg", "write options=-c… instead"),
    "currentSchema": ("JDBC", _SEARCH_PATH),
    "ssl": ("JDBC or asyncpg", _SSL),
    "prepareThreshold": "JDBC",
    "ApplicationName": "JDBC",
    "loginTimeout": "JDBC",
    "search_path": ("pgx", _SEARCH_PATH),
    "pool_max_conns": "pgx",
    "default_query_exec_mode": "pgx",
    "uselibpqcompat": "node-postgres",
    "workaround": "Supabase",
    "supa": "Supabase",
    "prepared_statements": "Rails",
    "pool": "Rails",
    "encoding": "Rails",
    "conn_max_age": "Django",
}
"""Whose option it is that libpq does not know, and what to write in its place; none: leave it out."""


def libpq_uri(url: str) -> str:
    """The URL without the name of SQLAlchemy's driver, which libpq does not know: all else stays as it was given."""
    return re.sub(r"^(postgres|postgresql\+psycopg2)://", "postgresql://", url)


def parse_url(url: str, variable: str = "POSTGRES_URL") -> dict[str, str]:
    """What a URL says, under libpq's names: `host` and `port` may be lists.

    Args:
        url: as it was given, with one host or several, or none where an option names it.
        variable: that it was given by.

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
    found = {name: _OTHERS[name] for name, _ in parse_qsl(uri.partition("?")[2], True) if name in _OTHERS}
    words = []
    for name, known in found.items():
        tool, instead = (known, "leave it out") if isinstance(known, str) else known
        words.append(f"{name} is {tool}'s: {instead}")
    if words:
        raise SettingsError(f"{variable} has options that libpq does not know: {'; '.join(words)}")


def describe_url(url: str) -> str:
    """Hosts, ports and database, without user and password."""
    parts = parse_url(url)
    if "service" in parts and "host" not in parts:
        return f"service {parts['service']}"
    hosts, ports = (
        (parts.get("host") or parts.get("hostaddr") or "localhost").split(","),
        parts.get("port", "").split(","),
    )
    # one port goes for all hosts
    pairs = zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False)
    return ",".join(f"{host}:{port or 5432}" for host, port in pairs) + f"/{parts.get('dbname', parts.get('user', ''))}"
