"""All settings: environment variable, type, default and meaning, in one group per resource or purpose.

A value passed to `Settings(...)` replaces that of its variable; an empty variable counts as unset. A field with
`repr=False` is a secret. `GraphSettings` are read when the graph loads, all others when a run starts. When to add here:
a setting, as a field of its group, of a type that Dagster's run config supports (text, number, Boolean, one of several
words). Keep out: what a setting does, and how it is read (`settings_group`).
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from songvec_assets.base_url import check_base_url
from songvec_assets.errors import SettingsError
from songvec_assets.settings_group import Group, file_variable, variable
from songvec_assets.storage import check_location

FIREWORKS_BASE_URL = "https://api.fireworks.ai/inference/v1"
FIREWORKS_MODEL = "fireworks/qwen3-embedding-8b"
FIREWORKS_USD_PER_MILLION_TOKENS = 0.10
OFFLINE_MODEL = "offline-v1"
"""Hashed words, vectors of any size, for tests. It knows spelling, not meaning."""
DEMO_MODEL = "demo-v2"
"""The small model of the extra `demo`, used if nothing is configured."""
DEMO_DIMENSIONS, DEFAULT_DIMENSIONS = 512, 2000
LOCAL_MODELS = frozenset({OFFLINE_MODEL, DEMO_MODEL})
"""Models that run in this process and cost nothing."""
DEFAULT_TEMPLATE = "{name} by {artist}\n{lyrics}"
STORE_IDENTITY = {
    "embedding_model", "model_id", "embedding_dimensions", "vector_type", "song_id_start", "song_id_stop", "range_size",
}  # fmt: skip
"""Settings that a storage folder and its table are bound to."""

_MAX_INT = 2**31 - 1

Count = Annotated[int, Field(ge=1, le=_MAX_INT)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Escaped = Annotated[str, AfterValidator(lambda value: value.replace("\\n", "\n"))]


class PostgresSettings(Group):
    """The database, its songs, and how vectors are stored and indexed there."""

    postgres_url: str | None = Field(default=None, repr=False)
    """Database with the songs and the embeddings; unset: the embedded server."""
    direct_url: str | None = Field(default=None, repr=False)
    """URL without the pooler in transaction mode, for index builds and VACUUM; unset: `POSTGRES_URL`."""
    songs_table: str = "songs"
    """Source table, as `table` or `schema.table`."""
    song_id_column: str | None = None
    """Integer id column; unset: the table's single-column primary key."""
    name_column: str = "name"
    """Column of the song's name."""
    artist_column: str = "artist"
    """Column of the artist."""
    lyrics_column: str = "lyrics"
    """Column of the lyrics; may be NULL."""
    updated_at_column: str | None = None
    """Date or timestamp column of a song's last change; exports then read only newer rows."""
    full_compare_hours: NotNegative = 24.0
    """Hours after which an export reads all songs even if `SONGVEC_UPDATED_AT_COLUMN` is set; 0: always."""
    max_missing_share: Share = 0.1
    """Share of the cached or loaded songs that the source may lack before a run stops (checked from 20 songs on)."""
    max_missing_range_share: Share = 0.5
    """The same limit for a single range (checked from 100 songs on)."""
    filter_columns: str | None = None
    """Columns of the songs table that searches may filter by, such as `artist, year`; unset: none."""
    vector_type: Literal["vector", "halfvec"] = "vector"
    """Column type: `vector`, or `halfvec` at half the size."""
    index_kind: Literal["ivfflat", "ivfflat_halfvec", "ivfflat_bit", "hnsw_bit"] = "ivfflat"
    """Kind of the index: `ivfflat`, `ivfflat_halfvec`, `ivfflat_bit` or `hnsw_bit`; docs/search.md compares them."""
    lists: int | None = Field(default=None, ge=1, le=32_768)
    """Lists of an IVFFlat index; unset: the square root of the number of rows."""
    index_memory_mb: int | None = Field(default=None, ge=64, le=_MAX_INT)
    """Memory in MB that an index build may use on the server; unset: half of what is available there."""


