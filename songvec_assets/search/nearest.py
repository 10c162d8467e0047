"""From a query's words to the nearest songs.

When to add here: another way to ask for the nearest songs. Keep out: how an index is built or measured (`vectors/`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
import sqlalchemy as sa
from numpy.typing import NDArray

from songvec_assets.embedding.embedder import Embedder
from songvec_assets.embedding.prompts import NO_PROMPTS, fill_query
from songvec_assets.errors import (
    ProviderError,
    ProviderUnavailableError,
    SettingsError,
    TableMismatchError,
    VectorSizeError,
)
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.postgres.schema import check_search_path
from songvec_assets.progress import run_event_loop
from songvec_assets.songs.source import SongsSource, as_bytes
from songvec_assets.vectors.index.probes import search
from songvec_assets.vectors.ledger import SERVING
from songvec_assets.vectors.table import TableSpec, VectorTable, define_table

_SPARE = 4


@dataclass(frozen=True)
class Hit:
    """A song found.

    Attributes:
        song_id, name, artist, lyrics: the song as the source has it now.
        similarity: cosine similarity to the query, -1 to 1.
        best_line: of the lyrics, which shows best why the song was found (see `lines`); None: there are no lyrics, or
            the search was for a vector.
    """

    song_id: int
    name: str
    artist: str
    lyrics: str | None
    similarity: float
    best_line: str | None = None


def embed_query(embedder: Embedder, query: str, prompt: str = NO_PROMPTS.query) -> NDArray[np.float32]:
    """A query's vector, (dimensions,).

    Args:
        embedder: of the model that made the table's vectors.
        query: what the songs are about.
        prompt: of that model for queries; see `Prompts`.

    Raises:
        SettingsError: it holds bytes that are not UTF-8: Python passes them on from a command line.
        ProviderError: no answer, or none that helps.
    """
    words = fill_query(prompt, query)
    try:
        words.encode()
    except UnicodeEncodeError:
        raise SettingsError(
            "the query is not valid UTF-8: type it in a terminal whose encoding is UTF-8, or convert it first"
        ) from None

    async def embed() -> NDArray[np.float32]:
        try:
            batch = await embedder.generate_embeddings_batch([words])
        finally:
            await embedder.close()
        if batch.bad:
            raise ProviderError(
                "the server gives no vector for this query: its values are zero, null or not finite. Ask in other "
                "words",
                "provider.no-vector",
            )
        vector: NDArray[np.float32] = batch.embeddings[0]
        return vector

    return run_event_loop(embed())


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
        probes: lists to visit first; None: as stored with the index. More if they hold fewer songs than `limit`.

    Raises:
        TableMismatchError: nothing is loaded yet, or the table holds another model.
    """
    table, columns = VectorTable(database), define_table(spec).c
    distance = columns.embedding.cosine_distance(embedding)
    nearest = sa.select(columns.song_id, (1 - distance).label("similarity")).order_by(distance)
    with database.get_connection("web") as connection:
        _check_searchable(connection, table, spec)
        # a second try if songs were deleted from the source since they were loaded; not a third, or a source that is
        # just being filled again would make each search read the whole table
        for n_rows in (limit, _SPARE * limit):
            find = partial(_fetch, connection, nearest.limit(n_rows))
            similarities = dict(search(table, connection, find, n_rows, probes))
            if table.read_spec(connection) != spec:  # the query locks the table: its record cannot change now
                raise TableMismatchError("the embeddings table was swapped during the search: retry", "table.swapped")
            songs = read_songs(connection, source, list(similarities)) if similarities else {}
            if len(songs) >= limit or len(similarities) < n_rows:
                break
    found = {song_id: Hit(song_id, *songs[song_id], similarities[song_id]) for song_id in songs}
    return [found[song_id] for song_id in similarities if song_id in found][:limit]


def _fetch(connection: sa.Connection, nearest: sa.Select[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(row.song_id, row.similarity) for row in connection.execute(nearest)]


def check_searchable(database: Database, spec: TableSpec) -> None:
    """Refuse to search a table that is missing or holds another model, before the query is paid for.

    Raises:
        TableMismatchError: nothing is loaded yet, or the table holds another model, size or type.
        DatabaseError: this user's search_path does not lead to the extension.
    """
    with database.get_connection("web") as connection:
        _check_searchable(connection, VectorTable(database), spec)


def _check_searchable(connection: sa.Connection, table: VectorTable, spec: TableSpec) -> None:
    loaded = _read_loaded(connection, table)
    if loaded != spec:
        raise TableMismatchError(
            f"the table holds {loaded.column_type} by {loaded.model!r}, the configured embedder makes "
            f"{spec.column_type} by {spec.model!r}: `songvec swap` builds its table, or set back the model or key that "
            "filled this one"
        )
    check_search_path(connection)


def _read_loaded(connection: sa.Connection, table: VectorTable) -> TableSpec:
    loaded = table.read_spec(connection)
    if loaded is None:
        raise TableMismatchError(
            "nothing is loaded yet, so nothing can be found: `songvec run` first", "table.not-loaded"
        )
    return loaded


def read_embeddings(database: Database, song_ids: Collection[int]) -> pl.DataFrame:
    """The vectors that the table holds of some songs, by song_id; songs without one are left out.

    Returns:
        Columns song_id (Int32) and embedding (Array of Float32, dimensions).

    Raises:
        TableMismatchError: nothing is loaded yet.
    """
    with database.get_connection("web") as connection:
        n_values = _read_loaded(connection, VectorTable(database)).dimensions
        check_search_path(connection)
        rows = connection.execute(
            sa.text(f"""
                SELECT song_id, vector_send(embedding::vector) FROM {SERVING}
                WHERE song_id = ANY (:song_ids) ORDER BY song_id
            """),
            {"song_ids": [int(song_id) for song_id in song_ids]},
        ).all()
    # pgvector sends two 16-bit integers, then the values, all big-endian
    values = np.frombuffer(b"".join(content[4:] for _, content in rows), dtype=">f4").astype(np.float32)
    return pl.DataFrame(
        {"song_id": [song_id for song_id, _ in rows], "embedding": values.reshape(-1, n_values)},
        {"song_id": pl.Int32, "embedding": pl.Array(pl.Float32, n_values)},
    )


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
        f"point FIREWORKS_BASE_URL at a server of {asked.model!r}; or set SONGVEC_EMBEDDING_MODEL and "
        "SONGVEC_EMBEDDING_DIMENSIONS to what this one serves, and `songvec swap` builds its table"
    )


def read_songs(
    connection: sa.Connection, source: SongsSource, song_ids: Sequence[int]
) -> dict[int, tuple[str, str, str | None]]:
    """Name, artist and lyrics of some songs; deleted ones are left out. Bytes that cannot be decoded become U+FFFD."""

    def decode(value: memoryview | None) -> str:
        return "" if value is None else bytes(value).decode(source.codec, "replace")

    columns = ", ".join(map(as_bytes, (source.name, source.artist, source.lyrics)))
    with raw_cursor(connection) as cursor:
        cursor.execute(
            f"SELECT {source.song_id}, {columns} FROM {source.relation} "
            f"WHERE {source.song_id} IN ({', '.join(map(str, song_ids))})"
        )
        return {
            song_id: (decode(name), decode(artist), None if lyrics is None else decode(lyrics))
            for song_id, name, artist, lyrics in cursor
        }
