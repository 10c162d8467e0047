"""The songs table as it is found in the database: its names checked and quoted, its ids counted by range."""

import json
from collections import Counter
from dataclasses import astuple, dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
import sqlalchemy as sa
from psycopg2 import sql

from songvec_assets.errors import SourceError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange, Tiling

OVERLAP = "2 hours"
"""How far an export looks back before the newest time seen. Covers writers whose clocks differ by up to an hour,
together with transactions that are open for up to an hour: their rows are committed with times before that one."""

_ID_TYPES = ("smallint", "integer", "bigint")
_PRESENT = {
    # without a time zone it is not known whether UTC or the server's own time was written: take the earlier one
    "date": "least(current_date, (now() AT TIME ZONE 'UTC')::date)",
    "timestamp without time zone": "least(localtimestamp, now() AT TIME ZONE 'UTC')",
    "timestamp with time zone": "now()",
}
"""The types that an updated_at column may have, and the server's present time in each."""


@dataclass(frozen=True)
class SourceNames:
    """The names as settings give them; None asks for the primary key, or for no updated_at column."""

    table: str = "songs"
    song_id_column: str | None = None
    name_column: str = "name"
    artist_column: str = "artist"
    lyrics_column: str = "lyrics"
    updated_at_column: str | None = None


@dataclass(frozen=True)
class SongsSource:
    """A songs table that exists and has the columns.

    Attributes:
        table: its name, for people.
        song_id_column: the id column's name, for people.
        relation: the table, quoted for SQL.
        song_id, name, artist, lyrics: columns, quoted for SQL.
        updated_at: quoted column, or None.
        updated_at_type: its type.
    """

    table: str
    song_id_column: str
    relation: str
    song_id: str
    name: str
    artist: str
    lyrics: str
    updated_at: str | None = None
    updated_at_type: str | None = None

    @property
    def identity(self) -> str:
        """What tells this table and these columns from others."""
        columns = (self.song_id, self.name, self.artist, self.lyrics, self.updated_at)
        return " ".join((self.relation, *map(str, columns)))

    def select_statement(self, lowest: int, stop: int, updated_since: str | None = None) -> str:
        """SELECT of the songs with lowest <= song_id < stop, ordered by song_id."""
        newer = ""
        if updated_since is not None:
            # rows that were committed late carry a time before the newest one seen
            quoted = updated_since.replace("'", "''")
            since = f"CAST('{quoted}' AS {self.updated_at_type}) - INTERVAL '{OVERLAP}'"
            newer = f" AND ({self.updated_at} >= {since} OR {self.updated_at} IS NULL)"
        return (
            f"SELECT {self.song_id}::integer AS song_id, {self.name}::text AS name, {self.artist}::text AS artist, "
            f"{self.lyrics}::text AS lyrics FROM {self.relation} AS source "
            f"WHERE {self.song_id} >= {int(lowest)} AND {self.song_id} < {int(stop)}{newer} "
            # a bare song_id would be the column of the result, which no index gives in order
            f"ORDER BY source.{self.song_id}"
        )


_PRIME = 2**31 - 1


class IdSums(NamedTuple):
    """A set of song_ids in short: equal for the same ids, and hardly ever for others."""

    n_rows: int = 0
    sum_of_ids: int = 0
    sum_of_squares: int = 0

    @classmethod
    def of(cls, song_ids: pl.Series) -> "IdSums":
        """The sums of these ids, each there once."""
        ids = song_ids.to_numpy().astype(np.int64)
        return cls(len(ids), int(ids.sum()), int((ids * ids % _PRIME).sum()))

    @staticmethod
    def columns(song_id: str) -> str:
        """The SQL expressions that compute the sums, of a quoted column."""
        return (
            f"count(*), sum({song_id}::bigint)::bigint, sum({song_id}::bigint * {song_id}::bigint % {_PRIME})::bigint"
        )


@dataclass(frozen=True)
class RangeCount:
    """What the source holds in a range.

    Attributes:
        ids: of its rows.
        newest: the latest updated_at that is not after the server's present time, as text; None without such a column,
            or such a row.
    """

    ids: IdSums = field(default_factory=IdSums)
    newest: str | None = None

    @property
    def n_songs(self) -> int:
        """Rows."""
        return self.ids.n_rows


