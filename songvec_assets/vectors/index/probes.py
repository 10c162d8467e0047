"""Probes: how many lists of an IVFFlat index a search visits, and when it goes on to further lists.

When to add here: another way to choose probes. Keep out: the recall of searches with n probes (`searches`).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.vectors.table import VectorTable

_Row = TypeVar("_Row")


def find_smallest(reaches: Callable[[int], bool], tried: set[int], lists: int) -> int:
    """Halve the gap between the most probes that fail and the fewest that do not, to an eighth; recall grows with them.

    Args:
        reaches: whether n probes reach the target.
        tried: numbers of probes that were measured.
        lists: of the index; taken if none reaches the target.
    """
    # ascending: those above the first are never asked for
    high = next(filter(reaches, sorted(tried)), None)
    if high is None and lists in tried:
        return lists
    high = high or lists
    low = max((probes for probes in tried if probes < high), default=0)
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def set_probes(connection: sa.Connection, probes: int | None) -> None:
    """Let this transaction's searches visit n lists; None leaves the server's default.

    Switches just-in-time compilation off: it costs each search of a large table a tenth of a second, and makes nothing
    in it faster.
    """
    if probes is not None:
        connection.execute(
            text("SELECT set_config('ivfflat.probes', :probes, true), set_config('jit', 'off', true)"),
            {"probes": str(probes)},
        )


def search(
    table: VectorTable,
    connection: sa.Connection,
    fetch: Callable[[], Sequence[_Row]],
    limit: int,
    probes: int | None = None,
) -> Sequence[_Row]:
    """Run a search, and repeat it over more lists while those visited hold fewer rows than `limit`.

    pgvector ends a scan with the last row of the lists visited, even if LIMIT asks for more. If the first answer is
    full, there is no further round trip. Each answer is in strict order, unlike those of pgvector's relaxed scans.

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
        # at least twice as many; more if a list was found to hold few rows
        probes = min(lists, max(2 * probes, -(-probes * limit // max(1, len(rows)))))
        set_probes(connection, probes)
        rows = fetch()
    return rows
