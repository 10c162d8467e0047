"""The songs table: found by the names in the settings, checked, and the SQL that reads it.

When to add here: another check of the table, or another statement that reads texts. Keep out: messages about tables
(`advice`), the system catalog (`songs_table`), counts (`counts`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from psycopg2.extensions import encodings

from songvec_assets.errors import SourceError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs import songs_table
from songvec_assets.songs.advice import describe_missing, describe_numbering, describe_types, list_grants
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import FIELDS, TextSpec

OVERLAP = "2 hours"
"""How far an export looks back before the newest time seen. Covers clocks that differ by up to an hour plus
transactions that are open for up to an hour: their rows appear later, with earlier times."""

_ID_TYPES = ("smallint", "integer", "bigint")
PRESENT = {
    # without a time zone, UTC or the server's local time may have been written: take the earlier one
    "date": "least(current_date, (now() AT TIME ZONE 'UTC')::date)",
    "timestamp without time zone": "least(localtimestamp, now() AT TIME ZONE 'UTC')",
    "timestamp with time zone": "now()",
}
"""The types that an updated_at column may have, and the server's present time in each."""
# id and seed make the hashes of equal texts differ between songs and between columns
_HASH = " # ".join(
    f'coalesce(hashtextextended({text} COLLATE "C", song_id::bigint # {seed}), 0)'
    for text, seed in (("name", 0), ("artist", 1 << 40), ("lyrics", 1 << 41))
)
_SOURCE_HASH = f"{_HASH} AS source_hash"
HASHES = f"song_id, {_SOURCE_HASH}"
"""song_id and a hash of the song's three texts, which the server computes: no text is sent."""
SONGS = f"song_id, name, artist, lyrics, {_SOURCE_HASH}"
DIGEST = f"coalesce(sum({_HASH}), 0)::text"
"""A digest of all texts with their song_ids."""


def literal(text: str) -> str:
    """A string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def as_bytes(column: str) -> str:
    """SQL for a text's stored bytes, without conversion to UTF-8."""
    return f"convert_to({column}::text, getdatabaseencoding())"


SONGS_AS_BYTES = ", ".join(["song_id", *(f"{as_bytes(name)} AS {name}" for name in FIELDS), _SOURCE_HASH])


