"""Whether a song's text or id changed since the last look: by counts and ids, and by a digest of all texts.

When to add here: another cheap sign of a change. Keep out: what follows from one.
"""

import time
from dataclasses import dataclass, replace

import msgspec
from psycopg2 import sql

from songvec_assets.postgres.engine import Database, raw_cursor
from songvec_assets.songs.source import DIGEST, SongsSource, fetch_rows


@dataclass(frozen=True)
class SourceState:
    """How the source table is, cheaply.

    Attributes:
        n_songs: its rows.
        highest_id: or None if there are none.
        newest: the latest time of its updated_at column, as text; None without one.
        sum_of_ids: of all rows; "0" if there are none.
        n_writes: rows inserted, updated and deleted since the server counts; None if it does not count them all:
            of views, of foreign tables and of tables that have one as a part.
    """

    n_songs: int
    highest_id: int | None
    newest: str | None
    sum_of_ids: str
    n_writes: int | None

    @property
    def ids(self) -> tuple[int, int | None, str]:
        """Differs if songs were added or deleted."""
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
    [(digest,)] = fetch_rows(database, source.select(DIGEST))
    return str(digest)


_DIGEST_REST = 20
"""Rest after a digest, in units of the time that it took: a twentieth of a core of the server."""


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
        return msgspec.json.encode(self).decode()

    @classmethod
    def load(cls, cursor: str | None, source: SongsSource) -> "SourceLook | None":
        """The inverse of `dump`; None for a cursor of another source, of another version or of none."""
        try:
            look = msgspec.json.decode(cursor or "", type=cls)
        except msgspec.DecodeError:
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
            What is known now; and why nothing is to be reported, None if a song's text or id changed.
        """
        if state.ids != self.state.ids:
            return replace(self, state=state, digest=digest or self.digest, is_current=digest is not None), None
        may_differ = self._may_differ(state)
        if digest is None:
            waits = may_differ or not self.is_current
            # the state stays: what was written since is still to be compared
            later = "texts are compared later: that takes a twentieth of the time at most"
            return self, later if waits else "nothing changed"
        known = replace(self, state=state, digest=digest, is_current=True)
        if self.is_current and self.digest:
            differs = self.digest.value != digest.value
        else:
            differs = may_differ or self.is_current
        if differs:
            return known, None
        return known, "rows were written, but no song's text or id changed" if may_differ else "nothing changed"

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
