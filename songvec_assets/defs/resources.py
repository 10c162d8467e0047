"""Resources: from the options of a run config to a `Pipeline`. An empty option reads its variable when the run starts.

Secrets, such as POSTGRES_URL and FIREWORKS_API_KEY, are never options, whose values Dagster stores and shows.
When to add here: an option of a run that is not a setting. Settings and their descriptions come from `settings`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Optional, get_origin

import dagster as dg
import sqlalchemy as sa
from pydantic import BaseModel, Field, create_model

from songvec_assets.defs.partitions import TILING
from songvec_assets.errors import SettingsError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Profile
from songvec_assets.settings import (
    PostgresSettings,
    ProviderSettings,
    RunSettings,
    Settings,
    StorageSettings,
    describe_setting,
)
from songvec_assets.settings_group import variable
from songvec_assets.songs.export import ExportMode
from songvec_assets.songs.ranges import SongIdRange, parse_span


def options_of(group: type[BaseModel]) -> dict[str, str]:
    """The options of a resource: the name of each setting of a group, and of its option."""
    return {name: name.removeprefix("fireworks_") for name, field in group.model_fields.items() if field.repr}


def with_options(group: type[BaseModel]) -> Any:
    """A base class for a resource that has a group's settings as options, all empty.

    A resource does not inherit from the group: Dagster passes a field's default as if it had been typed, so it would
    replace the environment's value, and a nested resource would read the environment when the graph loads.
    """
    options: dict[str, Any] = {}
    for name, option in options_of(group).items():
        field = group.model_fields[name]
        kind = str if get_origin(field.annotation) is Literal else field.annotation
        default = "unset" if field.default is None else str(field.default).replace("\n", "\\n")
        read = f"Empty: {variable(name)}, read when the run starts (default: {default})."
        options[option] = Optional[kind], Field(default=None, description=f"{describe_setting(field)} {read}")  # noqa: UP045
    return create_model(group.__name__, __base__=dg.ConfigurableResource, **options)


def given(group: type[BaseModel], resource: "dg.ConfigurableResource[Any]") -> dict[str, Any]:
    """The values of a resource's options, by the names of the settings; None: empty."""
    return {name: getattr(resource, option) for name, option in options_of(group).items()}


class PostgresResource(with_options(PostgresSettings)):  # type: ignore[misc]
    """The database with the songs and the embeddings: POSTGRES_URL, or the embedded server if that is unset."""

    def get_engine(self, profile: Profile = "batch") -> sa.Engine:
        """An SQLAlchemy engine with one of four pools: batch, web, parallel, autocommit."""
        return self._pipeline().database.get_engine(profile)

    @contextlib.contextmanager
    def get_connection(self, profile: Profile = "batch") -> Iterator[sa.Connection]:
        """A connection in a transaction."""
        with self._pipeline().database.get_connection(profile) as connection:
            yield connection

    def _pipeline(self) -> Pipeline:
        return Pipeline(Settings(**given(PostgresSettings, self)))


class FireworksResource(with_options(ProviderSettings)):  # type: ignore[misc]
    """The embeddings provider: Fireworks AI, or any OpenAI-compatible server; the demo's model if no key is set."""


class StorageResource(with_options(StorageSettings)):  # type: ignore[misc]
    """The folder of snapshots and cached embeddings, and how songs become texts."""


class RunResource(with_options(RunSettings)):  # type: ignore[misc]
    """What this run does and may spend; the same for all its steps."""

    postgres: dg.ResourceDependency[PostgresResource]
    fireworks: dg.ResourceDependency[FireworksResource]
    storage: dg.ResourceDependency[StorageResource]

    ranges: str = Field(
        default="",
        description=(
            "Ranges to embed, FIRST...LAST as in 000000000-000050000...000100000-000150000, or one key; only if the "
            "run is launched without partitions. Empty: all ranges that hold songs."
        ),
    )
    export_mode: ExportMode = Field(
        default="all",
        description="all compares every range with Postgres; append reads only above the highest exported song_id.",
    )
    confirm_deletions: bool = Field(
        default=False, description="Accept that songs missing in bulk were deleted on purpose, instead of stopping."
    )
    reembed: bool = Field(
        default=False,
        description=(
            "Embed all songs of the ranges again, and pay for them again. Re-executions of this run do not pay again."
        ),
    )
    retry_rejected: bool = Field(
        default=False, description="Send again the songs that the provider rejected. A refusal is not billed."
    )
    confirm_reembedding: bool = Field(
        default=False,
        description="Pay again for cached texts that a changed setting alters (template, maximum length, prompt).",
    )
    confirm_model_change: bool = Field(
        default=False,
        description="Continue even if the provider returns other vectors for the model than those that are cached.",
    )
    rebuild_index: bool = Field(default=False, description="Build the index even if the current one still fits.")

    def open(self, run_id: str = "") -> Pipeline:
        """What a run works with, from the environment and the resources' options.

        Args:
            run_id: of the run, which `songvec status` shows; empty: none.

        Raises:
            SettingsError: a setting does not parse, or settings contradict each other.
        """
        if self.ranges:
            parse_span(self.ranges, TILING)
        values = given(RunSettings, self) | given(PostgresSettings, self.postgres)
        values |= given(ProviderSettings, self.fireworks) | given(StorageSettings, self.storage)
        return Pipeline(Settings(**values), run_id=run_id)

    def choose_ranges(self, pipeline: Pipeline, launched: Sequence[str] | None) -> list[SongIdRange]:
        """The ranges to embed, in order.

        Args:
            launched: keys of the partitions that the run was launched for; None: it was launched without.
        """
        if launched is not None:
            if self.ranges:
                raise SettingsError(
                    "ranges: this run was launched for partitions: leave `ranges` empty, or launch the job without",
                    "settings.ranges",
                )
            return [SongIdRange.from_key(key) for key in launched]
        held = pipeline.held_ranges()
        if not held:
            return []
        first, last = parse_span(self.ranges, TILING) if self.ranges else (held[0], held[-1])
        return [each for each in held if first <= each <= last]


def make_resources(**prefilled: Mapping[str, Any]) -> dict[str, Any]:
    """The graph's resources; the launchpad prefills the given options.

    Args:
        prefilled: values by option, by resource.
    """

    def prefill(resource: type[Any], name: str) -> type[Any]:
        values: dict[str, Any] = {}
        for option, value in prefilled.get(name, {}).items():
            field = resource.model_fields[option]
            values[option] = field.annotation, Field(default=value, description=field.description)
        # a class of the same name and docstring: Dagster shows them as the resource's type and description
        return create_model(resource.__name__, __base__=resource, __doc__=resource.__doc__, **values)

    made: dict[str, Any] = {
        "postgres": prefill(PostgresResource, "postgres").configure_at_launch(),
        "fireworks": prefill(FireworksResource, "fireworks").configure_at_launch(),
        "storage": prefill(StorageResource, "storage").configure_at_launch(),
    }
    return made | {"run": prefill(RunResource, "run")(**made)}


RESOURCES = make_resources()


def present_values(group: type[BaseModel], *names: str) -> dict[str, Any]:
    """The values of some settings when the code location loads; none if one does not parse: a run then refuses it."""
    try:
        settings = group()
    except SettingsError:
        return {}
    return {name: getattr(settings, name) for name in names}
