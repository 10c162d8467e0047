"""From settings to what a run works with: which store, cache, table and index belong together.

Everything is opened when it is first used. When to add here: another object that a run works with. Keep out: what a
search works with, too (`access`), and what a run does (`pipeline`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property

from songvec_assets import inventory
from songvec_assets.access import Access
from songvec_assets.cache.model_cache import ModelCache, lock_name
from songvec_assets.cache.store import Store, bind_store, look_up, open_store
from songvec_assets.cache.texts import choose_prompts, read_record
from songvec_assets.embedding.pricing import UTF8_BYTES_PER_TOKEN, Quota, TokenEstimator
from songvec_assets.embedding.prompts import Prompts
from songvec_assets.embedding.spending import SpendingLog
from songvec_assets.inventory import Inventory
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.postgres.schema import ensure_schema
from songvec_assets.songs.boilerplate import Boilerplate, find_boilerplate, sample_lyrics
from songvec_assets.songs.counts import check_ids, count_ranges, get_numbers
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.storage import Storage, open_storage
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.spec import TableSpec
from songvec_assets.vectors.swap import WantedTable
from songvec_assets.vectors.table import VectorTable


class Wiring(Access):
    """The objects that a run works with; `Access` has those that a search needs, too."""

    @property
    def tiling(self) -> Tiling:
        """How song_ids are divided into ranges."""
        given = self.settings
        return Tiling(width=given.range_size, stop=given.song_id_stop, start=given.song_id_start)

    @cached_property
    def storage(self) -> Storage:
        """The folder or the objects of the store; need not exist."""
        return open_storage(self.settings.storage_location)

    @cached_property
    def store(self) -> Store:
        """The storage root. Reading it creates, binds and divides nothing.

        Until `bind` applies a raised stop, its tiling is the previous one.

        Raises:
            StoreError: it belongs to another database.
        """
        return look_up(self.storage, self.tiling, self.database)

    def bind(self) -> None:
        """Prepare storage root and database for writing, and record in each that they belong together.

        Raises:
            StoreError: they do not belong together.
            SourceError: they are new to each other, and the database has no songs: its URL may be mistyped.
            DatabaseError: our schema or the extension cannot be created.
        """
        for name in ("store", "prompts"):  # another process may have bound it, or filled the cache, meanwhile
            self.__dict__.pop(name, None)
        if not self.store.bound:
            # before there is a store: else it would be bound to a tiling that does not fit the ids
            check_ids(self.source, self.tiling)
        ensure_schema(self.database)
        store = open_store(self.storage, self.tiling, guard=self._lock_tail)
        bind_store(store, self.database)
        self.store = store

    @contextlib.contextmanager
    def _lock_tail(self, store: Store) -> Iterator[None]:
        bind_store(store, self.database)
        with self.lock_range(store.tiling.tail, self.stop.check, self.stop.check):
            yield

    def lock_range(
        self, song_range: SongIdRange, on_wait: Callable[[], None], check: Callable[[], None]
    ) -> AbstractContextManager[Callable[[], None]]:
        """Keep every other run on this database from filling a range; see `hold_lock`."""
        return hold_lock(self.database, lock_name(song_range), on_wait=on_wait, check=check)

    # the songs and their texts

    @cached_property
    def prompts(self) -> Prompts:
        """What the model is given around queries and texts; see `choose_prompts`. Read once, without a database."""
        return choose_prompts(self.storage, self.settings)

    def find_boilerplate(self, n_songs: Mapping[SongIdRange, int] | None = None) -> Boilerplate:
        """What a sample of the source's lyrics holds that is no lyric; nothing if lyrics are not embedded.

        Args:
            n_songs: of the source, by range; None: of the snapshots, or counted if there are none.
        """
        if "{lyrics}" not in self.settings.text_template:
            return Boilerplate()
        n_songs = n_songs or self.store.songs.count() or get_numbers(count_ranges(self.source, self.tiling))
        return find_boilerplate(sample_lyrics(self.source, sorted(n_songs)), sum(n_songs.values()))

    # the cache and what it costs

    @property
    def cache(self) -> ModelCache:
        """The cache of the configured model."""
        return self.store.embeddings(self.settings.model, self.settings.dimensions)

    @property
    def quota(self) -> Quota:
        """What the provider allows per minute and per request, by the settings."""
        given = self.settings
        return Quota(
            given.requests_per_minute, given.tokens_per_minute, given.max_request_texts, given.max_request_tokens
        )

    @property
    def spending(self) -> SpendingLog:
        """The record of the last run that sent anything, and of the bytes that the model's tokens have."""
        return SpendingLog(self.database, self.settings.model)

    def token_estimator(self) -> TokenEstimator:
        """An estimator that starts from what earlier runs learned about the model."""
        return TokenEstimator(self.spending.read_bytes_per_token() or UTF8_BYTES_PER_TOKEN)

    # the table

    @property
    def table(self) -> VectorTable:
        """The serving table."""
        return VectorTable(self.database)

    @property
    def table_spec(self) -> TableSpec:
        """Model, size, type and prompts that the table should have."""
        given = self.settings
        prompts = self.prompts
        record = read_record(self.cache.storage)
        # the cached vectors' prompt, even if another one is set and nothing was embedded with it yet
        document = record.document_prompt if record else prompts.document
        return TableSpec(given.model, given.dimensions, given.vector_type, prompts.query, document)

    @property
    def index_settings(self) -> IndexSettings:
        """How the index should be made."""
        given = self.settings
        memory_bytes = (given.index_memory_mb or 0) * (1 << 20) or None
        return IndexSettings(given.lists, given.target_recall, memory_bytes, kind=given.index_kind)

    @property
    def wanted_table(self) -> WantedTable:
        """What a load works towards: the table's spec and index, and whether it may replace the serving table."""
        return WantedTable(self.table_spec, self.index_settings, self.settings.swap)

    @property
    def load_source(self) -> LoadSource:
        """What the table is loaded from: the cache, and the snapshots that say which songs there are."""
        return LoadSource(self.cache, self.tiling, self.store.songs)

    # the ranges

    def read_inventory(self, with_table: bool = True, with_source: bool = True) -> Inventory:
        """The state of each range; see `inventory.read`.

        Args:
            with_table: whether to look at the table and its ledger.
            with_source: whether to count the songs of the source.
        """
        # divided as the files are: a raised stop changes them at the next export
        counts = count_ranges(self.source, self.store.tiling) if with_source else None
        table = self.table if with_table else None
        return inventory.read(self.load_source, self.text_spec.identity, self.server, table, counts)
