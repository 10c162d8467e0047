"""From a query to songs, by the SQL functions of `postgres/migrations/0002_search.sql`.

When to add here: another question to the serving table. Keep out: how songs are found (the SQL functions), a query's
vector (`queries`), and how an index is built or measured (`vectors/`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg2
import sqlalchemy as sa

from songvec_assets.errors import SearchError, SongvecError, TableMismatchError
from songvec_assets.postgres.engine import Database, error_border, raw_cursor
from songvec_assets.postgres.extension import check_search_path
from songvec_assets.search.query import Query
from songvec_assets.songs.source import SongsSource, as_bytes
from songvec_assets.vectors.spec import SERVING, TableSpec, read_serving

_REFUSED = "SONGV"
"""The SQLSTATE of the functions' own errors, whose detail is a code."""
_SEARCH_CODES = ("search.invalid", "search.column", "search.unknown-song", "search.no-index")
_FUSION = 60

# the songs table as the functions need it, with the schema in which this user finds the serving table
_SOURCE = f"""
    CAST(%(source)s AS jsonb) || jsonb_build_object('schema', (
        SELECT nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = to_regclass('{SERVING}')
    ))
"""
_SEARCH = f"songvec.search(%(vector)s, %(limit)s, %(words)s, %(filter)s, %(model)s, {_SOURCE})"
_SIMILAR = f"songvec.similar(%(song_id)s, %(limit)s, %(filter)s, {_SOURCE})"


@dataclass(frozen=True)
class Hit:
    """A song found.

    Attributes:
        song_id, name, artist, lyrics: the song as the source has it now.
        similarity: cosine similarity to the query, -1 to 1; None: one of the two has no vector.
        best_line: of the lyrics, which shows best why the song was found (see `lines`); None: there are no lyrics.
        explanation: the song's ranks in the lists that were fused, if requested.
    """

    song_id: int
    name: str
    artist: str
    lyrics: str | None
    similarity: float | None
    best_line: str | None = None
    explanation: str = ""


def search_songs(
    database: Database, source: SongsSource, query: Query, timeout_s: float | None = None
) -> Sequence[Hit]:
    """Find songs, best first, in one statement that can write nothing.

    Args:
        timeout_s: after which the server ends it; None: that of the role.

    Raises:
        SearchError: see `Query.check`; or the song is unknown, a value is none of its column's type, or a search by
            words lacks an index.
        TableMismatchError: nothing is loaded yet, or the table holds another model or size.
    """
    texts = ", ".join(map(as_bytes, (source.name, source.artist, source.lyrics)))
    song = f"SELECT {texts} FROM {source.relation} WHERE {source.song_id} = songvec_hit.id LIMIT 1"
    # SET for this transaction, in the same round trip: a session's settings would stay with a pooler's next client
    limited = "" if timeout_s is None else f"SET LOCAL statement_timeout = {round(timeout_s * 1000)};"
    statement = f"""
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ ONLY; {limited}
        SELECT songvec_hit.*, song.* FROM {_SEARCH if query.song_id is None else _SIMILAR} WITH ORDINALITY
            AS songvec_hit (id, similarity, vector_rank, text_rank, place), LATERAL ({song.replace("%", "%%")}) AS song
        ORDER BY place
    """
    hits = []
    rows = _execute(database, statement, query.parameters | _describe_source(source, query.columns))
    for song_id, similarity, *ranks, _, name, artist, lyrics in rows:
        explanation = _explain(*ranks) if query.explain else ""
        hits.append(Hit(song_id, *_decode(source, name, artist, lyrics), similarity, explanation=explanation))
    return hits


