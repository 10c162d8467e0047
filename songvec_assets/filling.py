"""From settings to what fills the cache: the context of its requests, and what is checked before one is paid for.

When to add here: another check before payment. Keep out: how ranges are filled (`cache/fill`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack
from uuid import uuid4

from songvec_assets.cache.texts import TextRecord, check_reembedding, read_record, write_record
from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.drift import ModelRecord
from songvec_assets.evaluations import Evaluations
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import ReportProgress, RunContext, ignore_progress
from songvec_assets.questions import Questions
from songvec_assets.reports import EmbedChoices
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors import swap
from songvec_assets.vectors.index.preflight import check_target
from songvec_assets.vectors.table import VectorTable

if TYPE_CHECKING:  # the HTTP client of providers, which a search does not need
    from songvec_assets.cache.fill import Filler


class Filling(Questions, Evaluations):
    """How `Pipeline` makes what fills its cache."""

    def filler(
        self,
        progress: ReportProgress = ignore_progress,
        run: str | None = None,
        reembed: str | None = None,
        **choices: Unpack[EmbedChoices],
    ) -> "Filler":
        """A filler of ranges of the cache.

        Args:
            progress: notified of songs, rate and dollars.
            run: names the budget: all processes that name the same run share it; None: this filler has one alone.
            reembed: names the request to embed songs again; None: there is none. See `Filler`.
            choices: see `EmbedChoices`; `reembed` confirms re-embedding.
        """
        from songvec_assets.cache import context, fill

        self.bind()
        given = self.settings
        estimator = self.token_estimator()
        engine = self.database.get_engine("autocommit")
        confirmed = choices.get("confirm_reembedding") or reembed
        record = ModelRecord(
            database=self.database,
            model=given.model,
            dimensions=given.dimensions,
            name=given.embedding_model,
            url=given.fireworks_base_url,
            # a model that runs in this process is what its name says
            is_confirmed=given.offline or choices.get("confirm_model_change", False),
        )
        shared = context.SendContext(
            embedder_factory=lambda on_trouble: self.embedder(estimator, on_trouble, record.check),
            quota=self.quota,
            budget=Budget(self.price, engine, run or uuid4().hex, given.max_usd, given.max_usd_a_month),
            estimator=estimator,
            concurrency=given.concurrency,
            server=self.server,
            run=RunContext(progress, self.stop),
        )
        return fill.Filler(
            snapshots=self.store.songs,
            cache=self.cache,
            tiling=self.tiling,
            spec=self.text_spec,
            context=shared,
            record=record,
            lock_range=self.lock_range,
            before_fill=functools.partial(self._check_texts, bool(confirmed)),
            before_payment=self._payment_check(),
            keep_spending=self.spending.write,
            retention_s=given.retention_days * 86_400.0,
            reembed=reembed,
            retry_rejected=choices.get("retry_rejected", False),
        )

    def _check_texts(self, confirmed: bool, changed: Sequence[SongIdRange]) -> None:
        """Refuse to embed texts again only because settings changed, unless confirmed; then record these settings."""
        storage = self.cache.storage
        record = TextRecord.of(self.text_spec, self.prompts.query)
        if not confirmed:
            check_reembedding(storage, changed, self.text_spec, lambda ranges: self.estimate({*ranges}))
        if read_record(storage) != record:
            # two first runs at once would write the same file
            with hold_lock(self.database, "texts", on_wait=lambda: None, check=self.stop.check):
                write_record(storage, record)

    def _payment_check(self) -> Callable[[], None]:
        """What is checked before each range's first request: the table's model.

        Once per run also whether the server can take the rows, whether the storage can be written to, and whether
        the labelled queries can be read, which the swap needs after all is paid for.
        """

        @functools.cache
        def check_once(target: VectorTable) -> None:
            n_songs = sum(self.store.songs.count().values())
            check_target(target, self.table_spec, self.index_settings, n_songs)
            self.storage.check_writes()
            if self.settings.evaluation_queries:
                self.label_queries()

        return lambda: check_once(swap.check_loadable(self.database, self.wanted_table))
