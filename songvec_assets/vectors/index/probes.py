"""Searches of any table, as `songvec.search` makes them of the serving one; and their knobs.

Probes are the lists of an IVFFlat index that a search visits, or the `ef_search` of an HNSW graph. Candidates are the
rows that a search by bits puts into exact order. When to add here: another way to choose them. Keep out: the recall of
searches (`recall_searches`), and their SQL (`postgres/migrations/0002_search.sql`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.postgres.engine import raw_cursor
from songvec_assets.vectors.table import VectorTable


def find_smallest(reaches: Callable[[int], bool], tried: set[int], lists: int) -> int:
    """Halve the gap between the most probes that fail and the fewest that do not, to an eighth; recall grows with them.

    Args:
        reaches: whether n probes reach the target.
        tried: numbers of probes that were measured.
        lists: of the index; taken if none reaches the target.
    """
    # ascending: those above the first one that does are not measured again
    high = next(filter(reaches, sorted(tried)), None)
    if high is None and lists in tried:
        return lists
    high = high or lists
    low = max((probes for probes in tried if probes < high), default=0)
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class NearestSearch:
    """How the rows of a table nearest to a vector are found, as its index is now.

    Attributes:
        method: of the index, `ivfflat` or `hnsw`; None: there is none that is valid.
        is_bits: whether it finds candidates by bits.
        statement: gives song_ids and exact distances; its parameters are `vector`, `limit` and `candidates`.
    """

    method: str | None
    is_bits: bool
    statement: str

    @classmethod
    def read(cls, connection: sa.Connection, table: VectorTable, of_songs: bool = False) -> "NearestSearch":
        """Ask the server, which makes the statement of the index.

        Args:
            connection: in whose transaction it is to be used.
            of_songs: whether deleted songs are left out, as `songvec.search` does.
        """
        source = "(SELECT value FROM songvec.settings WHERE key = 'search')" if of_songs else "NULL"
        method, is_bits, statement = connection.execute(
            text(f"""
                SELECT method, is_bits, statement
                FROM songvec.nearest_sql(to_regclass(:table), :index, CAST('[]' AS jsonb), {source})
            """),
            {"table": table.name, "index": table.index_name},
        ).one()
        statement = statement.replace("%", "%%")
        for place, name in enumerate(("vector", "limit", "candidates"), start=1):
            statement = statement.replace(f"${place}", f"%({name})s")
        return cls(method, is_bits, statement)

    def set_knobs(self, connection: sa.Connection, probes: int) -> None:
        """Let this transaction's searches visit n lists, or as much of a graph.

        Switches just-in-time compilation off: it costs each search of a large table a tenth of a second, and makes
        nothing in it faster. Searches by bits go on to further lists until they have their candidates (pgvector 0.8).
        """
        knobs = {"jit": "off", "hnsw.ef_search" if self.method == "hnsw" else "ivfflat.probes": str(probes)}
        if self.is_bits and connection.scalar(
            # the cast loads the library, whose settings are unknown before
            text("SELECT CAST('[1]' AS vector) IS NOT NULL AND current_setting('ivfflat.iterative_scan', true) <> ''")
        ):
            knobs[f"{self.method}.iterative_scan"] = "relaxed_order"
        for name, value in knobs.items():
            connection.execute(text("SELECT set_config(:name, :value, true)"), {"name": name, "value": value})


def find_nearest(table: VectorTable, connection: sa.Connection, vector: str, limit: int) -> dict[int, float]:
    """Search a table with its recorded knobs, over more lists while those visited hold fewer rows than `limit`.

    pgvector ends a scan with the last row of the lists visited, even if LIMIT asks for more.

    Returns:
        song_ids and cosine distances, nearest first.
    """
    search, index = NearestSearch.read(connection, table), table.find_index(connection)
    lists = index.lists if index else 0
    probes, candidates = table.read_probes(connection) or 1, table.read_candidates(connection)
    parameters: dict[str, Any] = {"vector": vector, "limit": limit, "candidates": max(limit, candidates or 0)}
    with raw_cursor(connection) as cursor:
        while True:
            search.set_knobs(connection, probes)
            cursor.execute(search.statement, parameters)
            found = dict(cursor.fetchall())
            if len(found) >= limit or probes >= lists:
                return found
            # at least twice as many; more if a list was found to hold few rows
            probes = min(lists, max(2 * probes, -(-probes * limit // max(1, len(found)))))
