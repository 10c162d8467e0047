"""The searches of the public API: by a text, a song or a vector. They need the database, and no store.

When to add here: another way to search, as a method. Keep out: how songs are found (`search/`), and how well
(`evaluations`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from songvec_assets.access import Access
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import ProviderError, TableMismatchError
from songvec_assets.search import lines, nearest, queries
from songvec_assets.search.nearest import Hit
from songvec_assets.search.query import Condition, Mode, Query
from songvec_assets.vectors.spec import TableSpec


class Searches(Access):
    """The searches of `Pipeline`, without the rest of it: loads neither polars nor pyarrow."""

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
        """A checked query for `find`; see `search`. If it `needs_vector`, embed its words by `serving` first."""
        return Query.of(query, mode, columns=self.filter_columns, **options)

    def find(
        self,
        asked: Query,
        vector: NDArray[np.float32] | None = None,
        serving: Self | None = None,
        timeout_s: float | None = None,
    ) -> Sequence[Hit]:
        """The songs of a checked query, with their best lines.

        Args:
            vector: of its words; None: it needs none.
            serving: whose model made the vector.
            timeout_s: see `search_songs`.
        """
        words, embedder = asked.words or "", None
        if vector is not None and serving is not None:
            kept = words if asked.mode == "hybrid" else None
            asked = replace(asked, vector=vector, words=kept, model=serving.settings.model)
            embedder = serving.embedder() if serving.settings.offline else None
        hits = nearest.search_songs(self.database, self.source, asked, timeout_s)
        return lines.add_best_lines(hits, words, asked.vector, embedder)

    def similar_to(self, song_id: int, limit: int = 10, where: Sequence[Condition] = ()) -> Sequence[Hit]:
        """The songs nearest to a song of the table, without itself; costs nothing."""
        return self.search(song_id, limit, where)

    @functools.cached_property
    def serving(self) -> Self:
        """See `as_loaded`; checked, and kept: a search names the model, so it fails if another one serves by now."""
        loaded = self.as_loaded()
        nearest.check_searchable(loaded.database, loaded.query_spec)
        return loaded

    @property
    def query_spec(self) -> TableSpec:
        """The spec of a table for which these settings embed queries."""
        given = self.settings
        return TableSpec(given.model, given.dimensions, given.vector_type, given.query_prompt)

    def forget_serving(self) -> bool:
        """Read `serving` again at its next use: the table may have been swapped. Returns whether it was read before."""
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

    def _embed(self, words: Sequence[str], serving: Self, on_trouble: Callable[[str], None]) -> Float32Matrix:
        embedder = serving.embedder(on_trouble=on_trouble)
        try:
            return queries.embed_queries(embedder, words, serving.settings.query_prompt, self.search_budget())
        except ProviderError as error:
            mismatch = queries.check_server(serving.query_spec, self.settings, self.server, error)
            raise mismatch or error from None
