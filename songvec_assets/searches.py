"""The searches of the public API: by a text, a song or a vector.

When to add here: another way to search, as a method. Keep out: how songs are found (`search/`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from songvec_assets.errors import (
    ProviderError,
    SearchError,
    SongvecError,
    StoppedError,
    TableMismatchError,
    describe,
)
from songvec_assets.search import baseline, evaluate, labels, lines, nearest
from songvec_assets.search.evaluate import Evaluation
from songvec_assets.search.labels import LabelledQuery
from songvec_assets.search.nearest import Hit
from songvec_assets.search.query import Condition, Mode, Query
from songvec_assets.search.query_vectors import embed_queries
from songvec_assets.settings import DEMO_MODEL, LOCAL_MODELS, Settings
from songvec_assets.vectors.index.audit import QualityChange, find_nearest
from songvec_assets.vectors.ledger import STAGING
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets.wiring import Wiring

_JUDGE_PATIENCE_S = 60.0


class Searches(Wiring):
    """How songs are found."""

    def read_model_ahead(self) -> None:
        """Begin to read the demo's model, if it is the one of the settings; returns at once."""
        if self.settings.model == DEMO_MODEL:
            from songvec_assets.embedding.demo import read_ahead

            read_ahead()

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
            TableMismatchError, ProviderError: see `embed_query`.
        """
        asked = Query.of(query, mode, limit=limit, where=where, columns=self.filter_columns, explain=explain)
        try:
            return self._search(asked, mode, on_trouble)
        except TableMismatchError:
            if self.__dict__.pop("_serving", None) is None:
                raise
        # what serves was read before: the table may have been swapped since
        return self._search(asked, mode, on_trouble)

    def _search(self, asked: Query, mode: Mode, on_trouble: Callable[[str], None]) -> Sequence[Hit]:
        words, embedder = asked.words or "", None
        if words and mode != "text":
            loaded, spec = self._serving
            vector = self.embed_query(words, on_trouble)
            asked = replace(asked, vector=vector, words=words if mode == "hybrid" else None, model=spec.model)
            embedder = loaded.embedder() if loaded.settings.offline else None
        hits = nearest.search_songs(self.database, self.source, asked)
        return lines.add_best_lines(hits, words, asked.vector, embedder)

    def similar_to(self, song_id: int, limit: int = 10, where: Sequence[Condition] = ()) -> Sequence[Hit]:
        """The songs nearest to a song of the table, without itself; costs nothing."""
        return self.search(song_id, limit, where)

    @functools.cached_property
    def _serving(self) -> tuple[Self, TableSpec]:
        """See `as_loaded`, and what that table holds. Read once: a search names the model, and fails if it changed."""
        loaded = self.as_loaded()
        spec = loaded.table_spec
        nearest.check_searchable(loaded.database, spec)
        return loaded, spec

    def embed_query(self, query: str, on_trouble: Callable[[str], None] = lambda _: None) -> NDArray[np.float32]:
        """A query's vector, (dimensions,), by the model that searches find; see `as_loaded`.

        Raises:
            TableMismatchError: nothing is loaded; or the table holds another model than the settings or the server.
            ProviderError: no answer, or none that helps.
        """
        vector: NDArray[np.float32] = self._embed([query], on_trouble)[0]
        return vector

    def _embed(self, queries: Sequence[str], on_trouble: Callable[[str], None]) -> NDArray[np.float32]:
        loaded, spec = self._serving
        try:
            return embed_queries(loaded.embedder(on_trouble=on_trouble), queries, loaded.prompts.query)
        except ProviderError as error:
            mismatch = nearest.check_server(spec, self.table_spec, self.server, error)
            raise mismatch or error from None

    def evaluate(
        self,
        queries: str | Path | Sequence[LabelledQuery] | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> Evaluation:
        """How well searches by text, by vector and by both answer labelled queries, beside BM25.

        A query costs its tokens once; all are embedded with few requests.

        Args:
            queries: a file, or labelled queries; None: SONGVEC_EVALUATION_QUERIES, or those of the sample catalogue.
            on_trouble: notified if the provider fails and is tried again.

        Raises:
            SearchError: there are no labelled queries, a line of the file cannot be read, or no song in it is known;
                nothing was paid.
            TableMismatchError, ProviderError: see `embed_query`.
        """
        labelled, notes = self.label_queries(queries)
        words = [query.words for query in labelled]
        vectors, model = self._embed(words, on_trouble), self._serving[1].model
        found, left_out = evaluate.find_songs(self.source, labelled, vectors, model)
        try:
            found[baseline.NAME] = baseline.search_bm25(self.store.songs, self.text_spec, words)
        except SongvecError as error:  # only a comparison is missing
            left_out.append(f"left out: {error}")
        return evaluate.evaluate(labelled, found, [*notes, *left_out])

    def label_queries(
        self, queries: str | Path | Sequence[LabelledQuery] | None = None
    ) -> tuple[list[LabelledQuery], list[str]]:
        """See `evaluate`: the labelled queries without unknown songs, and a note that names those."""
        path = self.settings.evaluation_queries if queries is None else queries
        if isinstance(path, str | Path):
            given: Sequence[LabelledQuery] | None = labels.read_labels(path)
        else:
            given = labels.label_samples(self.database, self.source) if path is None else path
        if not given:
            raise SearchError(
                "expected labelled queries: name a file of them, or set SONGVEC_EVALUATION_QUERIES", "search.labels"
            )
        return labels.drop_unknown(self.database, self.source, given)

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
                    vectors[spec] = embed_queries(hasty.embedder(), words, wiring.prompts.query)
                found = find_nearest(table, spec, vectors[spec])
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
        if loaded is None or (loaded.model in LOCAL_MODELS) != self.settings.offline:
            return self
        # a prompt that is set belongs to the model that is set
        is_set = self.settings.query_prompt and loaded.model == self.settings.model
        changed = {
            "query_prompt": self.settings.query_prompt if is_set else loaded.query_prompt,
            "embedding_model": loaded.model,
            "embedding_dimensions": loaded.dimensions,
            "vector_type": loaded.vector_type,
        }
        return self.with_settings(self.settings.model_copy(update=changed))
