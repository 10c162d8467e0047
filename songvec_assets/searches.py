"""The searches of the public API: by a text, a song or a vector.

When to add here: another way to search, as a method. Keep out: how songs are found (`search/`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import (
    ProviderError,
    SearchError,
    SongvecError,
    StoppedError,
    TableMismatchError,
    describe,
)
from songvec_assets.search import baseline, evaluate, labels, lines, nearest, queries
from songvec_assets.search.evaluate import Evaluation
from songvec_assets.search.labels import LabelledQuery
from songvec_assets.search.nearest import Hit
from songvec_assets.search.query import Condition, Mode, Query
from songvec_assets.settings import LOCAL_MODELS, Settings
from songvec_assets.vectors.index.audit import QualityChange, find_nearest_songs
from songvec_assets.vectors.ledger import STAGING
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets.wiring import Wiring

_JUDGE_PATIENCE_S = 60.0


class Searches(Wiring):
    """How songs are found."""

    def search(
        self,
        query: str | int | NDArray[np.float32],
        limit: int = 10,
        where: Sequence[Condition] = (),
        mode: Mode = "vector",
        explain: bool = False,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> Sequence[Hit]:
        """The songs nearest to a text, a song or a vector, best first; `pl.DataFrame(hits)` has a row per song.

        Threads may call it at once; in an event loop, `await asyncio.to_thread(songs.search, "a storm at sea")`.

        Args:
            query: a text, a song_id, or a vector by the table's model.
            limit: songs at most, up to 1,000.
            where: conditions that all hold: `[("artist", "=", "Ann")]`; see `Query`.
            mode: `vector`; `text`, by name and artist, which costs nothing; or `hybrid`, both lists fused.
            explain: whether each hit says how it was found.
            on_trouble: notified if the provider fails and is tried again.

        Raises:
            SearchError: the query cannot be searched for; nothing was paid.
            TableMismatchError, BudgetExceededError, ProviderError: see `embed_query`.
        """
        asked = self.ask(query, mode, limit=limit, where=where, explain=explain)
        try:
            return self._search(asked, on_trouble)
        except TableMismatchError:
            if not self.forget_serving():
                raise
        return self._search(asked, on_trouble)

    def _search(self, asked: Query, on_trouble: Callable[[str], None]) -> Sequence[Hit]:
        if not asked.needs_vector:
            return self.find(asked)
        serving = self.serving
        return self.find(asked, self._embed([asked.words or ""], serving, on_trouble)[0], serving)

    def ask(self, query: str | int | NDArray[np.float32], mode: Mode, **options: Any) -> Query:
        """A checked query; see `search`. If it `needs_vector`, `find` takes that and the `serving` it is by."""
        return Query.of(query, mode, columns=self.filter_columns, **options)

    def find(
        self,
        asked: Query,
        vector: NDArray[np.float32] | None = None,
        serving: "tuple[Self, TableSpec] | None" = None,
        timeout_s: float | None = None,
    ) -> Sequence[Hit]:
        """The songs of a checked query, with their best lines.

        Args:
            asked: what is searched for.
            vector: of its words; None: it needs none.
            serving: by whose model the vector is.
            timeout_s: see `search_songs`.
        """
        words, embedder = asked.words or "", None
        if vector is not None and serving is not None:
            loaded, spec = serving
            kept = words if asked.mode == "hybrid" else None
            asked = replace(asked, vector=vector, words=kept, model=spec.model)
            embedder = loaded.embedder() if loaded.settings.offline else None
        hits = nearest.search_songs(self.database, self.source, asked, timeout_s)
        return lines.add_best_lines(hits, words, asked.vector, embedder)

    def similar_to(self, song_id: int, limit: int = 10, where: Sequence[Condition] = ()) -> Sequence[Hit]:
        """The songs nearest to a song of the table, without itself; costs nothing."""
        return self.search(song_id, limit, where)

    @functools.cached_property
    def serving(self) -> tuple[Self, TableSpec]:
        """See `as_loaded`, and what that table holds. Read once: a search names the model, and fails if it changed."""
        loaded = self.as_loaded()
        spec = loaded.table_spec
        nearest.check_searchable(loaded.database, spec)
        return loaded, spec

    def forget_serving(self) -> bool:
        """Read again what serves: the table may have been swapped since. Returns whether it was read before."""
        return self.__dict__.pop("serving", None) is not None

    def embed_query(self, query: str, on_trouble: Callable[[str], None] = lambda _: None) -> NDArray[np.float32]:
        """A query's vector, (dimensions,), by the model that searches find; see `as_loaded`.

        Raises:
            TableMismatchError: nothing is loaded; or the table holds another model than the settings or the server.
            BudgetExceededError: searches may cost no more this month.
            ProviderError: no answer, or none that helps.
        """
        vector: NDArray[np.float32] = self._embed([query], self.serving, on_trouble)[0]
        return vector

    def _embed(
        self, words: Sequence[str], serving: tuple[Self, TableSpec], on_trouble: Callable[[str], None]
    ) -> Float32Matrix:
        loaded, spec = serving
        embedder = loaded.embedder(on_trouble=on_trouble)
        try:
            return queries.embed_queries(embedder, words, self.get_query_prompt(serving), self.search_budget())
        except ProviderError as error:
            mismatch = queries.check_server(spec, self.table_spec, self.server, error)
            raise mismatch or error from None

    @staticmethod
    def get_query_prompt(serving: "tuple[Searches, TableSpec]") -> str:
        """The prompt for queries of what serves: as recorded with the table, else as the settings have it."""
        loaded, spec = serving
        return spec.query_prompt or loaded.prompts.query

    def search_budget(self) -> Budget:
        """What searches may spend this month; all doors and processes share it."""
        given, engine = self.settings, self.database.get_engine("autocommit")
        month = f"searches {datetime.now(UTC):%Y-%m}"
        return Budget(self.price, engine, month, given.max_search_usd_a_month, given.max_usd_a_month)

    def evaluate(
        self,
        labelled_queries: str | Path | Sequence[LabelledQuery] | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> Evaluation:
        """How well searches by text, by vector and by both answer labelled queries, beside BM25.

        A query costs its tokens once; all are embedded with few requests.

        Args:
            labelled_queries: their file, or themselves; None: SONGVEC_EVALUATION_QUERIES, or those of the samples.
            on_trouble: notified if the provider fails and is tried again.

        Raises:
            SearchError: there are no labelled queries, a line of the file cannot be read, or no song in it is known;
                nothing was paid.
            TableMismatchError, ProviderError: see `embed_query`.
        """
        labelled, notes = self.label_queries(labelled_queries)
        words = [query.words for query in labelled]
        vectors, model = self._embed(words, self.serving, on_trouble), self.serving[1].model
        found, left_out = evaluate.find_songs(self.source, labelled, vectors, model)
        try:
            found[baseline.NAME] = baseline.search_bm25(self.store.songs, self.text_spec, words)
        except SongvecError as error:  # only a comparison is missing
            left_out.append(f"left out: {error}")
        return evaluate.evaluate(labelled, found, [*notes, *left_out])

    def label_queries(
        self, given: str | Path | Sequence[LabelledQuery] | None = None
    ) -> tuple[list[LabelledQuery], list[str]]:
        """See `evaluate`: the labelled queries without unknown songs, and a note that names those."""
        path = self.settings.evaluation_queries if given is None else given
        if isinstance(path, str | Path):
            labelled: Sequence[LabelledQuery] | None = labels.read_labels(path)
        else:
            labelled = labels.label_samples(self.database, self.source) if path is None else path
        if not labelled:
            raise SearchError(
                "expected labelled queries: name a file of them, or set SONGVEC_EVALUATION_QUERIES", "search.labels"
            )
        return labels.drop_unknown(self.database, self.source, labelled)

    def judge_staging(self) -> QualityChange:
        """How well the serving and the staging table answer the labelled queries of the settings; costs both models'.

        What keeps it from being measured is part of the answer: a swap is not refused for it.
        """
        try:
            labelled, _ = self.label_queries()
            tables = (self.table, self.as_loaded()), (VectorTable(self.database, STAGING), self)
            vectors: dict[TableSpec, NDArray[np.float32]] = {}
            scores = []
            for table, wiring in tables:
                spec = wiring.table_spec
                if table.spec != spec:
                    raise TableMismatchError(
                        f"{table.name} holds {table.spec}, and queries would be embedded for {spec}"
                    )
                if spec not in vectors:
                    # a complete table does not wait long for a figure
                    patience_s = min(wiring.settings.patience_s, _JUDGE_PATIENCE_S)
                    hasty = wiring.with_settings(wiring.settings.model_copy(update={"patience_s": patience_s}))
                    words = [query.words for query in labelled]
                    prompt, budget = wiring.prompts.query, self.search_budget()
                    vectors[spec] = queries.embed_queries(hasty.embedder(), words, prompt, budget)
                found = find_nearest_songs(table, vectors[spec])
                scores.append([evaluate.measure_ndcg(*each) for each in zip(labelled, found, strict=True)])
        except StoppedError:
            raise
        except SongvecError as error:
            return QualityChange(trouble=describe(error))
        serving, staged = map(np.mean, scores)
        difference = evaluate.compare(scores[1], scores[0])
        return QualityChange(len(labelled), float(serving), float(staged), difference.low, difference.high)

    def with_settings(self, settings: Settings) -> Self:
        """The same with other settings and the same opened database, which is closed and cancelled with this one."""
        other = replace(self, settings=settings)
        other.database = self.database
        return other

    def as_loaded(self) -> Self:
        """The same for the model, size and type of the serving table: after a swap, searches need no new settings."""
        loaded = self.table.spec
        given = self.settings
        if loaded is None or (loaded.model in LOCAL_MODELS) != given.offline:
            return self
        # a prompt, and a provider's name, that are set belong to the model that is set
        is_same = loaded.model == given.model
        changed = {
            "query_prompt": (given.query_prompt if is_same else None) or loaded.query_prompt,
            "embedding_model": given.embedding_model if is_same else loaded.model,
            "model_id": loaded.model,
            "embedding_dimensions": loaded.dimensions,
            "vector_type": loaded.vector_type,
        }
        return self.with_settings(given.model_copy(update=changed))
