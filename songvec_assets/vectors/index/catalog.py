"""A vector index as the server's catalog has it, what is recorded of it, and its probes until they are measured.

When to add here: another fact of an index that a table reports. Keep out: whether to build one, and how (`index/`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.vectors.index.kinds import FIRST_CANDIDATES, KINDS, IndexKind

SMALL_TABLE_ROWS = 10_000
"""A search of a table up to this size visits all lists: it is quick anyway, and finds everything."""


@dataclass(frozen=True)
class BuiltIndex:
    """What is recorded of an index when it is built.

    Attributes:
        n_rows: of the table then; 0: not recorded.
        target, probes: the target when recall was first measured, and the probes that reached it; None: never.
        seconds: that the build took; 0: not recorded.
    """

    n_rows: int = 0
    target: float | None = None
    probes: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class StartedBuild:
    """What is recorded when a build begins.

    Attributes:
        n_changed: rows changed by then since the index before it was built.
        function: that makes bits of a vector, if the index is one of bits.
    """

    n_changed: int
    function: str | None = None


@dataclass(frozen=True)
class IndexInfo:
    """A table's index as the server has it.

    Attributes:
        n_rows: of the table when it was built.
        lists: of the index; 0: its kind has none.
        probes: lists that a search visits; without lists, the graph's `ef_search`.
        n_bytes: its size.
        n_changed: rows changed since it was built.
        version: differs for each build.
        kind: see `kinds`.
        candidates: that a search by bits puts into exact order; None: its kind has no bits.
    """

    n_rows: int
    lists: int
    probes: int
    n_bytes: int
    n_changed: int = 0
    version: str = ""
    kind: str = "ivfflat"
    candidates: int | None = None

    @classmethod
    def of(
        cls, found: "sa.Row[Any]", n_rows: int, n_changed: int, probes: int | None, candidates: int | None
    ) -> "IndexInfo":
        """From what `find_index` found and what is recorded; None: not recorded."""
        first = choose_knobs(KINDS[found.kind], found.lists, n_rows)
        knobs = probes or first[0], candidates or first[1]
        return cls(n_rows, found.lists, knobs[0], found.n_bytes, n_changed, found.file, found.kind, knobs[1])

    def describe(self) -> str:
        """What it is, in a few words."""
        lists = f", {self.lists:,} lists" if self.lists else ""
        return f"{self.kind}{lists} over {self.n_rows:,} rows"


def describe_knobs(probes: int, candidates: int | None) -> str:
    """How an index is searched: `12 probes`, or `12 probes and 200 candidates`."""
    return f"{probes:,} probes" + (f" and {candidates:,} candidates" if candidates else "")


def find_index(connection: sa.Connection, table: str, index: str) -> "sa.Row[Any] | None":
    """The kind, lists, n_bytes, file and function of a table's index; None: it is missing, invalid or none of `KINDS`.

    The file differs for each build. The function makes the bits that are indexed; None: no bits are indexed.
    """
    return connection.execute(
        text("""
            SELECT a.amname || CASE WHEN o.opcname = 'bit_hamming_ops' THEN '_bit'
                                    WHEN i.indkey[0] = 0 THEN '_halfvec' ELSE '' END AS kind,
                CASE a.amname WHEN 'hnsw' THEN 0 ELSE coalesce(
                    (SELECT option_value::int FROM pg_options_to_table(c.reloptions) WHERE option_name = 'lists'), 100
                ) END AS lists,
                pg_relation_size(c.oid) AS n_bytes, pg_relation_filenode(c.oid)::text AS file,
                (SELECT p.proname FROM pg_depend d JOIN pg_proc p ON p.oid = d.refobjid
                 WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_proc'::regclass
                   AND p.pronamespace = to_regnamespace('songvec')) AS function
            FROM pg_index i
            JOIN pg_class c ON c.oid = i.indexrelid
            JOIN pg_am a ON a.oid = c.relam
            JOIN pg_opclass o ON o.oid = i.indclass[0]
            WHERE i.indexrelid = to_regclass(:index) AND i.indrelid = to_regclass(:table) AND i.indisvalid
              AND (a.amname = 'ivfflat' AND o.opcname IN ('vector_cosine_ops', 'halfvec_cosine_ops')
                   OR a.amname IN ('ivfflat', 'hnsw') AND o.opcname = 'bit_hamming_ops')
        """),
        {"index": index, "table": table},
    ).one_or_none()


def choose_probes(lists: int, n_rows: int) -> int:
    """Lists that a search visits before recall is measured: the square root of all; all of a small table's."""
    return lists if n_rows <= SMALL_TABLE_ROWS else max(1, round(math.sqrt(lists)))


def choose_knobs(kind: IndexKind, lists: int, n_rows: int) -> tuple[int, int | None]:
    """Probes and candidates of a search before recall is measured."""
    if not kind.has_lists:
        return FIRST_CANDIDATES, FIRST_CANDIDATES
    return choose_probes(lists, n_rows), FIRST_CANDIDATES if kind.is_bits else None


def uses_index(cursor: Any, index: str, search: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the planner takes an index for a search."""
    cursor.execute(f"EXPLAIN (FORMAT JSON) {search}", parameters)
    return f'"{index}"' in json.dumps(cursor.fetchone()[0])
