"""The searches of the public API: by a text, a song or a vector.

When to add here: another way to search, as a method. Keep out: how songs are found (`search/`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from songvec_assets.errors import ProviderError, TableMismatchError
from songvec_assets.search import lines, nearest
from songvec_assets.search.nearest import Hit
from songvec_assets.search.query import Condition, Mode, Query
from songvec_assets.settings import LOCAL_MODELS, Settings
from songvec_assets.vectors.table import TableSpec
from songvec_assets.wiring import Wiring


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
        loaded, spec = self._serving
        try:
            return nearest.embed_query(loaded.embedder(on_trouble=on_trouble), query, loaded.prompts.query)
        except ProviderError as error:
            mismatch = nearest.check_server(spec, self.table_spec, self.server, error)
            raise mismatch or error from None

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