def find_source(database: Database, names: SourceNames) -> SongsSource:
    """Find the songs table and its columns.

    Raises:
        SourceError: the table or a column is missing, or the id is no integer; says what is there and what to set.
    """
    with database.get_connection() as connection:
        schema, table, columns = _find_table(connection, names.table)
        primary_key = _find_primary_key(connection, schema, table)
        raw = connection.connection.driver_connection
        song_id_column = names.song_id_column or _choose_song_id(primary_key, columns, names.table)
        wanted = {
            "SONGVEC_SONG_ID_COLUMN": song_id_column,
            "SONGVEC_NAME_COLUMN": names.name_column,
            "SONGVEC_ARTIST_COLUMN": names.artist_column,
            "SONGVEC_LYRICS_COLUMN": names.lyrics_column,
        } | ({"SONGVEC_UPDATED_AT_COLUMN": names.updated_at_column} if names.updated_at_column else {})
        for variable, column in wanted.items():
            if column not in columns:
                raise SourceError(
                    f"table {names.table} has no column {column!r}; it has {', '.join(columns)}: set {variable}"
                )
        if columns[song_id_column] not in _ID_TYPES:
            raise SourceError(
                f"the id column {song_id_column!r} of {names.table} is {columns[song_id_column]}; "
                "song_embeddings.song_id is INTEGER: name an integer column with SONGVEC_SONG_ID_COLUMN"
            )
        updated_at_type = columns[names.updated_at_column] if names.updated_at_column else None
        if updated_at_type and updated_at_type not in _PRESENT:
            raise SourceError(
                f"SONGVEC_UPDATED_AT_COLUMN {names.updated_at_column!r} is {updated_at_type}; expected a date or "
                "timestamp column"
            )

        def quote(*parts: str) -> str:
            return sql.Identifier(*parts).as_string(raw)  # type: ignore[no-any-return]

        return SongsSource(
            table=names.table,
            song_id_column=song_id_column,
            relation=quote(schema, table),
            song_id=quote(song_id_column),
            name=quote(names.name_column),
            artist=quote(names.artist_column),
            lyrics=quote(names.lyrics_column),
            updated_at=quote(names.updated_at_column) if names.updated_at_column else None,
            updated_at_type=updated_at_type,
        )


def count_ranges(database: Database, source: SongsSource, tiling: Tiling) -> dict[SongIdRange, RangeCount]:
    """Count the source's songs by range; ranges without songs are left out. Reads the id's index only, if it can."""
    newest = "NULL"
    if source.updated_at:
        present = _PRESENT[str(source.updated_at_type)]
        newest = f"(max({source.updated_at}) FILTER (WHERE {source.updated_at} <= {present}))::text"
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        cursor.execute(
            f"SELECT least({source.song_id}, {tiling.stop}) / {tiling.width} AS tile, {newest}, "
            f"{IdSums.columns(source.song_id)} "
            f"FROM {source.relation} WHERE {source.song_id} BETWEEN 0 AND {MAX_SONG_ID} GROUP BY tile"
        )
        return {
            tiling.range_of(tile * tiling.width): RangeCount(IdSums(*sums), newest) for tile, newest, *sums in cursor
        }


def read_song_ids(database: Database, source: SongsSource, song_range: SongIdRange) -> pl.Series:
    """The ids of a range's songs, in no order."""
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        cursor.execute(
            f"SELECT {source.song_id} FROM {source.relation} "
            f"WHERE {source.song_id} >= {song_range.start} AND {source.song_id} < {song_range.stop}"
        )
        return pl.Series([song_id for (song_id,) in cursor], dtype=pl.Int32)


def has_row_security(database: Database, source: SongsSource) -> bool:
    """Whether row security hides rows of the source from this user."""
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        cursor.execute(f"SELECT row_security_active({sql.Literal(source.relation).as_string(cursor)}::regclass)")
        return bool(cursor.fetchone()[0])


