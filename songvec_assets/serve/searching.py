"""A search of the server: the query's vector from one client that is kept, then the songs from the database.

A provider that is slow or fails is not waited for by each search in turn: songs are then found by words, with a notice.
When to add here: another way to answer while something fails. Keep out: how songs are found (`searches`), and HTTP.
"""

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import Embedder
from songvec_assets.errors import (
    BudgetExceededError,
    ProviderError,
    ProviderUnavailableError,
    SearchError,
    SongvecError,
    TableMismatchError,
)
from songvec_assets.search import queries
from songvec_assets.search.query import Query
from songvec_assets.searches import Searches
from songvec_assets.serve.answers import Found, Notice, Wanted
from songvec_assets.serve.workers import Workers
from songvec_assets.vectors.spec import TableSpec

EMBED_S, REST_S, STATEMENT_S, CHECK_EVERY_S = 6.0, 15.0, 10.0, 1.0
"""How long a query's vector is waited for; for how long nothing is sent after a provider failed; how long the database
may take for one search; how often it is asked whether it is well."""
_OF_THE_QUERY = ("provider.no-vector", "provider.request-refused")
"""Failures that say nothing of the next query."""


class Searcher:
    """Answers searches, within one event loop.

    Args:
        songs: opened when it is first used: the database may come later than the server.
        workers: in which its calls run.
    """

    def __init__(self, songs: Searches, workers: Workers) -> None:
        self._songs = songs
        self._workers = workers
        self._clients: dict[TableSpec, Embedder] = {}
        self._opening = asyncio.Lock()
        self._budget: Budget | None = None
        self._rests_until = 0.0
        self._failure: ProviderError | None = None
        self._checking = asyncio.Lock()
        self._check_again_at = 0.0
        self._checked: dict[str, Any] | SongvecError

    async def find(self, wanted: Wanted) -> Found:
        """What a request asks for.

        Raises:
            SongvecError: see `Searches.search`.
        """
        started = time.monotonic()
        options = {"limit": wanted.limit, "where": wanted.where, "explain": wanted.explain}
        asked = await self._workers.run(lambda: self._songs.ask(wanted.query, wanted.mode, **options))
        try:
            found = await self._find(asked)
        except TableMismatchError:
            # what serves was read before: the table may have been swapped since
            if not self._songs.forget_serving():
                raise
            found = await self._find(asked)
        return replace(found, seconds=time.monotonic() - started)

    async def _find(self, asked: Query) -> Found:
        run, find = self._workers.run, self._songs.find
        if not asked.needs_vector:
            return Found(await run(lambda: find(asked, timeout_s=STATEMENT_S)), asked.mode, 0.0)
        serving = await run(lambda: self._songs.serving)
        try:
            vector = await self._embed(asked.words or "", serving)
        except (ProviderError, BudgetExceededError) as error:
            if error.code in _OF_THE_QUERY:
                raise
            try:
                hits = await run(lambda: find(replace(asked, mode="text"), timeout_s=STATEMENT_S))
            except SearchError:
                raise error from None
            return Found(hits, "text", 0.0, Notice(error.code, str(error)))
        return Found(await run(find, asked, vector, serving, STATEMENT_S), asked.mode, 0.0)

    async def _embed(self, words: str, serving: Searches) -> NDArray[np.float32]:
        if self._failure and time.monotonic() < self._rests_until:
            raise self._failure.with_traceback(None)
        client = await self._open_client(serving)
        self._budget = await self._workers.run(self._songs.search_budget, self._budget)
        try:
            async with asyncio.timeout(EMBED_S):
                vectors = await queries.embed(client, [words], serving.settings.query_prompt, self._budget)
            self._failure = None
            vector: NDArray[np.float32] = vectors[0]
            return vector
        except TimeoutError:
            error: ProviderError = ProviderUnavailableError(f"{serving.server} gave no vector within {EMBED_S:g} s")
        except ProviderError as caught:
            mismatch = queries.check_server(serving.query_spec, self._songs.settings, self._songs.server, caught)
            if mismatch:
                raise mismatch from None
            error = caught
        if error.code not in _OF_THE_QUERY:
            self._failure, self._rests_until = error, time.monotonic() + REST_S
        raise error

    async def _open_client(self, serving: Searches) -> Embedder:
        """One client per model: it is probed once. After a swap the former one stays for the searches that use it."""
        spec = serving.query_spec
        async with self._opening:
            if spec not in self._clients:
                self._clients[spec] = await self._workers.run(lambda: serving.embedder(patience_s=EMBED_S))
            return self._clients[spec]

    async def check(self) -> dict[str, Any]:
        """What serves: the table's model and dimensions, and the columns to filter by; read once per CHECK_EVERY_S.

        Raises:
            SongvecError: a search cannot succeed now.
        """
        async with self._checking:
            if time.monotonic() >= self._check_again_at:
                try:
                    self._checked = await self._workers.run(self._look)
                except SongvecError as error:
                    self._checked = error
                self._check_again_at = time.monotonic() + CHECK_EVERY_S
        if isinstance(self._checked, SongvecError):
            raise self._checked.with_traceback(None)
        return self._checked

    def _look(self) -> dict[str, Any]:
        self._songs.forget_serving()
        serving = self._songs.serving.settings
        return {"model": serving.model, "dimensions": serving.dimensions, "filters": [*self._songs.filter_columns]}

    async def close(self) -> None:
        """Close the connections to the provider."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
