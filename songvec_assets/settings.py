"""Every setting: its variable, default, meaning, when it is read, and whether the store is bound to it.

The one place that knows the environment's names. Parsing only: what a setting does is decided where it is used.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from songvec_assets.errors import SettingsError

FIREWORKS_BASE_URL = "https://api.fireworks.ai/inference/v1"
FIREWORKS_MODEL = "fireworks/qwen3-embedding-8b"
FIREWORKS_USD_PER_MILLION_TOKENS = 0.10
OFFLINE_MODEL = "offline-v1"
"""Hashed words, vectors of any size, for tests. They know spelling, not meaning."""
DEMO_MODEL = "demo-v2"
"""The small model of the extra `demo`: what is used if nothing is configured."""
DEMO_DIMENSIONS, DEFAULT_DIMENSIONS = 512, 2000
LOCAL_MODELS = frozenset({OFFLINE_MODEL, DEMO_MODEL})
"""Models that run in this process and cost nothing."""
DEFAULT_TEMPLATE = "{name} by {artist}\n{lyrics}"

When = Literal["graph", "run"]


def _text(value: str) -> str:
    return value


def _number(lowest: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = float(value)
        if not lowest <= number < float("inf"):
            raise ValueError
        return number

    parse.__doc__ = f"a number of at least {lowest:g}"
    return parse


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        number = int(value)
        if not lowest <= number <= highest:
            raise ValueError
        return number

    parse.__doc__ = f"a whole number from {lowest:,} to {highest:,}"
    return parse


def _share(value: str) -> float:
    """a share over 0, and 1 at most"""
    share = float(value)
    if not 0 < share <= 1:
        raise ValueError
    return share


def _yes_or_no(value: str) -> bool:
    """yes or no"""
    if value.lower() not in ("yes", "true", "no", "false"):
        raise ValueError
    return value.lower() in ("yes", "true")


def _prompt(field: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        prompt = field if value.lower() == "none" else value.replace("\\n", "\n")
        if prompt.count(field) != 1:
            raise ValueError
        return prompt

    parse.__doc__ = f"a text that holds {field} once, or none"
    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError
        return value

    parse.__doc__ = " or ".join(choices)
    return parse


def _setting(
    variable: str,
    parse: Callable[[str], Any],
    help: str,
    *,
    default: Any = None,
    when: When = "run",
    identity: bool = False,
    secret: bool = False,
) -> Any:
    metadata = {"variable": variable, "parse": parse, "help": help, "when": when, "identity": identity}
    return field(default=default, repr=not secret, metadata=metadata)


_MANY = 2**31 - 1
_KEY_CHARACTERS = {chr(code) for code in range(0x21, 0x7F)}


@dataclass(frozen=True)
class Settings:
    """All settings of a run, parsed; secrets stay out of the repr."""

    postgres_url: str | None = _setting(
        "POSTGRES_URL",
        _text,
        "Database with the songs and the embeddings; unset: the embedded one",
        secret=True,
    )
    direct_url: str | None = _setting(
        "SONGVEC_DIRECT_URL", _text,
        "The same database past a pooler in transaction mode, for index builds and VACUUM; unset: `POSTGRES_URL`",
        secret=True,
    )  # fmt: skip
    fireworks_api_key: str | None = _setting(
        "FIREWORKS_API_KEY", _text, "Key of the embeddings provider; unset: the demo's model", secret=True
    )
    fireworks_base_url: str = _setting(
        "FIREWORKS_BASE_URL", _text, "Any OpenAI-compatible server: vLLM, TEI, Ollama, Infinity, …",
        default=FIREWORKS_BASE_URL,
    )  # fmt: skip
    storage: str | None = _setting(
        "SONGVEC_STORAGE", _text,
        "Folder of snapshots and cached embeddings; unset: `.songvec/demo` (embedded) or `.songvec/main`",
    )  # fmt: skip
    embedding_model: str = _setting(
        "SONGVEC_EMBEDDING_MODEL", _text,
        f"Model name; `{DEMO_MODEL}` is the demo's model, `{OFFLINE_MODEL}` hashes words",
        default=FIREWORKS_MODEL, identity=True,
    )  # fmt: skip
    embedding_dimensions: int = _setting(
        "SONGVEC_EMBEDDING_DIMENSIONS", _whole(2, 4000),
        f"Values per vector; over 2,000 needs `SONGVEC_VECTOR_TYPE=halfvec`; `{DEMO_MODEL}` always makes "
        f"{DEMO_DIMENSIONS}", default=DEFAULT_DIMENSIONS, identity=True,
    )  # fmt: skip
    query_prompt: str | None = _setting(
        "SONGVEC_QUERY_PROMPT", _prompt("{query}"),
        "What is sent for a query, such as `query: {query}`; `\\n` is a line end; `none`: the query alone; unset: as "
        "recorded with the store, at first by the model's family",
    )  # fmt: skip
    document_prompt: str | None = _setting(
        "SONGVEC_DOCUMENT_PROMPT", _prompt("{text}"),
        "The same of a song's text, such as `passage: {text}`; a change embeds all again, once it is confirmed",
    )  # fmt: skip
    truncate: bool | None = _setting(
        "SONGVEC_TRUNCATE", _yes_or_no,
        "Whether vectors of more values than that are cut; unset: of models known to be trained for it (Matryoshka)",
    )  # fmt: skip
    requests_per_minute: int = _setting(
        "SONGVEC_REQUESTS_PER_MINUTE", _whole(1, _MANY), "The provider's request quota, over all processes",
        default=6000,
    )  # fmt: skip
    tokens_per_minute: int = _setting(
        "SONGVEC_TOKENS_PER_MINUTE", _whole(1, _MANY), "The provider's token quota, over all processes",
        default=900_000,
    )  # fmt: skip
    max_request_texts: int = _setting(
        "SONGVEC_MAX_REQUEST_TEXTS", _whole(1, 2048), "Texts a request at most", default=2048
    )
    max_request_tokens: int = _setting(
        "SONGVEC_MAX_REQUEST_TOKENS", _whole(1, _MANY),
        "Tokens a request at most; never more than 1/50 of the token quota, or one request's share of it where fewer "
        "than 50 requests a minute are allowed", default=100_000,
    )  # fmt: skip
    concurrency: int = _setting(
        "SONGVEC_CONCURRENCY", _whole(1, 1000),
        "Requests in flight at most; how many there are follows from the quota and the latency", default=32,
    )  # fmt: skip
    patience_s: float = _setting(
        "SONGVEC_PATIENCE_S",
        _number(0),
        "Seconds a failing provider is retried before the run ends",
        default=600.0,
    )
    max_usd: float | None = _setting(
        "SONGVEC_MAX_USD", _number(0), "Budget of a run in dollars, over all its processes; unset: none"
    )
    max_usd_a_month: float | None = _setting(
        "SONGVEC_MAX_USD_A_MONTH", _number(0), "Budget of a calendar month (UTC) over all runs; unset: none"
    )
    usd_per_million_tokens: float | None = _setting(
        "SONGVEC_USD_PER_MILLION_TOKENS", _number(0),
        f"The provider's price; unset: {FIREWORKS_USD_PER_MILLION_TOKENS:g}, or 0 for another `FIREWORKS_BASE_URL` "
        "without a key",
    )  # fmt: skip
    songs_table: str = _setting("SONGVEC_SONGS_TABLE", _text, "Source table, also as `schema.table`", default="songs")
    song_id_column: str | None = _setting(
        "SONGVEC_SONG_ID_COLUMN", _text, "Integer id column; unset: the table's single-column primary key"
    )
    name_column: str = _setting("SONGVEC_NAME_COLUMN", _text, "Column of the song's name", default="name")
    artist_column: str = _setting("SONGVEC_ARTIST_COLUMN", _text, "Column of the artist", default="artist")
    lyrics_column: str = _setting("SONGVEC_LYRICS_COLUMN", _text, "Column of the lyrics; may be NULL", default="lyrics")
    updated_at_column: str | None = _setting(
        "SONGVEC_UPDATED_AT_COLUMN", _text,
        "Date or timestamp column that says when a song changed: exports then read only newer rows",
    )  # fmt: skip
    full_compare_hours: float = _setting(
        "SONGVEC_FULL_COMPARE_HOURS", _number(0),
        "Hours after which an export reads all songs, whatever `SONGVEC_UPDATED_AT_COLUMN` says; 0: every time",
        default=24.0,
    )  # fmt: skip
    max_missing_share: float = _setting(
        "SONGVEC_MAX_MISSING_SHARE", _share,
        "Share of all cached or loaded songs that may be missing in the source, before a run stops (from 20 songs on)",
        default=0.1,
    )  # fmt: skip
    max_missing_range_share: float = _setting(
        "SONGVEC_MAX_MISSING_RANGE_SHARE", _share, "The same of one range (from 100 songs on)", default=0.5
    )
    retention_days: float = _setting(
        "SONGVEC_RETENTION_DAYS", _number(0),
        "Days for which the cache keeps at least the vectors of songs that were deleted; 0: none", default=30.0,
    )  # fmt: skip
    text_template: str = _setting(
        "SONGVEC_TEXT_TEMPLATE", lambda value: value.replace("\\n", "\n"),
        "What is embedded, of `{name}`, `{artist}`, `{lyrics}`; `\\n` is a line end; a change embeds all again, once "
        "it is confirmed",
        default=DEFAULT_TEMPLATE,
    )  # fmt: skip
    max_text_chars: int = _setting(
        "SONGVEC_MAX_TEXT_CHARS", _whole(1, 1_000_000),
        "Longer texts are cut here; a change embeds again what it cuts otherwise, once it is confirmed", default=24_000,
    )  # fmt: skip
    vector_type: str = _setting(
        "SONGVEC_VECTOR_TYPE", _one_of("vector", "halfvec"), "Column type: `vector`, or `halfvec` at half the size",
        default="vector", identity=True,
    )  # fmt: skip
    lists: int | None = _setting(
        "SONGVEC_LISTS", _whole(1, 32_768), "Lists of the IVFFlat index; unset: the square root of the rows"
    )
    target_recall: float = _setting(
        "SONGVEC_TARGET_RECALL", _share, "Share of the true ten nearest songs that a search must find, measured",
        default=0.95,
    )  # fmt: skip
    index_memory_mb: int | None = _setting(
        "SONGVEC_INDEX_MEMORY_MB", _whole(64, _MANY),
        "Memory an index build may take on the server; unset: half of what is available there, as far as it shows",
    )  # fmt: skip
    swap: bool = _setting(
        "SONGVEC_SWAP", _yes_or_no,
        "Whether another model, size or type is built beside the serving table and takes its place, or is refused",
        default=False,
    )  # fmt: skip
    webhook_url: str | None = _setting(
        "SONGVEC_WEBHOOK_URL", _text,
        "Where failed runs are told, as JSON with a `text` (Slack, Mattermost, Teams, …); unset: nowhere", secret=True,
    )  # fmt: skip
    song_id_start: int = _setting(
        "SONGVEC_SONG_ID_START", _whole(0, 2**31 - 1),
        "Where the first range begins, a multiple of the range size; never above what is cached",
        default=0, when="graph", identity=True,
    )  # fmt: skip
    song_id_stop: int = _setting(
        "SONGVEC_SONG_ID_STOP", _whole(1, 2**31), "Where the open tail range begins; may only grow",
        default=16_000_000, when="graph", identity=True,
    )  # fmt: skip
    range_size: int = _setting(
        "SONGVEC_RANGE_SIZE",
        _whole(1, 1_000_000),
        "song_ids a range",
        default=50_000,
        when="graph",
        identity=True,
    )
    ranges_per_run: int | None = _setting(
        "SONGVEC_RANGES_PER_RUN", _whole(1, 1_000_000), "Splits backfills into runs of so many ranges; unset: one run",
        when="graph",
    )  # fmt: skip

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> "Settings":
        """Read every setting; an override that is not None wins over its variable.

        Args:
            environment: names to values; None reads the process's own.
            overrides: field names to parsed values.

        Raises:
            SettingsError: a value does not parse, or settings contradict each other.
        """
        source = os.environ if environment is None else environment
        values = {each.name: read_setting(each, source) for each in fields(cls)}
        for name, value in overrides.items():
            if value is not None:
                values[name] = _parse(cls.__dataclass_fields__[name], str(value))
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise SettingsError where settings contradict each other."""
        if self.dimensions > 2000 and self.vector_type == "vector":
            raise SettingsError(
                f"pgvector indexes `vector` columns up to 2,000 dimensions, SONGVEC_EMBEDDING_DIMENSIONS is "
                f"{self.dimensions}: lower it, or set SONGVEC_VECTOR_TYPE=halfvec (up to 4,000)"
            )
        if self.direct_url and not self.postgres_url:
            raise SettingsError("SONGVEC_DIRECT_URL is set but POSTGRES_URL is not: set both, to the same database")
        if not set(self.fireworks_api_key or "") <= _KEY_CHARACTERS:
            raise SettingsError(
                "FIREWORKS_API_KEY holds a space, a line end or a character that no key has: copy it again"
            )
        if self.model == DEMO_MODEL and self.embedding_dimensions not in (DEMO_DIMENSIONS, DEFAULT_DIMENSIONS):
            raise SettingsError(
                f"the demo's model {DEMO_MODEL} makes vectors of {DEMO_DIMENSIONS} values, and "
                f"SONGVEC_EMBEDDING_DIMENSIONS is {self.embedding_dimensions}: unset it, or set FIREWORKS_API_KEY"
            )
        if self.offline:
            return
        if self.postgres_url and not self.fireworks_api_key and self.fireworks_base_url == FIREWORKS_BASE_URL:
            raise SettingsError(
                "POSTGRES_URL is set but FIREWORKS_API_KEY is not: put the key into the environment or into .env, "
                "point FIREWORKS_BASE_URL at a server that needs none, or ask for the demo's vectors by name with "
                f"SONGVEC_EMBEDDING_MODEL={DEMO_MODEL}"
            )
        _check_base_url(self.fireworks_base_url)

    @property
    def offline(self) -> bool:
        """Whether vectors are made in this process: a local model is asked for by name, or nothing else is set."""
        asked = self.embedding_model in LOCAL_MODELS
        real = self.fireworks_api_key or self.postgres_url or self.fireworks_base_url != FIREWORKS_BASE_URL
        return asked or not real

    @property
    def price(self) -> float:
        """Dollars per million tokens; a server of one's own, which needs no key, sends no bill."""
        if self.usd_per_million_tokens is not None:
            return self.usd_per_million_tokens
        is_own = self.fireworks_base_url != FIREWORKS_BASE_URL and not self.fireworks_api_key
        return 0.0 if is_own else FIREWORKS_USD_PER_MILLION_TOKENS

    @property
    def model(self) -> str:
        """The model's name in cache, ledger and table."""
        if self.offline and self.embedding_model not in LOCAL_MODELS:
            return DEMO_MODEL
        return self.embedding_model

    @property
    def dimensions(self) -> int:
        """Values per vector; the demo's model has its own number of them."""
        return DEMO_DIMENSIONS if self.model == DEMO_MODEL else self.embedding_dimensions


