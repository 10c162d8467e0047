"""From settings to what fills the cache: the context of its requests, and what is checked before one is paid for.

When to add here: another check before payment. Keep out: how ranges are filled (`cache/fill`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from songvec_assets.cache.texts import TextRecord, check_reembedding, read_record, write_record
from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.drift import ModelRecord
from songvec_assets.evaluations import label_queries
from songvec_assets.postgres.locks import hold_lock
from songvec_assets.progress import ReportProgress, RunContext
from songvec_assets.questions import Questions
from songvec_assets.reports import EmbedChoices
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors import swap
from songvec_assets.vectors.index.preflight import check_target
from songvec_assets.vectors.table import VectorTable

if TYPE_CHECKING:  # the HTTP client of providers, which a search does not need
    from songvec_assets.cache.fill import Filler


def make_filler(
    songs: Questions, progress: ReportProgress, run: str, reembed: str | None, choices: EmbedChoices
) -> "Filler":
    """What fills ranges of the cache; for the arguments see `Pipeline.filler`."""
    from songvec_assets.cache import context, fill

    songs.bind()
    given = songs.settings
    estimator = songs.token_estimator()
    engine = songs.database.get_engine("autocommit")
    confirmed = choices.get("confirm_reembedding") or reembed
    record = ModelRecord(
        database=songs.database,
        model=given.model,
        dimensions=given.dimensions,
        name=given.embedding_model,
        url=given.fireworks_base_url,
        # a model that runs in this process is what its name says
        is_confirmed=given.offline or choices.get("confirm_model_change", False),
    )
    shared = context.SendContext(
        embedder_factory=lambda on_trouble: songs.embedder(estimator, on_trouble, record.check),
        quota=songs.quota,
        budget=Budget(songs.price, engine, run, given.max_usd, given.max_usd_a_month),
        estimator=estimator,
        concurrency=given.concurrency,
        server=songs.server,
        run=RunContext(progress, songs.stop),
    )
    return fill.Filler(
        snapshots=songs.store.songs,
        cache=songs.cache,
        tiling=songs.tiling,
        spec=songs.text_spec,
        context=shared,
        record=record,
        lock_range=songs.lock_range,
        before_fill=functools.partial(_check_texts, songs, bool(confirmed)),
        before_payment=_make_payment_check(songs),
        spending=songs.spending,
        retention_s=given.retention_days * 86_400.0,
        reembed=reembed,
        retry_rejected=choices.get("retry_rejected", False),
    )


def _check_texts(songs: Questions, confirmed: bool, changed: Sequence[SongIdRange]) -> None:
    """Refuse to embed texts again only because settings changed, unless confirmed; then record these settings."""
    storage = songs.cache.storage
    record = TextRecord.of(songs.text_spec, songs.prompts.query)
    if not confirmed:
        check_reembedding(storage, changed, songs.text_spec, lambda ranges: songs.estimate({*ranges}))
    if read_record(storage) != record:
        # two first runs at once would write the same file
        with hold_lock(songs.database, "texts", on_wait=lambda: None, check=songs.stop.check):
            write_record(storage, record)


def _make_payment_check(songs: Questions) -> Callable[[], None]:
    """What is checked before each range's first request: the table's model.

    Once per run also whether the server can take the rows, whether the storage can be written to, and whether the
    labelled queries can be read, which the swap needs after all is paid for.
    """

    wanted = songs.wanted_table

    @functools.cache
    def check_once(target: VectorTable) -> None:
        n_songs = sum(songs.store.songs.count().values())
        check_target(target, wanted.spec, wanted.index, n_songs)
        songs.storage.check_writes()
        if songs.settings.evaluation_queries:
            label_queries(songs)

    return lambda: check_once(swap.check_loadable(songs.database, wanted))