class ProviderSettings(Group):
    """The embeddings provider, the model, and the provider's quotas."""

    fireworks_api_key: str | None = Field(default=None, repr=False)
    """API key of the embeddings provider; unset: the demo's model."""
    fireworks_base_url: str = FIREWORKS_BASE_URL
    """Any OpenAI-compatible server: vLLM, TEI, Ollama, Infinity and others."""
    embedding_model: str = FIREWORKS_MODEL
    """The provider's name for the model; `demo-v2`: the demo's model; `offline-v1`: hashed words."""
    model_id: str | None = None
    """Name of the model in cache and table, kept if a provider calls it otherwise; unset: the provider's name."""
    embedding_dimensions: int = Field(default=DEFAULT_DIMENSIONS, ge=2, le=4000)
    """Dimensions per vector; over 2,000 needs `SONGVEC_VECTOR_TYPE=halfvec`; `demo-v2` always has 512."""
    query_prompt: str | None = None
    r"""Text sent for a query, such as `query: {query}`; `\n` is a line end; `none`: the query alone; unset: as
    recorded with the store, initially by the model's family."""
    document_prompt: str | None = None
    """Text sent for a song, such as `passage: {text}`; a change re-embeds all songs, after confirmation."""
    truncate: bool | None = None
    """Whether to truncate longer vectors to these dimensions; unset: only of models trained for it (Matryoshka)."""
    requests_per_minute: Count = 6000
    """The provider's request quota, shared by all processes."""
    tokens_per_minute: Count = 900_000
    """The provider's token quota, shared by all processes."""
    max_request_texts: int = Field(default=2048, ge=1, le=2048)
    """Maximum texts per request."""
    max_request_tokens: Count = 100_000
    """Maximum tokens per request; never above the token quota divided by 50, or by the request quota if less."""
    patience_s: NotNegative = 600.0
    """Seconds to retry a failing provider before the run ends."""
    usd_per_million_tokens: float | None = Field(default=None, ge=0)
    """The provider's price; unset: 0.1, or 0 for another `FIREWORKS_BASE_URL` without a key."""

    @field_validator("query_prompt", "document_prompt")
    @classmethod
    def _parse_prompt(cls, value: str, info: ValidationInfo) -> str:
        placeholder = "{query}" if info.field_name == "query_prompt" else "{text}"
        prompt = placeholder if value.lower() == "none" else value.replace("\\n", "\n")
        if prompt.count(placeholder) != 1:
            raise ValueError(f"a text that contains {placeholder} once, or none")
        return prompt


class StorageSettings(Group):
    """The folder of snapshots and cached embeddings, and how songs become texts."""

    storage: str | None = None
    """Folder of snapshots and cached embeddings, or `s3://bucket/prefix`, `gs://…`, `az://container/…`; unset:
    `.songvec/demo` (embedded server) or `.songvec/main`."""
    retention_days: NotNegative = 30.0
    """Minimum days that the cache keeps vectors of deleted songs; 0: none."""
    text_template: Escaped = DEFAULT_TEMPLATE
    r"""Text to embed: `{name}`, `{artist}`, `{lyrics}`; `\n` ends a line; a change re-embeds all, once confirmed."""
    max_text_chars: int = Field(default=24_000, ge=1, le=1_000_000)
    """Longer texts are truncated; a change re-embeds the songs it affects, after confirmation."""

    @field_validator("storage")
    @classmethod
    def _check_location(cls, value: str) -> str:
        return check_location(value)


class RunSettings(Group):
    """What a run may spend, and how."""

    max_usd: float | None = Field(default=None, ge=0)
    """Budget of a run in dollars, over all its processes; unset: none."""
    max_usd_a_month: float | None = Field(default=None, ge=0)
    """Budget in dollars of a calendar month (UTC), over all runs; unset: none."""
    concurrency: int = Field(default=32, ge=1, le=1000)
    """Maximum requests in flight; the actual number follows from quota and latency."""
    target_recall: Share = 0.95
    """Measured recall that searches must reach: the share found of the true ten nearest songs."""
    evaluation_queries: str | None = None
    """File of labelled queries on which each swap compares both tables (docs/search.md); unset: none."""
    metrics_textfile: str | None = None
    """File that each step writes for node_exporter's textfile collector, such as `/var/lib/…/songvec.prom`; unset:
    none."""
    swap: bool = False
    """Whether another model, size or type is built as a staging table and swapped in; otherwise it is refused."""
    webhook_url: str | None = Field(default=None, repr=False)
    """Webhook URL that receives a message per failed run, as JSON with a `text` (Slack, Teams, …); unset: none."""

    @field_validator("metrics_textfile")
    @classmethod
    def _check_suffix(cls, value: str) -> str:
        if not value.endswith(".prom"):
            raise ValueError("a file whose name ends in .prom: others are not read")
        return value


class GraphSettings(Group):
    """What shapes the graph: its partitions, and how backfills are split."""

    song_id_start: int = Field(default=0, ge=0, le=_MAX_INT)
    """Start of the first range, a multiple of the range size; never above the first cached range."""
    song_id_stop: int = Field(default=16_000_000, ge=1, le=2**31)
    """Start of the open last range; may only be increased."""
    range_size: int = Field(default=50_000, ge=1, le=1_000_000)
    """song_ids per range."""
    ranges_per_run: int | None = Field(default=None, ge=1, le=1_000_000)
    """Splits backfills into runs of up to n ranges; unset: one run."""


