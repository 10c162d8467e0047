"""Whether a song's text or id changed since the last look: by counts and ids, and by a digest of all texts.

When to add here: another cheap sign of a change. Keep out: what is done about a change.
"""

import time
from dataclasses import dataclass, replace

import msgspec

from songvec_assets.songs.counts import IdSums
from songvec_assets.songs.source import DIGEST, SongsSource, literal

CHANGED, UNCHANGED = "a song's text or id changed", "nothing changed"


@dataclass(frozen=True)
class SourceState:
    """Cheap measurements of the source table.

    Attributes:
        ids: of all rows; ids of more than 31 bits by their remainder.
        highest_id: highest song_id; None if there are no rows.
        newest: the latest time of the updated_at column, as text; None if there is none.
        n_writes: rows inserted, updated and deleted, by the server's statistics; None if they are incomplete: for
            views, foreign tables, and tables with a foreign partition.
    """

    ids: IdSums
    highest_id: int | None
    newest: str | None
    n_writes: int | None

    @property
    def n_songs(self) -> int:
        """Rows."""
        return self.ids.n_rows

    def describe(self) -> str:
        """One line."""
        newest = f", the newest of {self.newest}" if self.newest else ""
        return f"{self.n_songs:,} songs in Postgres, the highest id {self.highest_id}{newest}"


def measure_source(source: SongsSource) -> SourceState:
    """Measure the source; index-only scans, if possible."""
    newest = f"max({source.updated_at})::text" if source.updated_at else "NULL"
    # squares of larger ids would overflow
    sums = IdSums.columns(f"({source.song_id} % {2**31 - 1})")
    [(n_rows, total, squares, *rest)] = source.fetch(f"""
        WITH RECURSIVE part (oid) AS (
            SELECT to_regclass({literal(source.relation)})::oid
            UNION SELECT inhrelid FROM pg_inherits JOIN part ON inhparent = part.oid
        )
        SELECT {sums}, max({source.song_id}), {newest}, (
            SELECT sum(
                pg_stat_get_tuples_inserted(oid) + pg_stat_get_tuples_updated(oid) + pg_stat_get_tuples_deleted(oid)
            )::bigint
            FROM pg_class WHERE oid IN (SELECT oid FROM part)
            HAVING bool_and(relkind IN ('r', 'p')) AND current_setting('track_counts')::boolean
        )
        FROM {source.relation}
    """)
    return SourceState(IdSums(n_rows, total or 0, squares or 0), *rest)


def digest_source(source: SongsSource) -> str:
    """A digest of all texts with their song_ids. The server reads the whole table."""
    [(digest,)] = source.fetch(source.select(DIGEST))
    return str(digest)


_DIGEST_REST = 20
"""Pause after a digest, as a multiple of the time it took: digests use a twentieth of a server core at most."""


@dataclass(frozen=True)
class Digest:
    """A digest of all texts, see `digest_source`.

    Attributes:
        value: the digest.
        at: when it was begun, seconds since the epoch.
        took_s: how long it took, in seconds.
    """

    value: str
    at: float
    took_s: float


@dataclass(frozen=True)
class SourceLook:
    """The state after a look at the source; the next look compares with it.

    Attributes:
        source: its identity.
        state: as last reported.
        digest: the last one taken.
        is_current: whether the digest was taken of the songs as `state` describes them.
    """

    source: str
    state: SourceState
    digest: Digest
    is_current: bool = True

    def dump(self) -> str:
        """As text, for a cursor."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def load(cls, cursor: str | None, source: SongsSource) -> "SourceLook | None":
        """The inverse of `dump`; None if the cursor is empty, or of another source or version."""
        try:
            look = msgspec.json.decode(cursor or "", type=cls)
        except msgspec.DecodeError:
            return None
        return look if look.source == source.identity else None

    def wants_digest(self, state: SourceState, now: float) -> bool:
        """Whether to compare the texts: they may have changed, and the last digest is long enough ago."""
        if 0 <= now - self.digest.at < _DIGEST_REST * self.digest.took_s:
            return False
        return not self.is_current or self._may_differ(state) or state.ids != self.state.ids

    def judge(self, state: SourceState, digest: Digest | None) -> "LookResult":
        """Compare with the last look.

        Args:
            state: the current one.
            digest: of the current texts; None: it was not taken.
        """
        if state.ids != self.state.ids:
            look = replace(self, state=state, digest=digest or self.digest, is_current=digest is not None)
            return LookResult(look, True, CHANGED)
        may_differ = self._may_differ(state)
        if digest is None:
            waits = may_differ or not self.is_current
            # the old state is kept, so that the texts written since are still compared
            later = "texts are compared later: comparing takes a twentieth of the time at most"
            return LookResult(self, False, later if waits else UNCHANGED)
        known = replace(self, state=state, digest=digest, is_current=True)
        # a digest of other songs says nothing about these
        differs = self.digest.value != digest.value if self.is_current else may_differ
        if differs:
            return LookResult(known, True, CHANGED)
        written = "rows were written, but no song's text or id changed"
        return LookResult(known, False, written if may_differ else UNCHANGED)

    def _may_differ(self, state: SourceState) -> bool:
        """Whether the server counted writes, or cannot count them."""
        return state.n_writes is None or state.n_writes != self.state.n_writes


@dataclass(frozen=True)
class LookResult:
    """What a look at the source found.

    Attributes:
        look: to compare with next time.
        changed: whether a song's text or id changed since the last look.
        note: what is known, in words.
    """

    look: SourceLook
    changed: bool
    note: str


def look_at_source(source: SongsSource, cursor: str | None) -> LookResult:
    """Look whether a song's text or id changed since the last look.

    Args:
        cursor: the last look's `dump`; None or anything else: this is the first look.

    Returns:
        A first look counts as a change.
    """
    before = SourceLook.load(cursor, source)
    state, now = measure_source(source), time.time()
    if before is not None and not before.wants_digest(state, now):
        return before.judge(state, None)
    # after the state: writes in between count at the next look
    began = time.monotonic()
    value = digest_source(source)
    digest = Digest(value, now, time.monotonic() - began)
    if before is None:
        return LookResult(SourceLook(source.identity, state, digest), True, CHANGED)
    return before.judge(state, digest)
