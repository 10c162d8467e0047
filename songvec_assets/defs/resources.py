"""Resources: configuration to core objects. A field left empty reads its variable when the run starts.

Secrets (POSTGRES_URL, FIREWORKS_API_KEY, SONGVEC_WEBHOOK_URL) are never fields, whose values Dagster stores and shows.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import dagster as dg
import sqlalchemy as sa
from pydantic import Field, create_model

from songvec_assets.defs.partitions import TILING
from songvec_assets.deployment import Deployment
from songvec_assets.errors import SettingsError
from songvec_assets.postgres.engine import Profile
from songvec_assets.settings import Settings, read_setting
from songvec_assets.songs.export import ExportMode
from songvec_assets.songs.ranges import SongIdRange, Tiling

_SETTINGS = {each.metadata["variable"]: each for each in fields(Settings)}


def _setting(variable: str, words: str = "") -> Any:
    """A field that overrides a setting; its description is the setting's, with the default: the launchpad shows both.

    Args:
        variable: of the setting.
        words: what the field is, where the setting's own words do not fit a run's option.
    """
    setting = _SETTINGS[variable]
    default = "unset" if setting.default is None else str(setting.default).replace("\n", "\\n")
    words = words or f"{setting.metadata['help']}."
    return Field(default=None, description=f"{words} Empty: {variable}, read when the run starts (default: {default}).")


class PostgresResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database with the songs and the embeddings: POSTGRES_URL, or the embedded server where that is unset."""

    songs_table: str | None = _setting("SONGVEC_SONGS_TABLE")
    song_id_column: str | None = _setting("SONGVEC_SONG_ID_COLUMN")
    name_column: str | None = _setting("SONGVEC_NAME_COLUMN")
    artist_column: str | None = _setting("SONGVEC_ARTIST_COLUMN")
    lyrics_column: str | None = _setting("SONGVEC_LYRICS_COLUMN")
    updated_at_column: str | None = _setting("SONGVEC_UPDATED_AT_COLUMN")
    full_compare_hours: float | None = _setting("SONGVEC_FULL_COMPARE_HOURS")
    max_missing_share: float | None = _setting("SONGVEC_MAX_MISSING_SHARE")
    max_missing_range_share: float | None = _setting("SONGVEC_MAX_MISSING_RANGE_SHARE")
    vector_type: str | None = _setting("SONGVEC_VECTOR_TYPE")
    lists: int | None = _setting("SONGVEC_LISTS")
    index_memory_mb: int | None = _setting("SONGVEC_INDEX_MEMORY_MB")

    def get_engine(self, profile: Profile = "batch") -> sa.Engine:
        """An SQLAlchemy engine with one of three pools: batch, web, parallel."""
        return self._deployment().database.get_engine(profile)

    @contextlib.contextmanager
    def get_connection(self, profile: Profile = "batch") -> Iterator[sa.Connection]:
        """A connection in a transaction."""
        with self._deployment().database.get_connection(profile) as connection:
            yield connection

    def _deployment(self) -> Deployment:
        return Deployment(Settings.from_environment(**overrides(self)))


class FireworksResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The embeddings provider: Fireworks AI, or any OpenAI-compatible server; offline where no key is set."""

    base_url: str | None = _setting("FIREWORKS_BASE_URL")
    embedding_model: str | None = _setting("SONGVEC_EMBEDDING_MODEL")
    embedding_dimensions: int | None = _setting("SONGVEC_EMBEDDING_DIMENSIONS")
    query_prompt: str | None = _setting("SONGVEC_QUERY_PROMPT")
    document_prompt: str | None = _setting("SONGVEC_DOCUMENT_PROMPT")
    truncate: bool | None = _setting("SONGVEC_TRUNCATE")
    requests_per_minute: int | None = _setting("SONGVEC_REQUESTS_PER_MINUTE")
    tokens_per_minute: int | None = _setting("SONGVEC_TOKENS_PER_MINUTE")
    max_request_texts: int | None = _setting("SONGVEC_MAX_REQUEST_TEXTS")
    max_request_tokens: int | None = _setting("SONGVEC_MAX_REQUEST_TOKENS")
    patience_s: float | None = _setting("SONGVEC_PATIENCE_S")
    usd_per_million_tokens: float | None = _setting("SONGVEC_USD_PER_MILLION_TOKENS")


class StorageResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The folder of snapshots and cached embeddings, and how songs become texts."""

    storage: str | None = _setting("SONGVEC_STORAGE")
    retention_days: float | None = _setting("SONGVEC_RETENTION_DAYS")
    text_template: str | None = _setting("SONGVEC_TEXT_TEMPLATE")
    max_text_chars: int | None = _setting("SONGVEC_MAX_TEXT_CHARS")


OF_RUNS = ("max_usd", "max_usd_a_month", "concurrency", "target_recall", "swap")
"""Settings that are options of a run."""


class RunResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """What this run is to do and may spend; the same for all of its steps."""

    postgres: dg.ResourceDependency[PostgresResource]
    fireworks: dg.ResourceDependency[FireworksResource]
    storage: dg.ResourceDependency[StorageResource]

    max_usd: float | None = _setting("SONGVEC_MAX_USD", "Budget in dollars, 0 or more: the run stops before it.")
    max_usd_a_month: float | None = _setting("SONGVEC_MAX_USD_A_MONTH", "Budget of the calendar month over all runs.")
    ranges: str = Field(
        default="",
        description=(
            "Ranges to embed, FIRST...LAST as in 000000000-000050000...000100000-000150000, or one key; of a run that "
            "is launched without partitions. Empty: all that hold songs."
        ),
    )
    export_mode: ExportMode = Field(
        default="all",
        description="all compares every range with Postgres; append reads only above the highest song_id seen.",
    )
    confirm_deletions: bool = Field(
        default=False,
        description="Songs that are missing in bulk in the source are meant to be deleted: do not stop for them.",
    )
    embed_anew: bool = Field(
        default=False,
        description="Embed, and pay for, all songs of the ranges again. Re-executions of this run do not pay again.",
    )
    retry_rejected: bool = Field(
        default=False, description="Send songs again that the provider rejected before; what it refuses is not billed."
    )
    confirm_reembedding: bool = Field(
        default=False,
        description="Pay again for cached texts that a changed setting makes otherwise (template, length, prompt).",
    )
    confirm_model_change: bool = Field(
        default=False,
        description="Go on though the provider gives other vectors under the model's name than in earlier runs.",
    )
    rebuild_index: bool = Field(default=False, description="Build the index even where the one there still fits.")
    concurrency: int | None = _setting("SONGVEC_CONCURRENCY", "Requests in flight, 1 to 1,000.")
    target_recall: float | None = _setting("SONGVEC_TARGET_RECALL", "Recall that searches must reach, over 0, up to 1.")
    swap: bool | None = _setting("SONGVEC_SWAP", "Build another model, size or type beside, and swap it in.")

    def open(self) -> Deployment:
        """What a run works with, from the environment and the resources' fields.

        Raises:
            SettingsError: a setting does not parse, or settings contradict each other.
        """
        given = {name: getattr(self, name) for name in OF_RUNS}
        for resource in (self.postgres, self.fireworks, self.storage):
            given |= overrides(resource)
        if self.ranges:
            parse_span(self.ranges, TILING)
        return Deployment(Settings.from_environment(**given))

    def choose_ranges(self, deployment: Deployment, launched: Sequence[str] | None) -> list[SongIdRange]:
        """The ranges to embed, in order.

        Args:
            deployment: of this run.
            launched: keys of the partitions that the run was launched for; None: it was launched without.
        """
        if launched is not None:
            if self.ranges:
                raise SettingsError(
                    "ranges: this run was launched for partitions: leave `ranges` empty, or launch the job without"
                )
            return [SongIdRange.from_key(key) for key in launched]
        held = deployment.held_ranges()
        if not held:
            return []
        first, last = parse_span(self.ranges, TILING) if self.ranges else (held[0], held[-1])
        return [each for each in held if first <= each <= last]


def make_resources(**defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The graph's resources, with defaults of some fields that differ from the usual ones.

    Args:
        defaults: field names to values, by resource; the launchpad is prefilled with them.
    """

    def of(resource: type[Any], name: str) -> type[Any]:
        given: dict[str, Any] = {}
        for field, value in defaults.get(name, {}).items():
            declared = resource.model_fields[field]
            given[field] = declared.annotation, Field(default=value, description=declared.description)
        # a class of the same name: Dagster takes its docstring as the resource's description
        return (
            create_model(resource.__name__, __base__=resource, __doc__=resource.__doc__, **given) if given else resource
        )

    made: dict[str, Any] = {
        "postgres": of(PostgresResource, "postgres").configure_at_launch(),
        "fireworks": of(FireworksResource, "fireworks").configure_at_launch(),
        "storage": of(StorageResource, "storage").configure_at_launch(),
    }
    return made | {"run": of(RunResource, "run")(**made)}


RESOURCES = make_resources()


def present_values(*variables: str) -> dict[str, Any]:
    """What settings are as the code location loads, by resource; none where one does not parse: a run refuses it."""
    try:
        return {_SETTINGS[each].name: read_setting(_SETTINGS[each], os.environ) for each in variables}
    except SettingsError:
        return {}


def parse_span(words: str, tiling: Tiling) -> tuple[SongIdRange, SongIdRange]:
    """The first and last range of FIRST...LAST, or of one key.

    Raises:
        SettingsError: they are no ranges of the graph, or not in their order.
    """
    first, _, last = words.partition("...")
    try:
        span = SongIdRange.from_key(first.strip()), SongIdRange.from_key((last or first).strip())
    except ValueError as error:
        raise SettingsError(f"ranges: {error} for each end of FIRST...LAST") from error
    if not {*span} <= {*tiling} or span[0] > span[1]:
        raise SettingsError(f"ranges: FIRST...LAST names no ranges of this graph in their order, got {words!r}")
    return span


def overrides(resource: "dg.ConfigurableResource[Any]") -> dict[str, Any]:
    """A resource's fields under the names that `Settings` has for them."""
    names = {"base_url": "fireworks_base_url"}
    return {names.get(name, name): getattr(resource, name) for name in type(resource).model_fields}
