"""The vectors of queries, by the table's model and within its prompt for queries.

When to add here: another way to embed queries. Keep out: which model that is (`searches`), and songs (`cache/`).
"""

from collections.abc import Sequence

import numpy as np

from songvec_assets.embedding.batching import pack_requests
from songvec_assets.embedding.embedder import Embedder
from songvec_assets.embedding.prompts import fill_query
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import ProviderError, SettingsError
from songvec_assets.progress import run_event_loop

_MOST_TEXTS, _MOST_BYTES = 10, 32_000
"""Of a request: DashScope takes ten texts, the fewest of the servers in docs/providers.md; about 8,000 tokens."""


def embed_queries(embedder: Embedder, queries: Sequence[str], prompt: str) -> Float32Matrix:
    """The vectors of queries, (n queries, dimensions), with few requests. Closes the embedder.

    Args:
        embedder: of the model that made the table's vectors.
        queries: what the songs are about.
        prompt: of that model for queries; see `Prompts`.

    Raises:
        SettingsError: a query holds bytes that are not UTF-8: Python passes them on from a command line.
        ProviderError: no answer, or none that helps.
    """
    texts = [fill_query(prompt, query) for query in queries]
    try:
        sizes = [len(text.encode()) for text in texts]
    except UnicodeEncodeError:
        raise SettingsError(
            "the query is not valid UTF-8: type it in a terminal whose encoding is UTF-8, or convert it first"
        ) from None

    async def embed() -> list[Float32Matrix]:
        found = []
        try:
            for part in pack_requests(sizes, lambda: (_MOST_TEXTS, _MOST_BYTES)):
                batch = await embedder.generate_embeddings_batch(texts[part])
                if batch.bad:
                    named = "this query" if len(queries) == 1 else f"the query {queries[part][batch.bad[0]]!r}"
                    raise ProviderError(
                        f"the server gives no vector for {named}: its values are zero, null or not finite. Ask in "
                        "other words",
                        "provider.no-vector",
                    )
                found.append(batch.embeddings)
        finally:
            await embedder.close()
        return found

    return np.concatenate(run_event_loop(embed()))
