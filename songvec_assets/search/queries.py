"""Vectors of queries: made by the model of the table, within its prompt, and paid for from the budgets.

When to add here: another reason to refuse a query's text, or what its vector costs. Keep out: which songs are found
(`nearest`), and how a provider is asked (`embedding/`).
"""

from collections.abc import Sequence

import numpy as np

from songvec_assets.embedding.batching import pack_requests
from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.embedder import Embedder
from songvec_assets.embedding.pricing import TokenEstimator
from songvec_assets.embedding.prompts import NO_PROMPTS
from songvec_assets.embedding.reservation import Reservation
from songvec_assets.embedding.wire import EmbeddingBatch, Float32Matrix
from songvec_assets.errors import (
    ProviderError,
    ProviderUnavailableError,
    SettingsError,
    TableMismatchError,
    VectorSizeError,
)
from songvec_assets.progress import run_event_loop
from songvec_assets.settings import Settings
from songvec_assets.vectors.spec import TableSpec

_MOST_TEXTS, _MOST_BYTES = 10, 32_000
"""Of a request: DashScope takes ten texts, the fewest of the servers in docs/providers.md; about 8,000 tokens."""


async def embed(
    embedder: Embedder, queries: Sequence[str], prompt: str | None, budget: Budget | None = None
) -> Float32Matrix:
    """The vectors of queries, (n queries, dimensions), with few requests.

    If it is cancelled, the request in flight may have been billed, and counts.

    Args:
        embedder: of the model that made the table's vectors; stays open.
        prompt: of that model for queries; see `Prompts`. None: there is none.
        budget: of searches; None: they are not counted.

    Raises:
        SettingsError: a query holds bytes that are not UTF-8: Python passes them on from a command line.
        BudgetExceededError: nothing more was sent.
        ProviderError: no answer, or none that helps.
    """
    # not `format`: the query may have braces, too
    texts = [(prompt or NO_PROMPTS.query).replace("{query}", query) for query in queries]
    found = []
    try:
        sizes = [len(text.encode()) for text in texts]
    except UnicodeEncodeError:
        raise SettingsError(
            "the query is not valid UTF-8: type it in a terminal whose encoding is UTF-8, or convert it first"
        ) from None
    for part in pack_requests(sizes, lambda: (_MOST_TEXTS, _MOST_BYTES)):
        batch = await _send(embedder, texts[part], sizes[part], budget)
        if batch.bad:
            named = "this query" if len(queries) == 1 else f"the query {queries[part][batch.bad[0]]!r}"
            raise ProviderError(
                f"the server gives no vector for {named}: its values are zero, null or not finite. Ask in other words",
                "provider.no-vector",
            )
        found.append(batch.embeddings)
    return np.concatenate(found)


async def _send(
    embedder: Embedder, texts: Sequence[str], sizes: Sequence[int], budget: Budget | None
) -> EmbeddingBatch:
    """One request, paid for from the budget."""
    if budget is None or budget.price.is_free:
        return await embedder.generate_embeddings_batch(texts)
    n_tokens = sum(TokenEstimator().estimate(sizes))
    async with Reservation(embedder, budget, n_tokens, check=lambda: None) as reservation:
        return await reservation.send(texts)


def embed_queries(
    embedder: Embedder, queries: Sequence[str], prompt: str | None, budget: Budget | None = None
) -> Float32Matrix:
    """See `embed`; closes the embedder."""

    async def embed_and_close() -> Float32Matrix:
        try:
            return await embed(embedder, queries, prompt, budget)
        finally:
            await embedder.close()

    return run_event_loop(embed_and_close())


def check_server(
    asked: TableSpec, configured: Settings, server: str, error: ProviderError
) -> TableMismatchError | None:
    """What an error of a query's embedding means if the server is not the one that made the table's vectors.

    Args:
        asked: what the table holds: the query's vector was requested for it.
        configured: the settings, which may name another model or size.

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