_ENDPOINTS = ("/embeddings", "/chat/completions", "/completions", "/models")


def _check_base_url(url: str) -> None:
    """Raise SettingsError for a URL that cannot be the root of an API; where it is to be seen, with the right one."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SettingsError("FIREWORKS_BASE_URL holds a user or password, which logs would show: use FIREWORKS_API_KEY")
    if parts.scheme not in ("http", "https"):
        raise SettingsError(f"FIREWORKS_BASE_URL must begin with http:// or https://, got {url!r}")
    try:
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none
        has_host = False
    if not has_host:
        raise SettingsError(f"FIREWORKS_BASE_URL names no host, or no port that can be, got {url!r}")
    if parts.query or parts.fragment:
        raise SettingsError(
            f"FIREWORKS_BASE_URL must end with its path, without ? and #: set "
            f"{urlunsplit(parts._replace(query='', fragment=''))}, or a gateway that adds what stands behind"
        )
    path = parts.path.rstrip("/")
    for endpoint in _ENDPOINTS:
        if path.endswith(endpoint):
            right = urlunsplit(parts._replace(path=path.removesuffix(endpoint)))
            raise SettingsError(
                f"FIREWORKS_BASE_URL ends in {endpoint}, which is added to it: set FIREWORKS_BASE_URL={right}"
            )


def read_setting(setting: "Field[Any]", environment: Mapping[str, str]) -> Any:
    """One setting's value from the environment, or its default where it is unset or empty.

    Raises:
        SettingsError: it does not parse; the message names the variable and, unless it is a secret, the value.
    """
    value = environment.get(setting.metadata["variable"], "").strip()
    return _parse(setting, value) if value else setting.default


def _parse(setting: "Field[Any]", value: str) -> Any:
    parse = setting.metadata["parse"]
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(f"{setting.metadata['variable']}: expected {parse.__doc__}, got {value!r}") from error


def settings_table() -> str:
    """All settings as the Markdown table that the README shows."""
    lines = [
        "| Variable | Default | Meaning | Read | Store identity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in fields(Settings):
        default = "" if each.default is None else f"`{each.default!s}`".replace("\n", "\\n")
        read = "when the graph loads" if each.metadata["when"] == "graph" else "when a run starts"
        identity = "yes" if each.metadata["identity"] else ""
        lines.append(f"| `{each.metadata['variable']}` | {default} | {each.metadata['help']} | {read} | {identity} |")
    return "\n".join(lines)


def variables() -> list[str]:
    """The names of all variables, in the table's order."""
    return [each.metadata["variable"] for each in fields(Settings)]