@dataclass(frozen=True)
class SourceState:
    """How the source table is, cheaply: what tells that it changed, not what changed.

    Attributes:
        n_songs: its rows.
        highest_id: or None where there are none.
        newest: the latest time of its updated_at column, as text; None without one.
        n_writes: rows inserted, updated and deleted since the server counts; None for views.
    """

    n_songs: int
    highest_id: int | None
    newest: str | None
    n_writes: int | None

    @property
    def identity(self) -> str:
        """Another one where the table changed."""
        return json.dumps(astuple(self))

    def describe(self) -> str:
        """One line."""
        newest = f", the newest of {self.newest}" if self.newest else ""
        return f"{self.n_songs:,} songs in Postgres, the highest id {self.highest_id}{newest}"


def measure_source(database: Database, source: SongsSource) -> SourceState:
    """Count the songs, and look at the highest id and the newest time. Reads indexes only, if it can."""
    newest = f"max({source.updated_at})::text" if source.updated_at else "NULL"
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        # as text in the statement: names may hold percent signs
        relation = sql.Literal(source.relation).as_string(cursor)
        cursor.execute(
            f"SELECT count(*), max({source.song_id}), {newest}, (SELECT sum(n_tup_ins + n_tup_upd + n_tup_del)::bigint "
            f"FROM pg_stat_all_tables WHERE relid = to_regclass({relation}) OR relid IN "
            f"(SELECT relid FROM pg_partition_tree(to_regclass({relation})))) FROM {source.relation}"
        )
        return SourceState(*cursor.fetchone())


def count_unreachable_ids(database: Database, source: SongsSource) -> Counter[str]:
    """Count the songs whose id no range can hold, by reason."""
    reasons = {
        f"the id is above {MAX_SONG_ID}, the highest INTEGER": f"{source.song_id} > {MAX_SONG_ID}",
        "the id is negative": f"{source.song_id} < 0",
        "the id is NULL": f"{source.song_id} IS NULL",
    }
    counts: Counter[str] = Counter()
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        for reason, where in reasons.items():
            cursor.execute(f"SELECT count(*) FROM {source.relation} WHERE {where}")
            counts[reason] = cursor.fetchone()[0]
    return +counts


def _find_table(connection: sa.Connection, name: str) -> tuple[str, str, dict[str, str]]:
    """Schema, table, and its columns with their types; the name is tried as written, then in lower case."""
    for candidate in dict.fromkeys((name, name.lower())):
        schema, _, table = candidate.rpartition(".")
        row = connection.execute(
            sa.text("""
                SELECT n.nspname, c.relname, c.oid
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE c.relname = :table AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
                  AND CASE WHEN :schema = '' THEN pg_table_is_visible(c.oid) ELSE n.nspname = :schema END
            """),
            {"schema": schema, "table": table},
        ).one_or_none()
        if row is not None:
            columns = connection.execute(
                sa.text("""
                    SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
                    WHERE attrelid = :oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum
                """),
                {"oid": row.oid},
            )
            return row.nspname, row.relname, {column: kind for column, kind in columns}  # noqa: C416 - rows are no pairs to mypy
    raise SourceError(
        f"this database has no table {name} (or this user may not see it): name the table of songs with "
        "SONGVEC_SONGS_TABLE, also as schema.table"
    )


def _find_primary_key(connection: sa.Connection, schema: str, table: str) -> list[str]:
    rows = connection.execute(
        sa.text("""
            SELECT a.attname
            FROM pg_index i
            JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            WHERE i.indisprimary AND n.nspname = :schema AND c.relname = :table
        """),
        {"schema": schema, "table": table},
    )
    return [column for (column,) in rows]


def _choose_song_id(primary_key: list[str], columns: dict[str, str], table: str) -> str:
    if len(primary_key) == 1 and columns[primary_key[0]] in _ID_TYPES:
        return primary_key[0]
    found = f"its primary key is ({', '.join(primary_key)})" if primary_key else "it has no primary key"
    raise SourceError(
        f"table {table} has no single-column integer primary key ({found}): name its id with SONGVEC_SONG_ID_COLUMN"
    )
