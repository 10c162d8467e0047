"""An IVFFlat index as the server's catalog has it, what is recorded when it is built, and its probes until measured.

When to add here: another fact of an index that a table reports. Keep out: whether to build one, and how (`index/`).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import text

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
class IndexInfo:
    """A table's index as the server has it.

    Attributes:
        n_rows: of the table when it was built.
        lists: of the index.
        probes: lists that a search visits.
        n_bytes: its size.
        n_changed: rows changed since it was built.
        version: differs for each build.
    """

    n_rows: int
    lists: int
    probes: int
    n_bytes: int
    n_changed: int = 0
    version: str = ""


def find_index(connection: sa.Connection, table: str, index: str) -> "sa.Row[Any] | None":
    """The lists, n_bytes and file of a table's index; None if it is missing, invalid or not IVFFlat by cosine.

    The file differs for each build.
    """
    return connection.execute(
        text("""
            SELECT coalesce((SELECT option_value::int FROM pg_options_to_table(c.reloptions)
                             WHERE option_name = 'lists'), 100) AS lists,
                pg_relation_size(c.oid) AS n_bytes, pg_relation_filenode(c.oid)::text AS file
            FROM pg_index i
            JOIN pg_class c ON c.oid = i.indexrelid
            JOIN pg_am a ON a.oid = c.relam
            JOIN pg_opclass o ON o.oid = i.indclass[0]
            WHERE i.indexrelid = to_regclass(:index) AND i.indrelid = to_regclass(:table) AND i.indisvalid
              AND a.amname = 'ivfflat' AND o.opcname IN ('vector_cosine_ops', 'halfvec_cosine_ops')
        """),
        {"index": index, "table": table},
    ).one_or_none()


def choose_probes(lists: int, n_rows: int) -> int:
    """Lists that a search visits before recall is measured: the square root of all; all of a small table's."""
    return lists if n_rows <= SMALL_TABLE_ROWS else max(1, round(math.sqrt(lists)))


def uses_index(cursor: Any, index: str, search: str, vector: str) -> bool:
    """Whether the planner takes an index for a search, whose only parameter is a vector."""
    cursor.execute(f"EXPLAIN (FORMAT JSON) {search}", (vector,))
    return f'"{index}"' in json.dumps(cursor.fetchone()[0])
