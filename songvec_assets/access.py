"""From settings to what searches and runs both work with: the database, the songs table and the embedder.

Everything is opened when it is first used. Needs no store and imports no frames: a search starts at once. When to add
here: another object that a search works with. Keep out: what only a run works with (`wiring`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Self

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import Embedder, Endpoint, Patience
from songvec_assets.embedding.pricing import Price, TokenEstimator
from songvec_assets.embedding.prompts import Prompts, default_prompts
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.postgres import schema
from songvec_assets.postgres.embedded import create_songs_table, start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.server import DEFAULT_FOLDER
from songvec_assets.postgres.urls import parse_url
from songvec_assets.progress import StopSignal
from songvec_assets.settings import DEMO_MODEL, LOCAL_MODELS, Settings
from songvec_assets.songs.source import SongsSource, find_source
from songvec_assets.songs.text import TextSpec
from songvec_assets.vectors.spec import read_spec


@dataclass
class Access:
    """The objects that searches and runs both work with.

    Attributes:
        settings: parsed.
        stop: once set, ends the step that is running.
        run_id: of the Dagster run, which `songvec status` shows; empty: none.
    """

    settings: Settings
    stop: StopSignal = field(default_factory=StopSignal)
    run_id: str = ""

    def describe(self) -> str:
        """One line: where songs come from, and where vectors are made."""
        given = self.settings
        if given.offline:
            what = "a small model" if given.model == DEMO_MODEL else "spelling, not meaning"
            embedder = f"DEMO vectors ({given.model}: {what}; FIREWORKS_API_KEY makes real ones)"
        else:
            alias = f", as {given.model}" if given.model != given.embedding_model else ""
            embedder = f"{given.embedding_model} at {given.fireworks_base_url}{alias}"
        return f"{self.database.describe()}, {embedder}, {given.dimensions} dimensions"

    @cached_property
    def database(self) -> Database:
        """The database given by URL, or the embedded one with the sample songs."""
        if self.settings.postgres_url:
            if self.settings.direct_url:
                parse_url(self.settings.direct_url, "SONGVEC_DIRECT_URL")
            database = Database(self.settings.postgres_url, direct_url=self.settings.direct_url, run_id=self.run_id)
        else:
            database = replace(start_embedded_server(DEFAULT_FOLDER), run_id=self.run_id)
            create_songs_table(database, self.settings.range_size)
        with database.get_connection() as connection:
            is_ours = schema.has_tables(connection)
        # a database without our tables is not written to until `bind`: its URL may be mistyped
        if is_ours:
            schema.ensure_schema(database)
        return database

    def cancel(self) -> None:
        """Ask the running step to end early, keeping what it has. Callable from any thread."""
        self.stop.set()
        if "database" in self.__dict__:
            self.database.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pooled connections to the database, if it was used."""
        if "database" in self.__dict__:
            self.database.close()

    @cached_property
    def source(self) -> SongsSource:
        """The songs table, found and checked."""
        return find_source(self.database, self.settings, self.text_spec)

    @property
    def filter_columns(self) -> tuple[str, ...]:
        """The columns of the songs table that searches may filter by."""
        return (self.source.song_id_column, *self.settings.filters)

    @property
    def prompts(self) -> Prompts:
        """What the model is given around queries and texts: as set, else the defaults of its family."""
        given = self.settings
        default = default_prompts(given.model, given.embedding_model)
        return Prompts(given.query_prompt or default.query, given.document_prompt or default.document)

    @property
    def text_spec(self) -> TextSpec:
        """How a song becomes a text."""
        return TextSpec(self.settings.text_template, self.settings.max_text_chars, self.prompts.document)

    @property
    def server(self) -> str:
        """What makes the vectors: the provider's URL, or the local model. A rejection is that of one server."""
        return self.settings.model if self.settings.offline else self.settings.fireworks_base_url

    @property
    def price(self) -> Price:
        """What tokens cost; offline vectors cost nothing."""
        return Price(0.0 if self.settings.offline else self.settings.price)

    def check_model(self) -> None:
        """Refuse a local model that is not installed, before anything is done; the SettingsError says how to."""
        if self.settings.model == DEMO_MODEL:
            from songvec_assets.embedding.demo import find_files

            find_files()

    def embedder(
        self,
        estimator: TokenEstimator | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
        check_probe: Callable[[Float32Matrix], None] = lambda _: None,
        patience_s: float = math.inf,
    ) -> Embedder:
        """A new embedder, for one event loop; see `EmbeddingClient` and `Patience`.

        Args:
            patience_s: how long a failing provider is retried, if the setting is longer.
        """
        given = self.settings
        if given.offline:
            from songvec_assets.embedding.demo import DemoEmbedder
            from songvec_assets.embedding.offline import OfflineEmbedder

            return DemoEmbedder() if given.model == DEMO_MODEL else OfflineEmbedder(given.dimensions)
        from songvec_assets.embedding.client import EmbeddingClient
        from songvec_assets.embedding.limits import RateLimiter

        url, engine = given.fireworks_base_url, self.database.get_engine("autocommit")
        return EmbeddingClient(
            Endpoint(url, given.fireworks_api_key, given.embedding_model, given.dimensions, given.truncate),
            RateLimiter(engine, url, given.requests_per_minute, given.tokens_per_minute),
            Patience(min(given.patience_s, patience_s), given.concurrency, self.stop, on_trouble),
            estimator,
            check_probe,
        )

    def search_budget(self, known: Budget | None = None) -> Budget:
        """What searches may spend this month; all doors and processes share it.

        Args:
            known: returned if it is of this month. Not for threads, which would wait in each other's event loops.
        """
        given = self.settings
        month = f"searches {datetime.now(UTC):%Y-%m}"
        if known is not None and known.run == month:
            return known
        engine = self.database.get_engine("autocommit")
        return Budget(self.price, engine, month, given.max_search_usd_a_month, given.max_usd_a_month)

    def with_settings(self, settings: Settings) -> Self:
        """The same with other settings and the same opened database, which is closed and cancelled with this one."""
        other = replace(self, settings=settings)
        other.database = self.database
        return other

    def as_loaded(self) -> Self:
        """The same for the model, size and type of the serving table: after a swap, searches need no new settings."""
        given = self.settings
        with self.database.get_connection("web") as connection:
            loaded = read_spec(connection)
        if loaded is None or (loaded.model in LOCAL_MODELS) != given.offline:
            return self
        # a prompt, and a provider's name, that are set belong to the model that is set
        is_same = loaded.model == given.model
        changed = {
            "query_prompt": (given.query_prompt if is_same else None)
            or loaded.query_prompt
            or default_prompts(loaded.model, given.embedding_model).query,
            "embedding_model": given.embedding_model if is_same else loaded.model,
            "model_id": loaded.model,
            "embedding_dimensions": loaded.dimensions,
            "vector_type": loaded.vector_type,
        }
        return self.with_settings(given.model_copy(update=changed))
