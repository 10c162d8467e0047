"""Resources: configuration to core objects. A field left empty reads its variable when the run starts.

Secrets (POSTGRES_URL, FIREWORKS_API_KEY) are never fields: Dagster stores and shows the values of fields.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import dagster as dg
import sqlalchemy as sa
from pydantic import Field

from songvec_assets.defs.partitions import TILING
from songvec_assets.deployment import Deployment
from songvec_assets.postgres.engine import Profile
from songvec_assets.settings import Settings


def _setting(variable: str) -> Any:
    return Field(default=None, description=f"Overrides {variable}; empty: that variable, read when the run starts.")


class PostgresResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database with the songs and the embeddings: POSTGRES_URL, or the embedded server where that is unset."""

    songs_table: str | None = _setting("SONGVEC_SONGS_TABLE")
    song_id_column: str | None = _setting("SONGVEC_SONG_ID_COLUMN")
    name_column: str | None = _setting("SONGVEC_NAME_COLUMN")
    artist_column: str | None = _setting("SONGVEC_ARTIST_COLUMN")
    lyrics_column: str | None = _setting("SONGVEC_LYRICS_COLUMN")
    updated_at_column: str | None = _setting("SONGVEC_UPDATED_AT_COLUMN")
    vector_type: str | None = _setting("SONGVEC_VECTOR_TYPE")
    lists: int | None = _setting("SONGVEC_LISTS")
    target_recall: float | None = _setting("SONGVEC_TARGET_RECALL")
    index_memory_mb: int | None = _setting("SONGVEC_INDEX_MEMORY_MB")
    swap: bool | None = _setting("SONGVEC_SWAP")

    def get_engine(self, profile: Profile = "batch") -> sa.Engine:
        """An SQLAlchemy engine with one of three pools: batch, web, parallel."""
        return self._deployment().database.get_engine(profile)

    @contextlib.contextmanager
    def get_connection(self, profile: Profile = "batch") -> Iterator[sa.Connection]:
        """A connection in a transaction."""
        with self._deployment().database.get_connection(profile) as connection:
            yield connection

    def _deployment(self) -> Deployment:
        return Deployment(Settings.from_environment(**overrides(self)), TILING)


class FireworksResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The embeddings provider: Fireworks AI, or any OpenAI-compatible server; offline where no key is set."""

    base_url: str | None = _setting("FIREWORKS_BASE_URL")
    embedding_model: str | None = _setting("SONGVEC_EMBEDDING_MODEL")
    embedding_dimensions: int | None = _setting("SONGVEC_EMBEDDING_DIMENSIONS")
    requests_per_minute: int | None = _setting("SONGVEC_REQUESTS_PER_MINUTE")
    tokens_per_minute: int | None = _setting("SONGVEC_TOKENS_PER_MINUTE")
    max_request_texts: int | None = _setting("SONGVEC_MAX_REQUEST_TEXTS")
    max_request_tokens: int | None = _setting("SONGVEC_MAX_REQUEST_TOKENS")
    concurrency: int | None = _setting("SONGVEC_CONCURRENCY")
    patience_s: float | None = _setting("SONGVEC_PATIENCE_S")
    max_usd: float | None = _setting("SONGVEC_MAX_USD")
    usd_per_million_tokens: float | None = _setting("SONGVEC_USD_PER_MILLION_TOKENS")


class StorageResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The folder of snapshots and cached embeddings, and how songs become texts."""

    storage: str | None = _setting("SONGVEC_STORAGE")
    text_template: str | None = _setting("SONGVEC_TEXT_TEMPLATE")
    max_text_chars: int | None = _setting("SONGVEC_MAX_TEXT_CHARS")


def overrides(resource: "dg.ConfigurableResource[Any]") -> dict[str, Any]:
    """A resource's fields under the names that `Settings` has for them."""
    names = {"base_url": "fireworks_base_url"}
    return {names.get(name, name): getattr(resource, name) for name in type(resource).model_fields}


def open_deployment(postgres: PostgresResource, fireworks: FireworksResource, storage: StorageResource) -> Deployment:
    """What a run works with, from the environment and the resources' fields.

    Raises:
        SettingsError: a setting does not parse, or settings contradict each other.
    """
    given = overrides(postgres) | overrides(fireworks) | overrides(storage)
    return Deployment(Settings.from_environment(**given), TILING)
