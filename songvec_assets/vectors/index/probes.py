"""How many lists of an IVFFlat index a search visits, its probes, and searches that go on to further lists.

When to add here: another way to choose probes. Keep out: how well searches with n probes find (`recall`).
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy import text

if TYPE_CHECKING:
    from songvec_assets.vectors.table import VectorTable

SMALL_TABLE_ROWS = 10_000
"""Up to here a search visits all lists: it costs nothing, and nothing is missed."""

_Row = TypeVar("_Row")


def choose_probes(lists: int, n_rows: int) -> int:
    """Lists that a search visits before recall is measured: the square root of all; all of a small table's."""
    return lists if n_rows <= SMALL_TABLE_ROWS else max(1, round(math.sqrt(lists)))


def find_smallest(reaches: Callable[[int], bool], tried: set[int], lists: int) -> int:
    """Halve the gap between the most probes that fail and the fewest that do not; recall grows with probes.

    Args:
        reaches: whether n probes reach the target.
        tried: that were measured; all lists among them if none reaches it.
        lists: of the index.
    """
    high = min((probes for probes in tried if reaches(probes)), default=None)
    if high is None:
        return lists
    low = max((probes for probes in tried if probes < high), default=0)
    return bisect.bisect_left(range(lists + 1), True, low + 1, high, key=reaches)


def set_probes(connection: sa.Connection, probes: int | None) -> None:
    """Let this transaction's searches visit n lists; None leaves the server's default.

    Without just-in-time compilation: it costs a large table's searches a tenth of a second each, and they have nothing
    that it makes faster.
    """
    if probes is not None:
        connection.execute(
            text("SELECT set_config('ivfflat.probes', :probes, true), set_config('jit', 'off', true)"),
            {"probes": str(probes)},
        )


def search(
    table: "VectorTable",
    connection: sa.Connection,
    fetch: Callable[[], Sequence[_Row]],
    limit: int,
    probes: int | None = None,
) -> Sequence[_Row]:
    """Run a search, and again over more lists while those it visited hold fewer rows than it wants.

    pgvector ends a scan with the last row of the lists visited, however many rows LIMIT still wants. A first answer
    that is full costs no further round trip. Each answer is in strict order, unlike those of pgvector's relaxed
    scans.

    Args:
        table: with its index.
        connection: in a transaction, whose probes are set.
        fetch: runs the search; returns its rows, at most `limit`.
        limit: rows wanted.
        probes: lists to visit first; None: those recorded with the index.
    """
    probes = probes or table.read_probes(connection)
    set_probes(connection, probes)
    rows = fetch()
    if len(rows) >= limit:
        return rows
    lists, probes = table.read_lists(connection) or 0, probes or 1
    while len(rows) < limit and probes < lists:
        # at least twice as many, else by the rows that a list was found to hold
        probes = min(lists, max(2 * probes, -(-probes * limit // max(1, len(rows)))))
        set_probes(connection, probes)
        rows = fetch()
    return rows
