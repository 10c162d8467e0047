"""A query's vector: made by the model of the table, within its prompt, and paid for from the budgets.

When to add here: another reason to refuse a query's text, or what its vector costs. Keep out: which songs are found
(`nearest`), and how a provider is asked (`embedding/`).
"""

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.budget import Budget, Reservation
from songvec_assets.embedding.embedder import Embedder, RequestHooks
from songvec_assets.embedding.pricing import TokenEstimator
from songvec_assets.embedding.prompts import NO_PROMPTS, fill_query
from songvec_assets.errors import (
    ProviderError,
    ProviderUnavailableError,
    SettingsError,
    TableMismatchError,
    VectorSizeError,
)
from songvec_assets.progress import run_event_loop
from songvec_assets.vectors.table import TableSpec


@dataclass
class _Hooks(RequestHooks):
    """Pays for a query's request.

    Attributes:
        reservation: grows by each try.
        is_in_flight: whether a try was sent that is not counted yet.
    """

    reservation: Reservation
    is_in_flight: bool = False

    async def before_try(self) -> None:
        self.is_in_flight = False
        await self.reservation.grow()

    async def before_send(self) -> None:
        self.is_in_flight = True

    def count_unusable(self, n_tokens: int) -> None:
        self.is_in_flight = False
        self.reservation.n_billed += n_tokens


async def embed(embedder: Embedder, text: str, budget: Budget | None = None) -> NDArray[np.float32]:
    """The vector of a query's text, (dimensions,). Cancelled, it may have been billed, and counts.

    Args:
        embedder: of the model that made the table's vectors; stays open.
        text: the words within their prompt.
        budget: of searches; None: it is not counted.

    Raises:
        SettingsError: it holds bytes that are not UTF-8: Python passes them on from a command line.
        BudgetExceededError: nothing was sent.
        ProviderError: no answer, or none that helps.
    """
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise SettingsError(
            "the query is not valid UTF-8: type it in a terminal whose encoding is UTF-8, or convert it first"
        ) from None
    if budget is None or budget.price.is_free:
        batch = await embedder.generate_embeddings_batch([text])
    else:
        [n_tokens] = TokenEstimator().estimate([n_bytes])
        reservation = Reservation(budget, n_tokens, check=lambda: None)
        hooks = _Hooks(reservation)
        try:
            await hooks.before_try()  # before the probe, which no hook precedes
            batch = await embedder.generate_embeddings_batch([text], hooks)
            reservation.n_billed += batch.n_tokens
        except asyncio.CancelledError:
            reservation.n_billed += n_tokens * hooks.is_in_flight
            raise
        finally:
            reservation.n_billed += embedder.take_probe_tokens()
            await reservation.settle()
    if batch.bad:
        raise ProviderError(
            "the server gives no vector for this query: its values are zero, null or not finite. Ask in other words",
            "provider.no-vector",
        )
    vector: NDArray[np.float32] = batch.embeddings[0]
    return vector


def embed_query(
    embedder: Embedder, query: str, prompt: str = NO_PROMPTS.query, budget: Budget | None = None
) -> NDArray[np.float32]:
    """See `embed`; closes the embedder.

    Args:
        embedder: of the model that made the table's vectors.
        query: what the songs are about.
        prompt: of that model for queries; see `Prompts`.
        budget: of searches; None: it is not counted.
    """

    async def embed_and_close() -> NDArray[np.float32]:
        try:
            return await embed(embedder, fill_query(prompt, query), budget)
        finally:
            await embedder.close()

    return run_event_loop(embed_and_close())


def check_server(
    asked: TableSpec, configured: TableSpec, server: str, error: ProviderError
) -> TableMismatchError | None:
    """What an error of a query's embedding means if the server is not the one that made the table's vectors.

    Args:
        asked: what the table holds: the query's vector was requested for it.
        configured: what the settings name.
        server: its URL.
        error: what came.

    Returns:
        The error to raise instead; None: the given one is right.
    """
    is_size = isinstance(error, VectorSizeError)
    is_other = (asked.model, asked.dimensions) != (configured.model, configured.dimensions)
    if isinstance(error, ProviderUnavailableError) or not (is_size or is_other):
        return None
    what = f"vectors of another size than {asked.dimensions}" if is_size else f"no vector ({error})"
    named = f", while the settings name {configured.model!r} ({configured.dimensions})" if is_other else ""
    return TableMismatchError(
        f"the table holds {asked.column_type} by {asked.model!r}, and for that model {server} gives {what}{named}: "
        f"point FIREWORKS_BASE_URL at a server of {asked.model!r}; or, if this one calls it otherwise, set "
        f"SONGVEC_MODEL_ID={asked.model} and SONGVEC_EMBEDDING_MODEL to its name there; or set SONGVEC_EMBEDDING_MODEL "
        "and SONGVEC_EMBEDDING_DIMENSIONS to what it serves, and `songvec swap` builds its table"
    )