def record_source(database: Database, source: SongsSource, columns: Sequence[str]) -> None:
    """Record the songs table, and the columns to filter by, for callers of the SQL functions; only if they changed."""
    statement = f"""
        INSERT INTO songvec.settings (key, value)
        SELECT 'search', described FROM (SELECT {_SOURCE} AS described) AS source
        WHERE NOT EXISTS (SELECT FROM songvec.settings WHERE key = 'search' AND value = described)
        ON CONFLICT (key) DO UPDATE SET value = excluded.value RETURNING key
    """
    _execute(database, statement, _describe_source(source, columns))


def _describe_source(source: SongsSource, columns: Sequence[str]) -> dict[str, str]:
    """The parameter of `_SOURCE`."""
    described = {
        "songs": source.relation,
        "song_id": source.song_id_column,
        "name": _read_column(source.name),
        "artist": _read_column(source.artist),
        "columns": [*columns],
    }
    return {"source": json.dumps(described)}


def _execute(database: Database, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
    """The rows of a statement. In AUTOCOMMIT it is one round trip, after the pool's own test."""
    autocommit = database.get_engine("web").execution_options(isolation_level="AUTOCOMMIT")
    with error_border(), autocommit.connect() as connection, raw_cursor(connection) as cursor:
        try:
            cursor.execute(statement, parameters)
        except psycopg2.Error as error:
            raise _read_refusal(error) from error
        return list(cursor)


def _read_column(expression: str) -> str | None:
    """The column of a source's expression: a quoted name, or one in a function; None: it has none."""
    quoted = re.search(r'"((?:[^"]|"")+)"', expression)
    return quoted[1].replace('""', '"') if quoted else None


def _read_refusal(error: psycopg2.Error) -> SongvecError | psycopg2.Error:
    state = error.pgcode or ""
    if state.startswith("22"):
        return SearchError(f"the query holds a value that the server cannot read: {error.diag.message_primary}")
    if state != _REFUSED:
        return error
    message, code = str(error.diag.message_primary), str(error.diag.message_detail)
    return SearchError(message, code) if code in _SEARCH_CODES else TableMismatchError(message, code)


def _explain(vector_rank: int | None, text_rank: int | None) -> str:
    ranks = {"nearest": vector_rank, "matching": text_rank}
    named = [f"{place}. {name}" for name, place in ranks.items() if place]
    return f"{', '.join(named)}; score {sum(1 / (_FUSION + place) for place in ranks.values() if place):.4f}"


def check_searchable(database: Database, spec: TableSpec) -> None:
    """Refuse to search a table that is missing or holds another model, before the query is paid for.

    Raises:
        TableMismatchError: nothing is loaded yet, or the table holds another model, size or type.
        DatabaseError: this user's search_path does not lead to the extension.
    """
    with database.get_connection("web") as connection:
        loaded = read_serving(connection)
        if loaded != spec:
            raise TableMismatchError(
                f"the table holds {loaded.column_type} by {loaded.model!r}, the configured embedder makes "
                f"{spec.column_type} by {spec.model!r}: `songvec swap` builds its table, or set back the model or key "
                "that filled this one"
            )
        check_search_path(connection)


def read_songs(
    connection: sa.Connection, source: SongsSource, song_ids: Sequence[int]
) -> dict[int, tuple[str, str, str | None]]:
    """Name, artist and lyrics of some songs; deleted ones are left out. Bytes that cannot be decoded become U+FFFD."""
    columns = ", ".join(map(as_bytes, (source.name, source.artist, source.lyrics)))
    with raw_cursor(connection) as cursor:
        cursor.execute(
            f"SELECT {source.song_id}, {columns} FROM {source.relation} "
            f"WHERE {source.song_id} IN ({', '.join(map(str, song_ids))})"
        )
        return {song_id: _decode(source, *texts) for song_id, *texts in cursor}


def _decode(source: SongsSource, *texts: memoryview | None) -> tuple[str, str, str | None]:
    """Name, artist and lyrics of a song, from their stored bytes."""
    name, artist, lyrics = (None if each is None else bytes(each).decode(source.codec, "replace") for each in texts)
    return name or "", artist or "", lyrics
