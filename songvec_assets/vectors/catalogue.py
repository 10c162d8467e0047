"""An index as the server's catalogue and our facts have it, and the probes that searches visit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_fact
from songvec_assets.vectors.sizes import choose_probes
from songvec_assets.vectors.table import TABLE, fact_key, index_name, read_changes

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class IndexFacts:
    """The index as the server has it.

    Attributes:
        n_rows: of the table when it was built.
        lists: of the index.
        probes: lists that a search visits.
        n_bytes: its size.
        n_changed: rows changed since it was built.
        version: another one for each build.
    """

    n_rows: int
    lists: int
    probes: int
    n_bytes: int
    n_changed: int = 0
    version: str = ""


def find_index(database: Database, table: str = TABLE) -> IndexFacts | None:
    """The valid index of a table, or None."""
    with database.get_connection() as connection:
        lists = find_lists(connection, table)
        if lists is None:
            return None
        fact = read_fact(connection, fact_key("index", table)) or {}
        n_rows = int(fact.get("n_rows", 0))
        name = index_name(table)
        n_bytes, file = connection.execute(
            text("SELECT pg_relation_size(to_regclass(:name)), pg_relation_filenode(to_regclass(:name))"),
            {"name": name},
        ).one()
        probes = read_probes(connection, table) or choose_probes(lists, n_rows)
        return IndexFacts(n_rows, lists, probes, int(n_bytes or 0), read_changes(connection, table), str(file))


def find_lists(connection: sa.Connection, table: str = TABLE, index: str | None = None) -> int | None:
    """The lists of a table's index, or of another one that is named: where it is there, whole and ours."""
    row = connection.execute(
        text("""
            SELECT c.reloptions
            FROM pg_index i
            JOIN pg_class c ON c.oid = i.indexrelid
            JOIN pg_am a ON a.oid = c.relam
            JOIN pg_opclass o ON o.oid = i.indclass[0]
            WHERE i.indexrelid = to_regclass(:index) AND i.indrelid = to_regclass(:table) AND i.indisvalid
              AND a.amname = 'ivfflat' AND o.opcname IN ('vector_cosine_ops', 'halfvec_cosine_ops')
        """),
        {"index": index or index_name(table), "table": table},
    ).one_or_none()
    if row is None:
        return None
    return int(dict(option.split("=") for option in row.reloptions or []).get("lists", 100))


def read_probes(connection: sa.Connection, table: str = TABLE) -> int | None:
    """The lists that searches visit, as stored with the index; None before there is one."""
    probes = read_fact(connection, fact_key("probes", table))
    return None if probes is None else int(probes)


def set_probes(connection: sa.Connection, probes: int | None) -> None:
    """Let this transaction's searches visit so many lists; None leaves the server's default.

    Without just-in-time compilation: it costs a large table's searches a tenth of a second each, and they have nothing
    that it makes faster.
    """
    if probes is not None:
        connection.execute(
            text("SELECT set_config('ivfflat.probes', :probes, true), set_config('jit', 'off', true)"),
            {"probes": str(probes)},
        )


def search_lists(
    connection: sa.Connection,
    search: Callable[[], Sequence[_Row]],
    limit: int,
    probes: int | None = None,
    table: str = TABLE,
) -> Sequence[_Row]:
    """Run a search, and again over more lists while those it visited hold fewer rows than it wants.

    pgvector ends a scan with the last row of the lists visited, however many rows LIMIT still wants. A first answer
    that is full costs no further round trip. Each answer is in strict order, unlike those of pgvector's relaxed scans.

    Args:
        connection: in a transaction, whose probes are set.
        search: its rows, at most `limit`.
        limit: rows wanted.
        probes: lists to visit first; None: those stored with the index.
        table: its name.
    """
    probes = probes or read_probes(connection, table)
    set_probes(connection, probes)
    rows = search()
    if len(rows) >= limit:
        return rows
    lists, probes = find_lists(connection, table) or 0, probes or 1
    while len(rows) < limit and probes < lists:
        # at least twice as many, else by the rows that a list was found to hold
        probes = min(lists, max(2 * probes, -(-probes * limit // max(1, len(rows)))))
        set_probes(connection, probes)
        rows = search()
    return rows