@dataclass(frozen=True)
class SongsSource:
    """A songs table that was found and checked.

    Attributes:
        table: its name, for messages.
        song_id_column: the id column's name, for messages.
        relation: the table, quoted for SQL.
        song_id: column, quoted for SQL.
        name, artist, lyrics: SQL expressions, to be cast to text: a quoted column, or an array's elements joined.
        spec: how its songs become texts.
        updated_at: quoted column, or None.
        updated_at_type: its type.
        row_security: whether policies may hide songs from this user.
        encoding: of the database, by PostgreSQL's name.
    """

    database: Database
    table: str
    song_id_column: str
    relation: str
    song_id: str
    name: str
    artist: str
    lyrics: str
    spec: TextSpec
    updated_at: str | None
    updated_at_type: str | None
    row_security: bool
    encoding: str

    @property
    def codec(self) -> str:
        """Python's name of the encoding. A database in SQL_ASCII does not check its bytes: mostly they are UTF-8."""
        return "utf-8" if self.encoding == "SQL_ASCII" else str(encodings.get(self.encoding, "utf-8"))

    @property
    def caution(self) -> str:
        """A warning if policies may hide songs; else empty."""
        hidden = f"row security is active on {self.table} for this user: policies may hide songs"
        return hidden if self.row_security else ""

    @property
    def identity(self) -> str:
        """Identifies the table, its columns and the required fields."""
        columns = (self.song_id, self.name, self.artist, self.lyrics, self.updated_at)
        return " ".join((self.relation, *map(str, columns), *sorted(self.spec.required)))

    def select(self, columns: str, song_range: SongIdRange | None = None, condition: str = "") -> str:
        """SELECT over songs.

        Args:
            columns: expressions over song_id, name, artist and lyrics, such as SONGS.
            song_range: limits the songs to a range, in the order of song_id.
            condition: made by one of the methods below.
        """
        cast, clauses = "", ""
        if song_range is not None:
            cast = "::integer"
            # qualified: a bare song_id would be the output column, for which no index gives the order
            clauses = (
                f"WHERE {self.song_id} >= {song_range.start} AND {self.song_id} < {song_range.stop}{condition} "
                f"ORDER BY source.{self.song_id}"
            )
        # OFFSET 0: expressions of a view are computed once, although a text is both read and hashed
        return (
            f"SELECT {columns} FROM (SELECT {self.song_id}{cast} AS song_id, {self.name}::text AS name, "
            f"{self.artist}::text AS artist, {self.lyrics}::text AS lyrics "
            f"FROM {self.relation} AS source {clauses} OFFSET 0) AS song"
        )

    def above(self, song_id: int) -> str:
        """Condition: the song_id is higher than this one."""
        return f" AND {self.song_id} > {song_id}"

    def among(self, song_ids: Iterable[int]) -> str:
        """Condition: the song_id is one of these."""
        return f" AND {self.song_id} = ANY ('{{{','.join(map(str, song_ids))}}}'::bigint[])"

    def updated_since(self, time: str) -> str:
        """Condition: the row was updated since a time (less OVERLAP), or has no time."""
        # rows that were committed late have a time before the newest one seen
        since = f"CAST({literal(time)} AS {self.updated_at_type}) - INTERVAL '{OVERLAP}'"
        return f" AND ({self.updated_at} >= {since} OR {self.updated_at} IS NULL)"

    def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows of a statement; percent signs in it are literal, since names may contain them."""
        with self.database.get_connection() as connection, raw_cursor(connection) as cursor:
            cursor.execute(statement)
            return list(cursor)


def find_source(database: Database, names: PostgresSettings, spec: TextSpec | None = None) -> SongsSource:
    """Find the songs table and its columns.

    Args:
        names: of the table and its columns.
        spec: how songs become texts: only columns that it names are required. Others are read if possible, else they
            are NULL. None: the default, which names all.

    Raises:
        SourceError: the table or a column is missing or may not be read, the id is not an integer, or a column to embed
            is not text; the message says what was found and what to set, grant or create.
    """
    spec = spec or TextSpec()
    with database.get_connection() as connection:
        table = songs_table.find_table(connection, names.songs_table)
        if table is None:
            raise SourceError(describe_missing(connection, names.songs_table))
        columns = table.columns
        song_id = names.song_id_column or _choose_song_id(connection, table)
        by_field = {"name": names.name_column, "artist": names.artist_column, "lyrics": names.lyrics_column}
        texts = {name: column for name, column in by_field.items() if name in spec.fields}
        wanted = {"song_id": song_id, **texts, "updated_at": names.updated_at_column}
        _check_columns(connection, table, {name: column for name, column in wanted.items() if column}, texts)
        updated_at = columns.get(names.updated_at_column or "")

        def express(name: str, separator: str) -> str:
            column = columns.get(by_field[name])
            shown = column and (name in texts or (column.is_text and column.is_readable))
            return column.expression(separator) if column and shown else "NULL"

        return SongsSource(
            database=database,
            table=table.name,
            song_id_column=song_id,
            relation=table.relation,
            song_id=columns[song_id].quoted,
            name=express("name", "', '"),
            artist=express("artist", "', '"),
            lyrics=express("lyrics", r"E'\n'"),
            spec=spec,
            updated_at=updated_at.quoted if updated_at else None,
            updated_at_type=updated_at.base_kind if updated_at else None,
            row_security=table.row_security,
            encoding=str(connection.scalar(sa.text("SELECT getdatabaseencoding()"))),
        )


def _check_columns(
    connection: sa.Connection, table: songs_table.Table, wanted: dict[str, str], texts: dict[str, str]
) -> None:
    """Refuse a table that lacks columns, or has them in other types, or that this user may not read.

    Args:
        wanted: columns to read, by their part of the setting's name.
        texts: those to embed, likewise.
    """
    for name, column in wanted.items():
        if column not in table.columns:
            raise SourceError(
                f"table {table.name} has no column {column!r}; it has {', '.join(table.columns)}: set "
                f"SONGVEC_{name.upper()}_COLUMN"
            )
    if grants := list_grants(connection, table, [*wanted.values()]):
        raise SourceError(
            f"table {table.name} exists, and this user lacks a right to read it: let its owner run {' '.join(grants)}",
            "source.no-right",
        )
    kinds = {name: table.columns[column].kind for name, column in wanted.items()}
    base_kinds = {name: table.columns[column].base_kind for name, column in wanted.items()}
    if base_kinds["song_id"] not in _ID_TYPES:
        raise SourceError(
            f"the id column {wanted['song_id']!r} of {table.name} is {kinds['song_id']}; song_embeddings.song_id is "
            "INTEGER: name an integer column with SONGVEC_SONG_ID_COLUMN, or "
            f"{describe_numbering(connection, table, wanted['song_id'])}",
            "source.id-column",
        )
    if base_kinds.get("updated_at", "date") not in PRESENT:
        raise SourceError(
            f"SONGVEC_UPDATED_AT_COLUMN {wanted['updated_at']!r} is {kinds['updated_at']}; expected a date or "
            "timestamp column"
        )
    # numbers and JSON would be embedded, and paid for, in their raw form
    if any(not table.columns[column].is_text for column in texts.values()):
        raise SourceError(describe_types(connection, table, wanted["song_id"], [*wanted.values()], [*texts.values()]))


def _choose_song_id(connection: sa.Connection, table: songs_table.Table) -> str:
    primary_key = songs_table.find_primary_key(connection, table)
    # a key of another type is refused later, by its name
    if len(primary_key) == 1:
        return primary_key[0]
    found = f"its primary key is ({', '.join(primary_key)})" if primary_key else "it has no primary key"
    raise SourceError(
        f"table {table.name} has no single-column integer primary key ({found}): name its id with "
        "SONGVEC_SONG_ID_COLUMN",
        "source.id-column",
    )
