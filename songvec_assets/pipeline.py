"""The public API: every step of the graph, and every question about all of it, as a method of `Pipeline`. No Dagster.

The assets and the command line call the same methods. Here are the steps; searches come from `searches`, and what
changes and costs nothing from `questions`. When to add here: another step. Keep out: what a step works with (`wiring`,
and `access`, which needs no store), and how it is done (the rooms below).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack
from uuid import uuid4

from dotenv import dotenv_values

from songvec_assets.errors import SongvecError
from songvec_assets.evaluations import evaluate_searches, judge_staging, label_queries
from songvec_assets.filling import make_filler
from songvec_assets.progress import ReportProgress, RunContext, ignore_progress
from songvec_assets.questions import Questions
from songvec_assets.recorder import Recorder
from songvec_assets.reports import EmbedChoices, RunReport, continues_without
from songvec_assets.search import nearest
from songvec_assets.search.evaluate import Evaluation
from songvec_assets.search.labels import LabelledQuery
from songvec_assets.searches import Searches
from songvec_assets.settings import Settings, variables
from songvec_assets.settings_group import check_names
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors import swap
from songvec_assets.vectors.index.upkeep import IndexReport, bring_index_up_to_date
from songvec_assets.vectors.spec import TableSpec
from songvec_assets.vectors.swap import LoadReport

if TYPE_CHECKING:  # the HTTP client of providers and the driver of exports, which a search does not need
    from songvec_assets.cache.fill import Filler
    from songvec_assets.cache.plan import FillReport
    from songvec_assets.songs.export import ExportMode
    from songvec_assets.songs.reports import ExportReport


class Pipeline(Searches, Questions):
    """Songs in Postgres to an indexed pgvector table of embeddings, and searches of it.

    with Pipeline.from_env() as songs:
        songs.run()
        hits = songs.search("a storm at sea", limit=20)

    Works in a notebook, too. It opens what it needs when that is first used, and closes it at the end of the block. A
    step that is interrupted, or fails, keeps what was done: the same call goes on from there.

    Every method may raise SongvecError; its message says what to do.
    """

    @classmethod
    def from_env(cls, **settings: Any) -> Self:
        """A pipeline with the settings of the environment, and of `.env` in the working folder if it lacks them.

        Args:
            settings: replace the values of both, by their names in `Settings`: `from_env(max_usd=5.0)`.

        Raises:
            SettingsError: a value cannot be used, or a variable is nearly named as a setting.
        """
        dotenv = dotenv_values(".env")
        check_names([*os.environ, *dotenv], variables())
        names = {*variables()} - os.environ.keys()
        given = {name: value for name, value in dotenv.items() if name in names}
        return cls(Settings(**given | settings))

    # the steps

    def export(
        self, mode: "ExportMode" = "all", progress: ReportProgress = ignore_progress, confirm_deletions: bool = False
    ) -> "ExportReport":
        """Bring the snapshots to the state of the source; see `cache_songs_to_parquet`."""
        from songvec_assets.songs import export

        self.bind()
        options = export.ExportOptions(
            mode,
            # an empty snapshot says that a range's songs were deleted; a missing one says nothing
            kept={*self.cache.ranges(), *self.table.ledger.find_ranges(self.tiling)},
            guard=None if confirm_deletions else self.missing_songs(),
            full_compare_hours=self.settings.full_compare_hours,
        )
        run = RunContext(progress, self.stop)
        report = export.cache_songs_to_parquet(self.source, self.store.songs, self.tiling, options, run)
        return Recorder(self).succeed(report)

    def embed(
        self,
        ranges: Sequence[SongIdRange] | None = None,
        progress: ReportProgress = ignore_progress,
        reembed: bool = False,
        **choices: Unpack[EmbedChoices],
    ) -> "list[FillReport]":
        """Embed, and pay for, what the cache lacks of the snapshots.

        Args:
            ranges: to embed, in this order; None: all that hold songs.
            progress: notified of songs, rate and dollars.
            reembed: whether to pay for all their songs again.
            choices: see `EmbedChoices`.

        Returns:
            What happened to each range that holds anything.

        Raises:
            SongvecError: of the first range that is not complete, once the others are done; or what ended the run.
        """
        filler = self.filler(progress, reembed=uuid4().hex if reembed else None, **choices)
        reports: list[FillReport] = []
        try:
            filler.fill_ranges(self.held_ranges() if ranges is None else ranges, reports.append)
        finally:
            Recorder(self).count(reports)
        if failed := {each.range.key: each.error for each in reports if each.error}:
            error = next(iter(failed.values()))
            error.add_note(f"not complete: {', '.join(failed)}; the other ranges are embedded")
            raise error
        return Recorder(self).succeed(reports)

    def filler(
        self,
        progress: ReportProgress = ignore_progress,
        run: str | None = None,
        reembed: str | None = None,
        **choices: Unpack[EmbedChoices],
    ) -> "Filler":
        """A filler of ranges of the cache: `embed` for callers that choose and report ranges themselves.

        Args:
            progress: notified of songs, rate and dollars.
            run: names the budget: all processes that name the same run share it; None: this filler has one alone.
            reembed: names the request to embed songs again; None: there is none. See `Filler`.
            choices: see `EmbedChoices`; `reembed` confirms re-embedding.
        """
        return make_filler(self, progress, run or uuid4().hex, reembed, choices)

    def load(self, progress: ReportProgress = ignore_progress) -> LoadReport:
        """Make what searches find equal to the cache; see `bring_table_up_to_date`.

        Sends nothing to the provider but the labelled queries of SONGVEC_EVALUATION_QUERIES, before a swap.
        """
        if self.cache.ranges():  # else nothing is written: an empty cache is refused
            self.bind()
        run = RunContext(progress, self.stop)
        wanted = replace(
            self.wanted_table, judge=partial(judge_staging, self) if self.settings.evaluation_queries else None
        )
        report = swap.bring_table_up_to_date(self.database, self.load_source, wanted, run)
        nearest.record_source(self.database, self.source, self.filter_columns)
        return Recorder(self).succeed(report)

    def build_index(self, rebuild: bool = False, progress: ReportProgress = ignore_progress) -> IndexReport:
        """Build the index if it is missing or out of date, or if `rebuild`; see `bring_index_up_to_date`."""
        wanted = replace(self.index_settings, rebuild=rebuild)
        run = RunContext(progress, self.stop)
        report = bring_index_up_to_date(self.table, self.cache, self.table_spec, wanted, run)
        return Recorder(self).succeed(report)

    def run(
        self,
        ranges: Sequence[SongIdRange] | None = None,
        progress: ReportProgress = ignore_progress,
        confirm_deletions: bool = False,
        **choices: Unpack[EmbedChoices],
    ) -> RunReport:
        """Export, embed, load and index what changed.

        Args:
            ranges: to embed; None: all that hold songs.
            progress: notified of each step.
            confirm_deletions: whether songs that are missing in bulk are meant to be deleted.
            choices: see `EmbedChoices`.

        Raises:
            SongvecError: what failed first. If later steps can run without the ranges that failed, the others are
                loaded and indexed before it is raised (see `continues_without`); `status()` says what is missing.
        """
        from songvec_assets.songs.reports import IncompleteExportError

        self.check_model()
        failures: list[SongvecError] = []
        try:
            exported = self.export("all", progress, confirm_deletions)
        except IncompleteExportError as error:
            if not continues_without("export", error, self.is_swap):
                raise
            failures.append(error)
            exported = error.report
        # the export has just counted the songs
        ranges = [each.range for each in exported.ranges] if ranges is None else ranges
        try:
            filled = self.embed(ranges, progress, **choices)
        except SongvecError as error:
            if not continues_without("embed", error, self.is_swap) or not self.cache.ranges():
                raise
            failures.append(error)
        try:
            loaded = self.load(progress)
        except SongvecError as error:
            if not continues_without("load", error, self.is_swap):
                raise
            failures.append(error)
        indexed = self.build_index(progress=progress)
        if failures:
            for other in failures[1:]:
                failures[0].add_note(str(other))
            raise failures[0]
        return RunReport(exported, filled, loaded, indexed)

    def swap(
        self,
        model: str | None = None,
        dimensions: int | None = None,
        vector_type: str | None = None,
        progress: ReportProgress = ignore_progress,
    ) -> RunReport:
        """Build a staging table of another model, size or type, compare it, and let it replace the serving table.

        Afterwards set SONGVEC_EMBEDDING_MODEL, SONGVEC_EMBEDDING_DIMENSIONS and SONGVEC_VECTOR_TYPE to it, and
        SONGVEC_MODEL_ID if it was set.

        Args:
            model: of the new table: the provider's name, which becomes its model id; None: that of the settings.
            dimensions, vector_type: the same.
            progress: notified of each step.
        """
        wanted = {
            "embedding_model": model,
            "model_id": model,
            "embedding_dimensions": dimensions,
            "vector_type": vector_type,
        }
        given = {name: value for name, value in wanted.items() if value}
        settings = Settings(**self.settings.model_dump(exclude_none=True) | given | {"swap": True})
        return self.with_settings(settings).run(progress=progress)

    @property
    def is_swap(self) -> bool:
        """Whether a run builds a staging table to replace one of another model, size or type."""
        return self.settings.swap and self.table.spec not in (None, self.table_spec)

    def evaluate(
        self,
        labelled_queries: str | Path | Sequence[LabelledQuery] | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> Evaluation:
        """How well searches by text, by vector and by both answer labelled queries, compared with BM25.

        A query costs its tokens once; all are embedded with few requests.

        Args:
            labelled_queries: their file, or themselves; None: SONGVEC_EVALUATION_QUERIES, or those of the samples.
            on_trouble: notified if the provider fails and is tried again.

        Raises:
            SearchError: there are no labelled queries, a line of the file cannot be read, or no song in it is known;
                nothing was paid.
            TableMismatchError, ProviderError: see `embed_query`.
        """
        labelled, notes = label_queries(self, labelled_queries)
        vectors = self._embed([query.words for query in labelled], self.serving, on_trouble)
        return evaluate_searches(self, labelled, vectors, self.serving.settings.model, notes)

    def roll_back(self, progress: ReportProgress = ignore_progress) -> TableSpec | None:
        """Make the previous table serve again; see `vectors.swap.roll_back`."""
        return swap.roll_back(self.database, RunContext(progress, self.stop))

    def forget(self, song_ids: Iterable[int]) -> int:
        """Erase deleted songs from the cache before their retention time ends; see `erase_songs`."""
        from songvec_assets.cache.erasure import erase_songs

        self.bind()
        return erase_songs(self.store, song_ids, lambda each: self.lock_range(each, self.stop.check, self.stop.check))