class ServeSettings(Group):
    """What searches may spend, and what `songvec serve` allows."""

    max_search_usd_a_month: float | None = Field(default=None, ge=0)
    """Budget in dollars of a calendar month (UTC) for the queries of searches; unset: none."""
    serve_token_file: str | None = None
    """File with the token that `songvec serve` requires; unset: none, and it listens on loopback only."""
    serve_hosts: str | None = None
    """Names besides loopback's by which requests may address `songvec serve`, such as `songs.example`."""
    serve_requests_per_minute: Count = 1200
    """Searches that `songvec serve` takes from one address; a sixth of them may come at once."""


GROUPS = (PostgresSettings, ProviderSettings, StorageSettings, RunSettings, GraphSettings, ServeSettings)


class Settings(PostgresSettings, ProviderSettings, StorageSettings, RunSettings, GraphSettings, ServeSettings):
    """All settings, immutable; secrets stay out of the repr.

        Settings()                    # environment and defaults
        Settings(max_usd=20)          # explicit values replace those of the environment

    Raises:
        SettingsError: a value does not parse, or settings contradict each other.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.embedding_dimensions > 2000 and self.vector_type == "vector":
            raise SettingsError(
                f"pgvector indexes `vector` columns up to 2,000 dimensions, SONGVEC_EMBEDDING_DIMENSIONS is "
                f"{self.embedding_dimensions}: lower it, or set SONGVEC_VECTOR_TYPE=halfvec (up to 4,000)"
            )
        if self.direct_url and not self.postgres_url:
            raise SettingsError("SONGVEC_DIRECT_URL is set but POSTGRES_URL is not: set both, to the same database")
        if re.search("[^!-~]", self.fireworks_api_key or ""):
            raise SettingsError(
                "FIREWORKS_API_KEY contains a space, a line end or a character that keys do not have: copy it again"
            )
        if self.model == DEMO_MODEL and self.embedding_dimensions not in (DEMO_DIMENSIONS, DEFAULT_DIMENSIONS):
            raise SettingsError(
                f"the demo's model {DEMO_MODEL} makes vectors of {DEMO_DIMENSIONS} values, and "
                f"SONGVEC_EMBEDDING_DIMENSIONS is {self.embedding_dimensions}: unset it, or set FIREWORKS_API_KEY"
            )
        if self.offline:
            return self
        if self.postgres_url and not self.fireworks_api_key and self.fireworks_base_url == FIREWORKS_BASE_URL:
            raise SettingsError(
                "POSTGRES_URL is set but FIREWORKS_API_KEY is not: put the key into the environment or into .env, "
                "point FIREWORKS_BASE_URL at a server that needs none, or select the demo's vectors by name with "
                f"SONGVEC_EMBEDDING_MODEL={DEMO_MODEL}"
            )
        if self.model_id in LOCAL_MODELS:
            raise SettingsError(f"SONGVEC_MODEL_ID: expected a name of no local model, got {self.model_id!r}: unset it")
        check_base_url(self.fireworks_base_url)
        return self

    @property
    def offline(self) -> bool:
        """Whether vectors are made in this process: by a local model's name, or because nothing else is configured."""
        real = self.fireworks_api_key or self.postgres_url or self.fireworks_base_url != FIREWORKS_BASE_URL
        return self.embedding_model in LOCAL_MODELS or not real

    @property
    def storage_location(self) -> str:
        """The folder of the store, or the URL of its objects; need not exist."""
        return self.storage or str(Path(".songvec") / ("main" if self.postgres_url else "demo"))

    @property
    def filters(self) -> list[str]:
        """The columns that searches may filter by."""
        return split_names(self.filter_columns)

    @property
    def price(self) -> float:
        """Dollars per million tokens; 0 for a self-hosted server, which needs no key."""
        is_self_hosted = self.fireworks_base_url != FIREWORKS_BASE_URL and not self.fireworks_api_key
        default = 0.0 if is_self_hosted else FIREWORKS_USD_PER_MILLION_TOKENS
        return default if self.usd_per_million_tokens is None else self.usd_per_million_tokens

    @property
    def model(self) -> str:
        """The model id: its name in cache, ledger and table. Requests ask for `embedding_model`."""
        if self.offline:
            return self.embedding_model if self.embedding_model in LOCAL_MODELS else DEMO_MODEL
        return self.model_id or self.embedding_model

    @property
    def dimensions(self) -> int:
        """Dimensions per vector: as set, except for the demo's model, which has a fixed number."""
        return DEMO_DIMENSIONS if self.model == DEMO_MODEL else self.embedding_dimensions


def split_names(given: str | None) -> list[str]:
    """The names of a list with commas."""
    return [each for each in map(str.strip, (given or "").split(",")) if each]


def describe_setting(field: FieldInfo) -> str:
    """A setting's meaning on one line, from its docstring."""
    return " ".join((field.description or "").split())


def variables() -> list[str]:
    """The names of all variables, in the order of the groups; a secret's is followed by that of its file."""
    fields = {variable(name): field for group in GROUPS for name, field in group.model_fields.items()}
    return [each for name, field in fields.items() for each in ((name,) if field.repr else (name, file_variable(name)))]
