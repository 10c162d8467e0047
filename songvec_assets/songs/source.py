"""The songs table as it is found in the database: its names checked and quoted, its ids counted by range."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import polars as pl
import sqlalchemy as sa
from psycopg2 import sql
from psycopg2.extensions import encodings

from songvec_assets.errors import SettingsError, SourceError
from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange, Tiling
from songvec_assets.songs.text import TextSpec

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
# pg_type.typcategory: strings and enums; a domain has its base type's
_TEXT_CATEGORIES = ("S", "E")


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
        song_id: column, quoted for SQL.
        name, artist, lyrics: SQL expressions, to be cast to text: a quoted column, or an array's elements joined.
        updated_at: quoted column, or None.
        updated_at_type: its type.
        row_security: whether policies may hide songs from this user.
        required: of name, artist and lyrics, those without which a song is not embedded.
        encoding: of the database.
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
    row_security: bool = False
    required: frozenset[str] = TextSpec().required
    encoding: str = "UTF8"

    @property
    def codec(self) -> str:
        """Python's name of the encoding. A database in SQL_ASCII holds whatever bytes came: UTF-8, mostly."""
        return "utf-8" if self.encoding == "SQL_ASCII" else str(encodings.get(self.encoding, "utf-8"))

    def as_bytes(self, column: str) -> str:
        """SQL for a text's bytes as they are stored, which the server does not convert."""
        return f"convert_to({column}::text, getdatabaseencoding())"

    @property
    def caution(self) -> str:
        """What to know when songs seem to be missing; empty where nothing hides them."""
        return f"row security is active on {self.table} for this user: policies may hide songs" * self.row_security

    @property
    def identity(self) -> str:
        """What tells this table and these columns from others."""
        columns = (self.song_id, self.name, self.artist, self.lyrics, self.updated_at)
        # snapshots say which songs are rejected
        required = [] if self.required == TextSpec().required else ["requires", *sorted(self.required)]
        return " ".join((self.relation, *map(str, columns), *required))

    def select_statement(self, lowest: int, stop: int, updated_since: str | None = None, as_bytes: bool = False) -> str:
        """SELECT of the songs with lowest <= song_id < stop, ordered by song_id; their texts as bytes where asked."""
        newer = ""
        if updated_since is not None:
            # rows that were committed late carry a time before the newest one seen
            quoted = updated_since.replace("'", "''")
            since = f"CAST('{quoted}' AS {self.updated_at_type}) - INTERVAL '{OVERLAP}'"
            newer = f" AND ({self.updated_at} >= {since} OR {self.updated_at} IS NULL)"
        columns = {"name": self.name, "artist": self.artist, "lyrics": self.lyrics}
        texts = (f"{self.as_bytes(each) if as_bytes else f'{each}::text'} AS {name}" for name, each in columns.items())
        return (
            f"SELECT {self.song_id}::integer AS song_id, {', '.join(texts)} FROM {self.relation} AS source "
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


def find_source(database: Database, names: SourceNames, spec: TextSpec | None = None) -> SongsSource:
    """Find the songs table and its columns.

    Args:
        database: where it is.
        names: of the table and its columns.
        spec: how songs become texts: only the columns that it names must be there. The others are read where they can
            be, and are NULL where not. None: the default, which names all.

    Raises:
        SourceError: the table or a column is missing or may not be read, the id is no integer, or a column that is
            embedded is no text; says what is there and what to set, grant or create.
    """
    spec = spec or TextSpec()
    with database.get_connection() as connection:
        table = _find_table(connection, names.table)
        columns = table.columns
        song_id_column = names.song_id_column or _choose_song_id(connection, table, names.table)
        by_field = {"name": names.name_column, "artist": names.artist_column, "lyrics": names.lyrics_column}
        texts = {f"SONGVEC_{name.upper()}_COLUMN": column for name, column in by_field.items() if name in spec.fields}
        wanted = {"SONGVEC_SONG_ID_COLUMN": song_id_column} | texts
        if names.updated_at_column:
            wanted["SONGVEC_UPDATED_AT_COLUMN"] = names.updated_at_column
        for variable, column in wanted.items():
            if column not in columns:
                raise SourceError(
                    f"table {names.table} has no column {column!r}; it has {', '.join(columns)}: set {variable}"
                )
        _check_rights(connection, table, [*wanted.values()], names.table)
        if columns[song_id_column].kind not in _ID_TYPES:
            raise SourceError(
                f"the id column {song_id_column!r} of {names.table} is {columns[song_id_column].kind}; "
                "song_embeddings.song_id is INTEGER: name an integer column with SONGVEC_SONG_ID_COLUMN, or "
                f"{_describe_numbering(connection, table, names.table, song_id_column)}"
            )
        updated_at_type = columns[names.updated_at_column].kind if names.updated_at_column else None
        if updated_at_type and updated_at_type not in _PRESENT:
            raise SourceError(
                f"SONGVEC_UPDATED_AT_COLUMN {names.updated_at_column!r} is {updated_at_type}; expected a date or "
                "timestamp column"
            )
        # numbers and JSON would be embedded, and paid for, as they are written
        if any(not columns[column].is_text for column in texts.values()):
            kept = [song_id_column, *texts.values(), *filter(None, [names.updated_at_column])]
            raise SourceError(_describe_types(connection, table, names.table, song_id_column, kept, [*texts.values()]))
        spare = {column for name, column in by_field.items() if name not in spec.fields}
        readable = {*texts.values(), *(each for each in spare if _can_be_shown(connection, table, each))}
        name, artist, lyrics = (
            columns[column].expression(separator) if column in readable else "NULL"
            for column, separator in zip(by_field.values(), ("', '", "', '", r"E'\n'"), strict=True)
        )
        return SongsSource(
            table=names.table,
            song_id_column=song_id_column,
            relation=table.relation,
            song_id=columns[song_id_column].quoted,
            name=name,
            artist=artist,
            lyrics=lyrics,
            updated_at=columns[names.updated_at_column].quoted if names.updated_at_column else None,
            updated_at_type=updated_at_type,
            row_security=table.row_security,
            required=spec.required,
            encoding=str(connection.scalar(sa.text("SELECT getdatabaseencoding()"))),
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
            f"FROM {source.relation} WHERE {source.song_id} BETWEEN {tiling.start} AND {MAX_SONG_ID} GROUP BY tile"
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
    """How the source table is, cheaply.

    Attributes:
        n_songs: its rows.
        highest_id: or None where there are none.
        newest: the latest time of its updated_at column, as text; None without one.
        sum_of_ids: of all rows; "0" where there are none.
        n_writes: rows inserted, updated and deleted since the server counts; None where it does not count them all:
            of views, of foreign tables and of tables that have one as a part.
    """

    n_songs: int
    highest_id: int | None
    newest: str | None
    sum_of_ids: str
    n_writes: int | None

    @property
    def ids(self) -> tuple[int, int | None, str]:
        """Another one where songs came or went."""
        return self.n_songs, self.highest_id, self.sum_of_ids

    def describe(self) -> str:
        """One line."""
        newest = f", the newest of {self.newest}" if self.newest else ""
        return f"{self.n_songs:,} songs in Postgres, the highest id {self.highest_id}{newest}"


def measure_source(database: Database, source: SongsSource) -> SourceState:
    """Count the songs, and look at the ids, the newest time and the writes. Reads indexes only, if it can."""
    newest = f"max({source.updated_at})::text" if source.updated_at else "NULL"
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        # as text in the statement: names may hold percent signs
        relation = sql.Literal(source.relation).as_string(cursor)
        cursor.execute(f"""
            WITH RECURSIVE part (oid) AS (
                SELECT to_regclass({relation})::oid
                UNION SELECT inhrelid FROM pg_inherits JOIN part ON inhparent = part.oid
            )
            SELECT count(*), max({source.song_id}), {newest}, coalesce(sum({source.song_id}), 0)::text, (
                SELECT sum(
                    pg_stat_get_tuples_inserted(oid) + pg_stat_get_tuples_updated(oid) + pg_stat_get_tuples_deleted(oid)
                )::bigint
                FROM pg_class WHERE oid IN (SELECT oid FROM part)
                HAVING bool_and(relkind IN ('r', 'p')) AND current_setting('track_counts')::boolean
            )
            FROM {source.relation}
        """)
        return SourceState(*cursor.fetchone())


def digest_source(database: Database, source: SongsSource) -> str:
    """An identity of all texts and whose they are. Reads the whole table, at the server."""
    # a row's text keeps NULL, '' and where a column ends apart; the id is the hash's seed
    row = f"ROW({source.name}::text, {source.artist}::text, {source.lyrics}::text)::text"
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        cursor.execute(
            f"SELECT coalesce(sum(hashtextextended({row}, {source.song_id})), 0)::text FROM {source.relation}"
        )
        return str(cursor.fetchone()[0])


_DIGEST_REST = 20
"""A digest is taken at most once in so many times as it takes: a twentieth of a core of the server."""


@dataclass(frozen=True)
class Digest:
    """Of all texts, see `digest_source`.

    Attributes:
        value: the digest.
        at: when it was begun, seconds since the epoch.
        took_s: how long it took.
    """

    value: str
    at: float
    took_s: float


@dataclass(frozen=True)
class SourceLook:
    """What was known after a look at the source; the next one compares with it.

    Attributes:
        source: which table and columns.
        state: as last reported.
        digest: the last one taken; None before the first.
        is_current: whether the digest is of the songs that `state` has.
    """

    source: str
    state: SourceState
    digest: Digest | None = None
    is_current: bool = False

    def dump(self) -> str:
        """As text, for a cursor."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, cursor: str | None, source: SongsSource) -> "SourceLook | None":
        """The inverse of `dump`; None for a cursor of another source, of another version or of none."""
        try:
            found = json.loads(cursor or "")
            digest = found["digest"] and Digest(**found["digest"])
            look = cls(found["source"], SourceState(**found["state"]), digest, found["is_current"])
        except (ValueError, KeyError, TypeError):
            return None
        return look if look.source == source.identity else None

    def wants_digest(self, state: SourceState, now: float) -> bool:
        """Whether the texts are to be compared: they may have changed, and the last digest is long enough ago."""
        if self.digest and 0 <= now - self.digest.at < _DIGEST_REST * self.digest.took_s:
            return False
        return not self.is_current or self._may_differ(state) or state.ids != self.state.ids

    def judge(self, state: SourceState, digest: Digest | None) -> "tuple[SourceLook, str | None]":
        """Compare with what was known.

        Args:
            state: as it is now.
            digest: of the texts now; None: it was not taken.

        Returns:
            What is known now; and why nothing is to be reported, None where a song's text or id changed.
        """
        if state.ids != self.state.ids:
            return replace(self, state=state, digest=digest or self.digest, is_current=digest is not None), None
        if digest is None:
            waits = self._may_differ(state) or not self.is_current
            # the state stays: what was written since is still to be compared
            return (
                self,
                "texts are compared later: that takes a twentieth of the time at most" if waits else "nothing changed",
            )
        known = replace(self, state=state, digest=digest, is_current=True)
        same = (
            self.digest is not None and self.digest.value == digest.value
            if self.is_current
            else (not self._may_differ(state))
        )
        if not same:
            return known, None
        return known, "rows were written, but no song's text or id changed" if self._may_differ(
            state
        ) else "nothing changed"

    def _may_differ(self, state: SourceState) -> bool:
        """Whether the server counted writes, or does not count them."""
        return state.n_writes is None or state.n_writes != self.state.n_writes


def look_at_source(database: Database, source: SongsSource, cursor: str | None) -> "tuple[SourceLook, str | None]":
    """Look whether a song's text or id changed since the last look.

    Args:
        database: where the songs are.
        source: which table and columns.
        cursor: what the last look's `dump` gave; None, or anything else, before the first.

    Returns:
        See `SourceLook.judge`; a first look reports.
    """
    before = SourceLook.load(cursor, source)
    state, now = measure_source(database, source), time.time()
    digest = None
    # after the state: what is written in between is counted at the next look
    if before is None or before.wants_digest(state, now):
        began = time.monotonic()
        value = digest_source(database, source)
        digest = Digest(value, now, time.monotonic() - began)
    if before is None:
        return SourceLook(source.identity, state, digest, is_current=True), None
    return before.judge(state, digest)


def check_ids(
    database: Database, source: SongsSource, tiling: Tiling, counts: Mapping[SongIdRange, RangeCount]
) -> None:
    """Refuse ids that the ranges do not reach.

    Args:
        database: where the songs are.
        source: which table and columns.
        tiling: how song_ids are cut.
        counts: see `count_ranges`.

    Raises:
        SettingsError: songs have ids below the first range, or the open tail holds more songs than a range may.
        SourceError: more songs have ids beyond INTEGER than within; has the statements that number them.
    """
    tiling.check_tail(tiling.tail, counts[tiling.tail].n_songs if tiling.tail in counts else 0)
    n_reached = sum(each.n_songs for each in counts.values())
    with database.get_connection() as connection, raw_cursor(connection) as cursor:
        cursor.execute(
            f"SELECT count(*) FILTER (WHERE {source.song_id} < {tiling.start}), "
            f"min({source.song_id}) FILTER (WHERE {source.song_id} < {tiling.start}), "
            f"count(*) FILTER (WHERE {source.song_id} > {MAX_SONG_ID}) FROM {source.relation} "
            # negative ids are rejected one by one
            f"WHERE {source.song_id} > {MAX_SONG_ID} OR {source.song_id} >= 0 AND {source.song_id} < {tiling.start}"
        )
        n_below, lowest, n_beyond = cursor.fetchone()
        if n_below:
            raise SettingsError(
                f"{n_below:,} songs of {source.table} have an id below SONGVEC_SONG_ID_START, which is {tiling.start}; "
                f"the lowest is {lowest}: set it to {lowest // tiling.width * tiling.width} or less"
            )
        if n_beyond > n_reached:
            table = _find_table(connection, source.table)
            raise SourceError(
                f"{n_beyond:,} songs of {source.table} have an id above {MAX_SONG_ID}, the highest INTEGER, which is "
                "the type of song_embeddings.song_id: "
                f"{_describe_numbering(connection, table, source.table, source.song_id_column)}"
            )


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


@dataclass(frozen=True)
class _Column:
    """A column as the catalogue has it.

    Attributes:
        number: its attnum.
        kind: its type's name.
        category: the type's category in pg_type, of an array's elements where it is one.
        is_array: whether it is one.
        quoted: for SQL.
    """

    number: int
    kind: str
    category: str
    is_array: bool
    quoted: str

    @property
    def is_text(self) -> bool:
        return self.category in _TEXT_CATEGORIES

    def expression(self, separator: str) -> str:
        """SQL for the column's text; an array's elements are joined by the separator, a literal of SQL."""
        return f"array_to_string({self.quoted}, {separator})" if self.is_array else self.quoted


@dataclass(frozen=True)
class _Table:
    oid: int
    schema: str
    relation: str
    columns: dict[str, _Column]
    row_security: bool


_TABLES = "c.relname = :table AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"


# policies of a table below a view hold for the view's owner; those of an owner hold where they are forced
_ROW_SECURITY = sa.text("""
    WITH RECURSIVE below (oid, reader) AS (
        SELECT CAST(:oid AS oid), oid FROM pg_roles WHERE rolname = current_user
        UNION
        SELECT d.refobjid, CASE WHEN EXISTS (
            SELECT FROM pg_options_to_table(v.reloptions)
            WHERE option_name = 'security_invoker' AND option_value::boolean
        ) THEN reader ELSE v.relowner END
        FROM below
        JOIN pg_class v ON v.oid = below.oid AND v.relkind IN ('v', 'm')
        JOIN pg_rewrite r ON r.ev_class = v.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
    )
    SELECT EXISTS (
        SELECT FROM below JOIN pg_class t ON t.oid = below.oid JOIN pg_roles u ON u.oid = below.reader
        WHERE t.relrowsecurity AND NOT u.rolsuper AND NOT u.rolbypassrls
          AND (t.relforcerowsecurity OR NOT pg_has_role(u.oid, t.relowner, 'USAGE'))
    )
""")


def _quote(connection: sa.Connection, *parts: str) -> str:
    return sql.Identifier(*parts).as_string(connection.connection.driver_connection)  # type: ignore[no-any-return]


def _find_table(connection: sa.Connection, name: str) -> _Table:
    """The table and its columns; the name is tried as written, then in lower case."""
    candidates = [(schema, table) for schema, _, table in (each.rpartition(".") for each in (name, name.lower()))]
    for schema, table in dict.fromkeys(candidates):
        row = connection.execute(
            sa.text(f"""
                SELECT n.nspname, c.relname, c.oid
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE {_TABLES}
                  AND CASE WHEN :schema = '' THEN pg_table_is_visible(c.oid) ELSE n.nspname = :schema END
            """),
            {"schema": schema, "table": table},
        ).one_or_none()
        if row is not None:
            columns = connection.execute(
                sa.text("""
                    WITH RECURSIVE base AS (
                        SELECT attname, attnum, format_type(atttypid, NULL) AS kind, atttypid AS type
                        FROM pg_attribute WHERE attrelid = :oid AND attnum > 0 AND NOT attisdropped
                        UNION ALL SELECT attname, attnum, kind, typbasetype
                        FROM base JOIN pg_type t ON t.oid = base.type WHERE t.typtype = 'd'
                    )
                    SELECT attname, attnum, kind, coalesce(element.typcategory, t.typcategory), t.typcategory = 'A'
                    FROM base JOIN pg_type t ON t.oid = base.type AND t.typtype <> 'd'
                    LEFT JOIN pg_type element ON t.typcategory = 'A' AND element.oid = t.typelem
                    ORDER BY attnum
                """),
                {"oid": row.oid},
            )
            found = {
                name: _Column(number, kind, category, is_array, _quote(connection, name))
                for name, number, kind, category, is_array in columns
            }
            relation = _quote(connection, row.nspname, row.relname)
            return _Table(
                row.oid, row.nspname, relation, found, bool(connection.scalar(_ROW_SECURITY, {"oid": row.oid}))
            )
    raise SourceError(_describe_missing(connection, name, [table for _, table in candidates]))


def _describe_missing(connection: sa.Connection, name: str, tables: Sequence[str]) -> str:
    """Why no table of that name is found: it is in a schema that is not searched, or may not be used, or nowhere."""
    elsewhere = connection.execute(
        sa.text(f"""
            SELECT n.nspname, c.relname, has_schema_privilege(n.oid, 'USAGE') AS usable
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE {_TABLES.replace("= :table", "= ANY (:tables)")} AND n.nspname !~ '^pg_|^information_schema$'
            ORDER BY usable DESC, n.nspname
        """),
        {"tables": list(tables)},
    ).all()
    usable = [f"{found}.{table}" for found, table, usable in elsewhere if usable]
    if usable:
        return (
            f"table {name} is not in a schema that is searched, this database has one elsewhere: set "
            f"SONGVEC_SONGS_TABLE={' or '.join(usable)}"
        )
    if elsewhere:
        found, table, _ = elsewhere[0]
        return (
            f"table {name} is in a schema that this user lacks a right on: let its owner run "
            f"GRANT USAGE ON SCHEMA {_quote(connection, found)} TO {_user(connection)}; then set "
            f"SONGVEC_SONGS_TABLE={found}.{table}"
        )
    return (
        f"this database has no table {name} in any schema: name the table of songs with SONGVEC_SONGS_TABLE, also as "
        "schema.table, or correct POSTGRES_URL"
    )


def _check_rights(connection: sa.Connection, table: _Table, wanted: Sequence[str], name: str) -> None:
    """Refuse a table that this user may not read, with what its owner has to run."""
    usable, readable = connection.execute(
        sa.text("SELECT has_schema_privilege(:schema, 'USAGE'), has_table_privilege(:oid, 'SELECT')"),
        {"schema": table.schema, "oid": table.oid},
    ).one()
    lacking = [] if readable else [column for column in wanted if not _may_read(connection, table, column)]
    user, grants = _user(connection), []
    if not usable:
        grants.append(f"GRANT USAGE ON SCHEMA {_quote(connection, table.schema)} TO {user};")
    if lacking:
        quoted = ", ".join(table.columns[column].quoted for column in lacking)
        columns = f" ({quoted})" if len(lacking) < len(wanted) else ""
        grants.append(f"GRANT SELECT{columns} ON {table.relation} TO {user};")
    if grants:
        raise SourceError(
            f"table {name} exists, and this user lacks a right to read it: let its owner run {' '.join(grants)}"
        )


def _may_read(connection: sa.Connection, table: _Table, column: str) -> bool:
    return bool(
        connection.scalar(
            sa.text("SELECT has_column_privilege(:oid, CAST(:number AS smallint), 'SELECT')"),
            {"oid": table.oid, "number": table.columns[column].number},
        )
    )


def _can_be_shown(connection: sa.Connection, table: _Table, column: str) -> bool:
    """Whether a column that is not needed can be read as text all the same."""
    return column in table.columns and table.columns[column].is_text and _may_read(connection, table, column)


def _user(connection: sa.Connection) -> str:
    return _quote(connection, str(connection.scalar(sa.text("SELECT current_user"))))


def _describe_types(
    connection: sa.Connection, table: _Table, name: str, song_id: str, kept: Sequence[str], texts: Sequence[str]
) -> str:
    """Which columns are no text, and the view that serves."""
    wrong = {column: table.columns[column] for column in texts if not table.columns[column].is_text}
    view = f"{name.rpartition('.')[2]}_as_text"
    joins: list[str] = []
    selected = []
    for column in dict.fromkeys(kept):
        expression = f"s.{table.columns[column].quoted}"
        if column in wrong:
            join, expression = _make_text(connection, table, column, f"t{len(joins) + 1}")
            joins += join
            expression = f"{expression} AS {table.columns[column].quoted}"
        selected.append(expression)
    kinds = ", ".join(f"column {column!r} is {each.kind}" for column, each in wrong.items())
    return (
        f"table {name}: expected text to embed, got other types: {kinds}. Create a view that has text there (look it "
        "over: the columns it takes are a guess) and set "
        f"SONGVEC_SONGS_TABLE={table.schema}.{view} SONGVEC_SONG_ID_COLUMN={song_id}: "
        f"CREATE VIEW {_quote(connection, table.schema, view)} AS SELECT {', '.join(selected)} "
        f"FROM {' '.join([f'{table.relation} AS s', *joins])};"
    )


def _describe_numbering(connection: sa.Connection, table: _Table, name: str, column: str) -> str:
    """The statements that number the songs of a table whose ids are no INTEGER, and the settings for the view."""
    base = name.rpartition(".")[2].lower()
    numbers, view = (_quote(connection, table.schema, f"{base}_{end}") for end in ("numbers", "numbered"))
    song_id = table.columns[column].quoted
    return (
        # row_number() would move with each new song, and what was paid for with it
        "number the songs in a table of their own, whose numbers stay as they are: "
        f"CREATE TABLE {numbers} (song_number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        f"{song_id} {table.columns[column].kind} NOT NULL UNIQUE); "
        f"INSERT INTO {numbers} ({song_id}) SELECT {song_id} FROM {table.relation} ON CONFLICT DO NOTHING; "
        f"CREATE VIEW {view} AS SELECT n.song_number, s.* FROM {table.relation} AS s "
        f"JOIN {numbers} AS n ON n.{song_id} = s.{song_id}; "
        f"set SONGVEC_SONGS_TABLE={table.schema}.{base}_numbered SONGVEC_SONG_ID_COLUMN=song_number, and run the "
        "INSERT again after new songs"
    )


def _make_text(connection: sa.Connection, table: _Table, column: str, alias: str) -> tuple[list[str], str]:
    """A join, if one is needed, and an expression that make a text of a column."""
    facts = table.columns[column]
    value = f"s.{facts.quoted}"
    referenced = connection.execute(
        sa.text("""
            SELECT n.nspname, c.relname, k.attname AS key, a.attname AS text
            FROM pg_constraint f
            JOIN pg_class c ON c.oid = f.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            JOIN pg_attribute k ON k.attrelid = c.oid AND k.attnum = f.confkey[1]
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            JOIN pg_type t ON t.oid = a.atttypid AND t.typcategory = 'S'
            WHERE f.contype = 'f' AND f.conrelid = :oid AND f.conkey = ARRAY[CAST(:number AS smallint)]
            ORDER BY a.attname IN ('name', 'title', :column) DESC, a.attnum LIMIT 1
        """),
        {"oid": table.oid, "number": facts.number, "column": column},
    ).one_or_none()
    if referenced is not None:
        other = _quote(connection, referenced.nspname, referenced.relname)
        key, words = (_quote(connection, each) for each in (referenced.key, referenced.text))
        return [f"LEFT JOIN {other} AS {alias} ON {alias}.{key} = {value}"], f"{alias}.{words}"
    if facts.is_array:
        return [], f"array_to_string({value}, ', ')"
    if facts.kind in ("json", "jsonb"):
        kind = facts.kind
        return [], (
            f"CASE {kind}_typeof({value}) WHEN 'object' THEN {value} ->> 'text' WHEN 'array' THEN "
            f"(SELECT string_agg(line, E'\\n') FROM {kind}_array_elements_text({value}) AS line) "
            f"ELSE {value} #>> '{{}}' END"
        )
    if facts.kind == "bytea":
        return [], f"convert_from({value}, 'UTF8')"
    return [], f"{value}::text"


def _choose_song_id(connection: sa.Connection, table: _Table, name: str) -> str:
    primary_key = _find_primary_key(connection, table.oid)
    # one of another type is refused by its name
    if len(primary_key) == 1:
        return primary_key[0]
    found = f"its primary key is ({', '.join(primary_key)})" if primary_key else "it has no primary key"
    raise SourceError(
        f"table {name} has no single-column integer primary key ({found}): name its id with SONGVEC_SONG_ID_COLUMN"
    )


def _find_primary_key(connection: sa.Connection, oid: int) -> list[str]:
    rows = connection.execute(
        sa.text("""
            SELECT a.attname
            FROM pg_index i
            JOIN pg_attribute a
                ON a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            WHERE i.indisprimary AND i.indrelid = :oid
        """),
        {"oid": oid},
    )
    return [column for (column,) in rows]
