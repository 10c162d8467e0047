"""What an IVFFlat index takes: lists, memory, temporary disk, time. Pure arithmetic.

Sizes are bytes, times seconds. Memory: pgvector 0.8.5's ivfbuild.c and ivfkmeans.c, Elkan's k-means (read 2026-11).
Times: fitted to CPU seconds of builds of 100,000 rows of 2,000 dimensions, 100 to 632 lists, on a core of a virtual
machine (AMD EPYC, measured 2026-11); they tell hours from minutes, no more.
"""

import math
from dataclasses import dataclass

MIN_BUILD_MEMORY = 64 << 20
"""Postgres' own default of maintenance_work_mem, which no build goes below."""
SORT_MEMORY_A_PROCESS = 32 << 20
"""Less for each, and the planner takes fewer parallel workers (PostgreSQL's plan_create_index_workers)."""
SMALL_TABLE_ROWS = 10_000
"""Up to here a search visits all lists: it costs nothing, and nothing is missed."""

_PAGE_BYTES = 8192
_PAGE_OVERHEAD_BYTES = 24 + 8  # header, and pgvector's own at the end
_POINTER_BYTES = 4
_TUPLE_BYTES, _LIST_BYTES = 8, 12  # before a row's vector, and before a centre's
_SORT_TUPLE_BYTES = 40
_ROW_BYTES, _KEY_BYTES = 24 + 16, 22  # a row's header, song_id and created_at; its entry in the primary key
_VALUE_BYTES = {"vector": 4, "halfvec": 2}

_KMEANS_S = 72e-6 / 2000  # a squared list and dimension
_ASSIGN_S = 0.39e-6 / 2000  # a row, list and dimension, in one process
_SORT_S = 25e-6 / 2000  # a row and dimension, in one process
_LOAD_S = 6.0 / (1 << 30)  # a byte of the index
_VALIDATE_S = 2.0 / (1 << 30)  # a byte of index and table, where writers go on


@dataclass(frozen=True)
class BuildEstimate:
    """What a build is expected to take.

    Attributes:
        n_rows: to be indexed.
        lists: of the index.
        memory_bytes: of the server, while it clusters.
        index_bytes: of disk, which stay.
        temporary_bytes: of disk, at most, while it sorts.
        seconds: of its phases, in their order: k-means, assigning, loading, and validation where writers go on.
    """

    n_rows: int
    lists: int
    memory_bytes: int
    index_bytes: int
    temporary_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """Of the whole build."""
        return sum(self.seconds.values())

    def describe(self) -> str:
        """One line."""
        disk = f"{format_bytes(self.index_bytes)} of disk"
        if self.temporary_bytes:
            disk += f" and up to {format_bytes(self.temporary_bytes)} more while it sorts"
        minutes = max(1, math.ceil(self.total_seconds / 60))
        return f"{self.lists:,} lists, {format_bytes(self.memory_bytes)} of memory, {disk}, about {minutes:,} min"


def choose_lists(n_rows: int) -> int:
    """The square root of the rows: at equal recall it beat rows/1000 on clustered data."""
    return max(1, round(math.sqrt(n_rows)))


def choose_probes(lists: int, n_rows: int) -> int:
    """Lists that a search visits before recall is measured: the square root of all; all of a small table's."""
    return lists if n_rows <= SMALL_TABLE_ROWS else max(1, round(math.sqrt(lists)))


def kmeans_bytes(lists: int, dimensions: int, vector_type: str = "vector") -> int:
    """Memory that k-means needs; maintenance_work_mem under it is a hard error of the server.

    Samples, their bounds to every centre, three sets of centres of which one is float32 sums, and the distances
    between centres.
    """
    samples = max(10_000, 50 * lists)
    vector = math.ceil((_VALUE_BYTES[vector_type] * dimensions + 8) / 8) * 8
    sums = 4 * dimensions * lists
    bounds = 4 * samples * lists + 4 * lists**2 + 8 * samples + 12 * lists
    return samples * vector + 2 * lists * vector + sums + bounds


