"""From a query's words to the nearest songs."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy import text

from songvec_assets.embedding.client import Embedder
from songvec_assets.embedding.offline import OfflineEmbedder
from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_fact
from songvec_assets.songs.source import SongsSource
from songvec_assets.vectors.table import TableSpec, check_table, define_table, loaded_spec

TASK = "Given a description of a theme, a mood or a story, retrieve songs whose lyrics match it"


@dataclass(frozen=True)
class Hit:
    """A song found.

    Attributes:
        song_id, name, artist, lyrics: the song as the source has it now.
        similarity: cosine similarity to the query, -1 to 1.
    """

    song_id: int
    name: str
    artist: str
    lyrics: str | None
    similarity: float


def embed_query(embedder: Embedder, query: str) -> NDArray[np.float32]:
    """A query's vector, (dimensions,). Qwen3-Embedding takes an instruction before queries, none before documents."""
    words = query if isinstance(embedder, OfflineEmbedder) else f"Instruct: {TASK}\nQuery:{query}"

    async def embed() -> NDArray[np.float32]:
        try:
            batch = await embedder.generate_embeddings_batch([words])
        finally:
            await embedder.close()
        vector: NDArray[np.float32] = batch.embeddings[0]
        return vector

    return asyncio.run(embed())


def search_songs(
    database: Database,
    source: SongsSource,
    spec: TableSpec,
    embedding: NDArray[np.float32],
    limit: int = 10,
    probes: int | None = None,
) -> Sequence[Hit]:
    """Find the songs nearest to a vector, nearest first.

    Args:
        database: where songs and table are.
        source: the songs table.
        spec: what the table holds.
        embedding: of the query, (dimensions,).
        limit: songs at most.
        probes: lists to visit; None for those stored with the index.

    Raises:
        TableMismatchError: nothing is loaded yet, or the table holds another model.
    """
    if loaded_spec(database) is None:
        raise TableMismatchError("nothing is loaded yet, so nothing can be found: `songvec run` first")
    check_table(database, spec)
    table = define_table(spec)
    distance = table.c.embedding.cosine_distance(embedding)
    nearest = sa.select(table.c.song_id, (1 - distance).label("similarity")).order_by(distance).limit(limit)
    with database.get_connection("web") as connection:
        probes = probes or read_fact(connection, "probes")
        if probes:
            connection.execute(text("SELECT set_config('ivfflat.probes', :probes, true)"), {"probes": str(probes)})
        similarities: dict[int, float] = {song_id: similarity for song_id, similarity in connection.execute(nearest)}  # noqa: C416 - rows are no pairs to mypy
        songs = connection.exec_driver_sql(
            f"SELECT {source.song_id}, {source.name}, {source.artist}, {source.lyrics} FROM {source.relation} "
            f"WHERE {source.song_id} = ANY (%s)",
            (list(similarities),),
        )
        found = {
            song_id: Hit(song_id, name, artist, lyrics, similarities[song_id])
            for song_id, name, artist, lyrics in songs
        }
    return [found[song_id] for song_id in similarities if song_id in found]
