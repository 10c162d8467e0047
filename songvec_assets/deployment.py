"""From settings to core objects: which database, which store, which embedder belong together in a run.

The composition root below Dagster: the assets and the command line both start here. It decides nothing but that.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from songvec_assets import inventory
from songvec_assets.cache.fill import Filler, Spending
from songvec_assets.cache.plan import FillPlan, estimate_fills, plan_fill
from songvec_assets.cache.shards import ModelCache, lock_name
from songvec_assets.cache.store import Store, bind_store, check_pair, find_store, open_store
from songvec_assets.cache.texts import TextRecord, check_reembedding, read_record, write_record
from songvec_assets.embedding.budget import Budget, MonthSpending, read_month_spending
from songvec_assets.embedding.client import Embedder, EmbeddingClient
from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.embedding.limits import RateLimiter
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.embedding.pricing import Estimate, Price, Quota, TokenEstimator
from songvec_assets.embedding.prompts import NO_PROMPTS, Prompts, default_prompts
from songvec_assets.errors import ProviderError
from songvec_assets.inventory import Inventory
from songvec_assets.known import CachedOrLoaded
from songvec_assets.postgres import schema
from songvec_assets.postgres.embedded import DEFAULT_FOLDER, create_songs_table, start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import ensure_schema, has_tables, hold_lock, read_fact, write_fact
from songvec_assets.postgres.urls import parse_url
from songvec_assets.progress import ReportProgress, RunContext, StopSignal, ignore_progress
from songvec_assets.search.nearest import check_searchable, check_server, embed_query
from songvec_assets.search.preview import Preview, preview_table
from songvec_assets.settings import DEMO_MODEL, LOCAL_MODELS, Settings
from songvec_assets.songs.absence import Absence, AbsenceGuard, AbsenceLimits
from songvec_assets.songs.boilerplate import Boilerplate, find_boilerplate, sample_lyrics
from songvec_assets.songs.counts import RangeCount, check_ids, count_ranges
from songvec_assets.songs.export import ExportMode, ExportOptions, ExportReport, cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.source import SongsSource, SourceNames, find_source
from songvec_assets.songs.text import TextSpec
from songvec_assets.vectors.index.neighbors import LoadedRows
from songvec_assets.vectors.index.preflight import check_target
from songvec_assets.vectors.index.upkeep import IndexReport, IndexSettings, bring_index_up_to_date
from songvec_assets.vectors.plan import LoadSource
from songvec_assets.vectors.swap import PublishReport, WantedTable, check_publishable, publish_embeddings
from songvec_assets.vectors.table import TableSpec, VectorTable

SPENDING = "spending of the last run"
DAY_S = 86_400.0


@dataclass
class Deployment:
    """What a run works with. Everything is opened when it is first asked for.

    Attributes:
        settings: parsed.
        stop: ends whatever of this deployment is running.
    """

    settings: Settings
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def tiling(self) -> Tiling:
        """How song_ids are cut into ranges."""
        each = self.settings
        return Tiling(width=each.range_size, stop=each.song_id_stop, start=each.song_id_start)

    @cached_property
    def database(self) -> Database:
        """The database given by URL, or the embedded one with the sample songs."""
        if self.settings.postgres_url:
            if self.settings.direct_url:
                parse_url(self.settings.direct_url, "SONGVEC_DIRECT_URL")
            database = Database(self.settings.postgres_url, direct_url=self.settings.direct_url)
        else:
            database = start_embedded_server(DEFAULT_FOLDER)
            create_songs_table(database, self.settings.range_size)
        with database.get_connection() as connection:
            is_ours = has_tables(connection)
        # one without our tables is only looked at, until `bind`: its URL may be mistyped
        if is_ours:
            ensure_schema(database)
        return database

    @cached_property
    def store(self) -> Store:
        """The storage root, only looked at: nothing is created, bound or cut. Another database's is refused.

        Until a raised stop is applied by `bind`, its tiling is the one before.
        """
        return self._look()

    def _look(self) -> Store:
        store = find_store(self.storage_root, self.tiling) or Store(self.storage_root, "", self.tiling)
        check_pair(store, self.database)
        return store

    def bind(self) -> None:
        """Make storage root and database ready to be written to, and let them know each other from now on.

        All that writes to either begins with it; what only looks, binds nothing.

        Raises:
            StoreError: they do not belong together.
            SourceError: they are new to each other, and the database has no songs: its URL may be mistyped.
            DatabaseError: our schema or the extension cannot be created.
        """
        # again: another process may have bound it meanwhile
        if not self._look().bound:
            # before there is a store: it would be bound to a cut that cannot serve
            check_ids(self.database, self.source, self.tiling, count_ranges(self.database, self.source, self.tiling))
        ensure_schema(self.database)
        store = open_store(self.storage_root, self.tiling, guard=self._tail_lock)
        bind_store(store, self.database)
        self.store = store

    @contextlib.contextmanager
    def _tail_lock(self, store: Store) -> Iterator[None]:
        bind_store(store, self.database)
        with self.lock_range(store.tiling.tail, self.stop.check, self.stop.check):
            yield

    @property
    def storage_root(self) -> Path:
        """The folder of the store, whether it is there or not."""
        default = Path(".songvec") / ("main" if self.settings.postgres_url else "demo")
        return Path(self.settings.storage) if self.settings.storage else default

    @property
    def cache(self) -> ModelCache:
        """What is cached of the configured model."""
        return self.store.embeddings(self.settings.model, self.settings.dimensions)

    @property
    def prompts(self) -> Prompts:
        """What the model is given with queries and texts: as set, else as recorded with its cache, else its family's.

        A cache from before there were records has no document prompt. Asks no database.
        """
        each, default = self.settings, default_prompts(self.settings.model)
        query, document = each.query_prompt or default.query, each.document_prompt or default.document
        cache = Store(self.storage_root, "", self.tiling).embeddings(each.model, each.dimensions)
        record = read_record(cache)
        if record is not None:
            return Prompts(each.query_prompt or record.query_prompt, each.document_prompt or record.document_prompt)
        if cache.ranges():
            return Prompts(query, each.document_prompt or NO_PROMPTS.document)
        return Prompts(query, document)

    @property
    def table_spec(self) -> TableSpec:
        """What the table is to hold."""
        each, prompts, record = self.settings, self.prompts, read_record(self.cache)
        # of the vectors that are there, also while another one is set and not embedded yet
        document = record.document_prompt if record else prompts.document
        return TableSpec(each.model, each.dimensions, each.vector_type, prompts.query, document)

    @property
    def table(self) -> VectorTable:
        """What searches read."""
        return VectorTable(self.database)

    @property
    def wanted_table(self) -> WantedTable:
        """What searches are to find."""
        return WantedTable(self.table_spec, self.index_settings, self.settings.swap)

    @property
    def load_source(self) -> LoadSource:
        """What the table is loaded from."""
        return LoadSource(self.cache, self.tiling, self.store.songs)

    @property
    def index_settings(self) -> IndexSettings:
        """How the table is to be indexed."""
        each = self.settings
        memory = each.index_memory_mb * (1 << 20) if each.index_memory_mb else None
        return IndexSettings(each.lists, each.target_recall, memory)

    @cached_property
    def source(self) -> SongsSource:
        """The songs table, found and checked."""
        names = (
            "song_id_column", "name_column", "artist_column", "lyrics_column", "updated_at_column"
        )  # fmt: skip
        chosen = {name: getattr(self.settings, name) for name in names}
        return find_source(self.database, SourceNames(self.settings.songs_table, **chosen), self.text_spec)

    def held_ranges(self) -> list[SongIdRange]:
        """The ranges that hold songs or cache, in order.

        Raises:
            SettingsError, SourceError: songs have ids that the ranges do not reach; see `check_ids`.
        """
        counts = count_ranges(self.database, self.source, self.tiling)
        check_ids(self.database, self.source, self.tiling, counts)
        tiles, held = {*self.tiling}, {*counts}
        for song_range in self.cache.ranges():
            # a tail that was cut otherwise, before the stop was raised, is cut into ranges from its start on
            known = song_range in tiles
            start = max(song_range.start, self.tiling.start)
            held |= {song_range} if known else {self.tiling.range_of(start), self.tiling.tail}
        return sorted(held)

    def ranges_behind(self) -> list[SongIdRange]:
        """The ranges whose snapshot is not answered in full by the cache, in order."""
        tiles = {*self.tiling}
        # a range that was divided otherwise, before the stop was raised, is replaced by the next export
        return [
            row.range
            for row in self.read_inventory().rows
            if row.snapshot and row.range in tiles and not row.is_answered
        ]

    def read_inventory(
        self, table: VectorTable | None = None, counts: Mapping[SongIdRange, RangeCount] | None = None
    ) -> Inventory:
        """What state each range is in; see `inventory.read`."""
        question = inventory.Question(self.text_spec.identity, self.server)
        return inventory.read(self.load_source, question, table, counts)

    def month_spending(self) -> MonthSpending:
        """Dollars of this month, over all runs on this database."""
        with self.database.get_connection() as connection:
            return read_month_spending(connection)

    @property
    def known_songs(self) -> CachedOrLoaded:
        """The songs that were paid for or are served."""
        return CachedOrLoaded(self.database, self.cache, self.tiling)

    @property
    def absence_limits(self) -> AbsenceLimits:
        """How many of them may be missing in the source."""
        return AbsenceLimits(self.settings.max_missing_share, self.settings.max_missing_range_share)

    def find_absence(self) -> Absence:
        """The songs that an export would take for deleted; see `AbsenceGuard.find`. Changes nothing."""
        counts = count_ranges(self.database, self.source, self.tiling)
        guard = AbsenceGuard(self.known_songs, self.absence_limits)
        return guard.find(self.database, self.source, self.store.songs, counts, self.stop.check)

    def export(
        self, mode: ExportMode = "all", progress: ReportProgress = ignore_progress, confirm_deletions: bool = False
    ) -> ExportReport:
        """Bring the snapshots to the state of the source; see `cache_songs_to_parquet`."""
        self.bind()
        options = ExportOptions(
            mode,
            # an empty snapshot says that a range's songs were deleted; none says nothing
            kept={*self.cache.ranges(), *self.table.ledger.find_ranges(self.tiling)},
            guard=AbsenceGuard(self.known_songs, self.absence_limits, confirm_deletions),
            full_compare_hours=self.settings.full_compare_hours,
        )
        run = RunContext(progress, self.stop)
        return cache_songs_to_parquet(self.database, self.source, self.store.songs, self.tiling, options, run)

    def estimate(self, ranges: Collection[SongIdRange] | None = None, anew: bool = False) -> Estimate:
        """What a run over the snapshots would send, and its price.

        Args:
            ranges: to embed; None: all.
            anew: whether all their songs are to be embedded again.
        """
        tiles = {*self.tiling}
        rows = [
            row
            for row in self.read_inventory().rows
            if row.snapshot and (ranges is None or row.range in ranges or row.range not in tiles)
        ]
        answered = [] if anew else [row for row in rows if row.is_answered]

        def plan() -> Iterator[FillPlan]:
            for row in rows:
                if row not in answered:
                    self.stop.check()
                    shard = self.cache.open(row.range)
                    since = shard.n_rows if anew else 0
                    yield plan_fill(self.store.songs, shard, self.text_spec, since, self.server)

        estimate = estimate_fills(plan(), self.token_estimator(), self.price, self.quota)
        return replace(estimate, n_songs=estimate.n_songs + sum(row.n_songs for row in answered))

    def find_boilerplate(self) -> Boilerplate:
        """What a sample of the lyrics in the source has that is no lyric; nothing where lyrics are not embedded."""
        if "{lyrics}" not in self.settings.text_template:
            return Boilerplate()
        counts = count_ranges(self.database, self.source, self.tiling)
        n_songs = sum(each.n_songs for each in counts.values())
        return find_boilerplate(sample_lyrics(self.database, self.source, sorted(counts)), n_songs)

    def describe_boilerplate(self) -> list[str]:
        """The same in words, with the view that cleans the lyrics; empty where there is little of it."""
        found = self.find_boilerplate()
        if not found.is_common:
            return []
        bytes_per_token = self.token_estimator().bytes_per_token
        return [f"lyrics: {found.describe(bytes_per_token)}", f"To embed them without it: {found.view(self.source)}"]

    def index(self, rebuild: bool = False, progress: ReportProgress = ignore_progress) -> IndexReport:
        """Build the index where that is worth it; see `bring_index_up_to_date`."""
        wanted = replace(self.index_settings, rebuild=rebuild)
        run = RunContext(progress, self.stop)
        return bring_index_up_to_date(self.table, self.cache, self.table_spec, wanted, run)

    def preview(self) -> Preview:
        """What a person looks at to see that the vectors mean something; see `preview_table`."""
        return preview_table(LoadedRows.of(self.table, self.cache), self.source, self.table_spec)

    @property
    def text_spec(self) -> TextSpec:
        """How a song becomes a text."""
        return TextSpec(self.settings.text_template, self.settings.max_text_chars, self.prompts.document)

    @property
    def quota(self) -> Quota:
        """What the provider allows."""
        each = self.settings
        return Quota(each.requests_per_minute, each.tokens_per_minute, each.max_request_texts, each.max_request_tokens)

    @property
    def price(self) -> Price:
        """What tokens cost; offline vectors cost nothing."""
        return Price(0.0 if self.settings.offline else self.settings.price)

    def token_estimator(self) -> TokenEstimator:
        """An estimator that knows what earlier runs learned about the model."""
        learned = self._learned_bytes_per_token()
        return TokenEstimator(learned) if learned else TokenEstimator()

    def _learned_bytes_per_token(self) -> float | None:
        with self.database.get_connection() as connection:
            learned: float | None = read_fact(connection, self._bytes_per_token_fact)
        return learned

    def _keep_spending(self, is_first: bool, spending: Spending) -> None:
        spending = replace(spending, is_first=is_first)
        with self.database.get_connection() as connection:
            write_fact(connection, self._bytes_per_token_fact, round(spending.bytes_per_token, 3))
            write_fact(connection, SPENDING, asdict(spending))

    def read_spending(self) -> Spending | None:
        """What the last run sent that sent anything; None also if another version recorded it otherwise."""
        with self.database.get_connection() as connection:
            return schema.read_record(connection, SPENDING, Spending)

    @property
    def server(self) -> str:
        """What makes the vectors, as the reasons of rejections name it."""
        return self.settings.model if self.settings.offline else self.settings.fireworks_base_url

    @property
    def _bytes_per_token_fact(self) -> str:
        return f"bytes per token of {self.settings.model}"

    def embedder(
        self, estimator: TokenEstimator | None = None, on_trouble: Callable[[str], None] = lambda _: None
    ) -> Embedder:
        """A new embedder; it belongs to one event loop. `on_trouble` is notified of bad answers and of long waits."""
        each = self.settings
        if each.offline:
            return DemoEmbedder() if each.model == DEMO_MODEL else OfflineEmbedder(each.dimensions)
        limiter = RateLimiter(
            self.database.get_engine("web"), each.fireworks_base_url, each.requests_per_minute, each.tokens_per_minute
        )
        return EmbeddingClient(
            each.fireworks_base_url,
            each.fireworks_api_key,
            each.embedding_model,
            each.dimensions,
            limiter,
            patience_s=each.patience_s,
            concurrency=each.concurrency,
            stop=self.stop,
            estimator=estimator,
            on_trouble=on_trouble,
            truncate=each.truncate,
        )

    def filler(
        self,
        progress: ReportProgress = ignore_progress,
        run: str | None = None,
        anew: str | None = None,
        retry_rejected: bool = False,
        confirm_reembedding: bool = False,
    ) -> Filler:
        """What fills ranges of the cache.

        Args:
            progress: told as it goes.
            run: whose budget it is: all processes that name the same run share it; None: this filler's alone.
            anew: who asks that songs be embedded again; see `Filler`.
            retry_rejected: whether songs that were rejected before are sent again.
            confirm_reembedding: whether somebody said for this run that texts are paid for again because settings
                changed; who asks for all songs again has said so.
        """
        self.bind()
        estimator, each = self.token_estimator(), self.settings
        limits = each.max_usd, each.max_usd_a_month
        return Filler(
            snapshots=self.store.songs,
            cache=self.cache,
            spec=self.text_spec,
            embedder_factory=lambda on_trouble: self.embedder(estimator, on_trouble),
            quota=self.quota,
            budget=Budget(self.price, self.database.get_engine("web"), run or uuid4().hex, *limits),
            estimator=estimator,
            concurrency=each.concurrency,
            server=self.server,
            lock_range=self.lock_range,
            tiling=self.tiling,
            before_fill=self._reembedding_check(confirmed=confirm_reembedding or anew is not None),
            before_payment=self._payment_check(),
            keep_spending=functools.partial(self._keep_spending, self._learned_bytes_per_token() is None),
            retention_s=each.retention_days * DAY_S,
            anew=anew,
            retry_rejected=retry_rejected,
            stop=self.stop,
            progress=progress,
        )

    def _reembedding_check(self, confirmed: bool) -> Callable[[Sequence[SongIdRange]], None]:
        """What is asked before the first range is begun; where it passes, these settings are recorded."""
        spec, record = self.text_spec, TextRecord.of(self.text_spec, self.prompts.query)

        def check(ranges: Sequence[SongIdRange]) -> None:
            if not confirmed:
                check_reembedding(self.cache, ranges, spec, lambda changed: self.estimate({*changed}))
            if ranges and read_record(self.cache) != record:
                # two first runs at once would write to one file
                with hold_lock(self.database, "texts", on_wait=lambda: None, check=self.stop.check):
                    write_record(self.cache, record)

        return check

    def _payment_check(self) -> Callable[[], None]:
        """What is asked before each range's first request; what the server can give, before the first one only."""

        @functools.cache
        def check_once(target: VectorTable) -> None:
            n_songs = sum(map(self.store.songs.count, self.store.songs.ranges()))
            check_target(target, self.table_spec, self.index_settings, n_songs)

        return lambda: check_once(check_publishable(self.database, self.wanted_table))

    def publish(self, progress: ReportProgress = ignore_progress) -> PublishReport:
        """Make what searches find equal the cache; see `publish_embeddings`."""
        if self.cache.ranges():  # else nothing is written: an empty cache is refused
            self.bind()
        run = RunContext(progress, self.stop)
        return publish_embeddings(self.database, self.load_source, self.wanted_table, run)

    def as_loaded(self) -> "Deployment":
        """This deployment with the model, size and type that searches find: after a swap they need no new settings."""
        loaded = self.table.spec
        if loaded is None or (loaded.model in LOCAL_MODELS) != self.settings.offline:
            return self
        # what is set goes with the model that is set
        is_set = self.settings.query_prompt and loaded.model == self.settings.model
        changed = {
            "query_prompt": self.settings.query_prompt if is_set else loaded.query_prompt,
            "embedding_model": loaded.model,
            "embedding_dimensions": loaded.dimensions,
            "vector_type": loaded.vector_type,
        }
        return replace(self, settings=self.settings.model_copy(update=changed))

    def embed_query(self, query: str, on_trouble: Callable[[str], None] = lambda _: None) -> NDArray[np.float32]:
        """A query's vector, (dimensions,), by the model that searches find; see `as_loaded`.

        Args:
            query: in the words of who asks.
            on_trouble: notified of what the server is waited for.

        Raises:
            TableMismatchError: nothing is loaded; or the table is of another model than the settings' or the server's.
            ProviderError: no answer, or none that helps.
        """
        asked = self.as_loaded()
        check_searchable(asked.database, asked.table_spec)
        try:
            return embed_query(asked.embedder(on_trouble=on_trouble), query, asked.prompts.query)
        except ProviderError as error:
            mismatch = check_server(asked.table_spec, self.table_spec, self.server, error)
            raise mismatch or error from None

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pooled connections to the database, if it was used."""
        if "database" in self.__dict__:
            self.database.close()

    def cancel(self) -> None:
        """Ask whatever is running to end early, keeping what it has. Callable from any thread."""
        self.stop.set()
        if "database" in self.__dict__:
            self.database.cancel()

    def describe(self) -> str:
        """One line: where songs come from and where vectors are made."""
        each = self.settings
        if each.offline:
            what = "a small model" if each.model == DEMO_MODEL else "spelling, not meaning"
            embedder = f"DEMO vectors ({each.model}: {what}; FIREWORKS_API_KEY makes real ones)"
        else:
            embedder = f"{each.model} at {each.fireworks_base_url}"
        return f"{self.database.describe()}, {embedder}, {each.dimensions} dimensions"

    def lock_range(
        self, song_range: SongIdRange, on_wait: Callable[[], None], check: Callable[[], None]
    ) -> AbstractContextManager[Callable[[], None]]:
        """Hold a range against every other run on this database; see `hold_lock`."""
        return hold_lock(self.database, lock_name(song_range), on_wait=on_wait, check=check)