def build_bytes(lists: int, dimensions: int, vector_type: str = "vector", workers: int = 0) -> int:
    """The maintenance_work_mem that a build is given: what k-means needs, a little more, and the workers' share."""
    needed = math.ceil(1.02 * kmeans_bytes(lists, dimensions, vector_type))
    return max(needed, (workers + 1) * SORT_MEMORY_A_PROCESS, MIN_BUILD_MEMORY)


def most_lists(memory_bytes: int, dimensions: int, vector_type: str = "vector") -> int:
    """The most lists whose build fits into so much memory; 0 where not even one does."""
    low, high = 0, 32_768
    while low < high:
        lists = (low + high + 1) // 2
        if build_bytes(lists, dimensions, vector_type) <= memory_bytes:
            low = lists
        else:
            high = lists - 1
    return low


def index_bytes(n_rows: int, lists: int, dimensions: int, vector_type: str = "vector") -> int:
    """The size of an index: the centres' pages, and each list's own, of which the last is half full on average."""
    vector = _VALUE_BYTES[vector_type] * dimensions + 8
    centres = math.ceil(lists / _a_page(vector + _LIST_BYTES))
    rows_a_page = _a_page(vector + _TUPLE_BYTES)
    rows = math.ceil(n_rows / rows_a_page) + (lists // 2 if rows_a_page > 1 else 0)
    return _PAGE_BYTES * (1 + centres + max(lists, rows))


def table_bytes(n_rows: int, dimensions: int, vector_type: str = "vector") -> int:
    """The size of a table and its primary key; a vector that fits into a page stays in its row's."""
    row = _ROW_BYTES + _VALUE_BYTES[vector_type] * dimensions + 8
    pages = math.ceil(row / _PAGE_BYTES) if row > _PAGE_BYTES - _PAGE_OVERHEAD_BYTES else 1 / _a_page(row)
    return math.ceil(n_rows * (_PAGE_BYTES * pages + _KEY_BYTES))


def _a_page(n_bytes: int) -> int:
    return max(1, (_PAGE_BYTES - _PAGE_OVERHEAD_BYTES) // (math.ceil(n_bytes / 8) * 8 + _POINTER_BYTES))


def estimate_build(
    n_rows: int,
    lists: int,
    dimensions: int,
    vector_type: str = "vector",
    workers: int = 0,
    cores: int | None = None,
    concurrently: bool = True,
) -> BuildEstimate:
    """Work out what a build takes.

    Args:
        n_rows: in the table.
        lists: of the index.
        dimensions: values a vector.
        vector_type: the column's type.
        workers: parallel processes beside the one that builds; they assign rows to lists, the rest is done by one.
        cores: that they share; None: each has its own.
        concurrently: whether writers may go on meanwhile, which costs a second look at index and table.
    """
    size = index_bytes(n_rows, lists, dimensions, vector_type)
    memory = build_bytes(lists, dimensions, vector_type, workers)
    sorted_bytes = n_rows * (_VALUE_BYTES[vector_type] * dimensions + 8 + _SORT_TUPLE_BYTES)
    processes = min(workers + 1, cores or workers + 1)
    seconds = {
        "k-means": _KMEANS_S * dimensions * max(lists, 200) * lists,
        "assigning": dimensions * n_rows * (_SORT_S + _ASSIGN_S * lists) / processes,
        "loading": _LOAD_S * size,
    }
    if concurrently:
        seconds["validation"] = _VALIDATE_S * 2 * size
    # parallel workers hand their sorted rows over in files, however few they are
    spills = workers > 0 or sorted_bytes > memory
    return BuildEstimate(n_rows, lists, memory, size, sorted_bytes if spills else 0, seconds)


def format_bytes(n_bytes: int) -> str:
    """`512 MiB`, `3.8 GiB`."""
    return f"{n_bytes / (1 << 20):,.0f} MiB" if n_bytes < 1 << 30 else f"{n_bytes / (1 << 30):,.1f} GiB"
