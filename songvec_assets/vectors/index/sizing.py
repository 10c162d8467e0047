"""The memory and disk that an index build needs, what the server has, and whether the build fits.

A build that does not fit is refused, or gets fewer lists, before it begins. What cannot be read from the server is not
assumed. Sizes are bytes. A `vector_type` is the type of what is indexed: `vector`, `halfvec` or `bit`. Memory: pgvector
0.8.5's ivfbuild.c and ivfkmeans.c, Elkan's k-means, and hnsw.h (read 2026-11). When to add here: another cost of a
build. Keep out: its time, which the server's progress shows (`build`).
"""

import bisect
import math
import shutil
from dataclasses import dataclass

from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database

MIN_BUILD_MEMORY = 64 << 20
"""Postgres' own default of maintenance_work_mem, which no build goes below."""
SORT_MEMORY_PER_PROCESS = 32 << 20
"""With less for each process, the planner takes fewer workers (PostgreSQL's plan_create_index_workers)."""
MOST_WORKERS = 8
"""More parallel processes would wait for the disk."""

_MOST_LISTS = 32_768  # pgvector's own limit
_PAGE_BYTES = 8192
_PAGE_OVERHEAD_BYTES = 24 + 8  # header, and pgvector's own at the end
_POINTER_BYTES = 4
_TUPLE_BYTES, _LIST_BYTES = 8, 12  # before a row's vector, and before a centre's
_SORT_TUPLE_BYTES = 40
_ROW_BYTES, _KEY_BYTES = 24 + 16, 22  # a row's header, song_id and created_at; its entry in the primary key
_VALUE_BYTES = {"vector": 4.0, "halfvec": 2.0, "bit": 0.125}
_NEIGHBORS = 32  # of a row in the graph's lowest level, twice its m; half as many in each of the few above
_ELEMENT_BYTES, _NEIGHBOR_BYTES, _NEIGHBOR_HEADER_BYTES = 72, 6, 4
_BUILD_ELEMENT_BYTES, _BUILD_NEIGHBOR_BYTES = 200, 16  # in memory, with the allocator's rounding

_FILES = ("/proc/meminfo", "/proc/cpuinfo", "/sys/fs/cgroup/memory.max")
_LIMITS = """
    SELECT
        pg_size_bytes(current_setting('effective_cache_size')) AS cache_bytes,
        (SELECT setting::bigint * 1024 FROM pg_settings WHERE name = 'temp_file_limit') AS temporary_bytes,
        least(current_setting('max_parallel_workers')::int, current_setting('max_worker_processes')::int) AS workers,
        current_setting('max_parallel_maintenance_workers')::int AS own_workers,
        has_function_privilege('pg_read_file(text, bigint, bigint, boolean)', 'EXECUTE')
            AND pg_has_role('pg_read_server_files', 'USAGE') AS reads_files,
        inet_server_addr() IS NULL AND pg_has_role('pg_read_all_settings', 'USAGE')
            AND current_setting('default_tablespace') = '' AND current_setting('temp_tablespaces') = ''
            AND (SELECT t.spcname = 'pg_default' FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace
                 WHERE d.datname = current_database()) AS disk_is_one
"""


@dataclass(frozen=True)
class BuildEstimate:
    """What a build is expected to need.

    Attributes:
        lists: of the index; 0: it is a graph.
        memory_bytes: of the server, during k-means, or for the graph.
        index_bytes: of disk, for the finished index.
        temporary_bytes: of disk, at most, while it sorts.
    """

    n_rows: int
    lists: int
    memory_bytes: int
    index_bytes: int
    temporary_bytes: int

    def describe(self) -> str:
        """One line."""
        disk = f"{format_bytes(self.index_bytes)} of disk"
        if self.temporary_bytes:
            disk += f" and up to {format_bytes(self.temporary_bytes)} more while it sorts"
        lists = f"{self.lists:,} lists" if self.lists else "a graph"
        return f"{lists}, {format_bytes(self.memory_bytes)} of memory, {disk}"


def choose_lists(n_rows: int) -> int:
    """The square root of the rows: on clustered data, searches were faster at equal recall than with rows/1000."""
    return max(1, round(math.sqrt(n_rows)))


def kmeans_bytes(lists: int, dimensions: int, vector_type: str = "vector") -> int:
    """Memory that k-means needs; if maintenance_work_mem is less, the server fails with an error.

    Samples, their bounds to every centre, three sets of centres (one of float32 sums), and the distances between
    centres.
    """
    samples = max(10_000, 50 * lists)
    vector = math.ceil(_vector_bytes(dimensions, vector_type) / 8) * 8
    sums = 4 * dimensions * lists
    bounds = 4 * samples * lists + 4 * lists**2 + 8 * samples + 12 * lists
    return samples * vector + 2 * lists * vector + sums + bounds


def build_bytes(lists: int, dimensions: int, vector_type: str = "vector", workers: int = 0) -> int:
    """The maintenance_work_mem of a build: what k-means needs and 2 % more, or what the workers need to sort."""
    needed = math.ceil(1.02 * kmeans_bytes(lists, dimensions, vector_type))
    return max(needed, (workers + 1) * SORT_MEMORY_PER_PROCESS, MIN_BUILD_MEMORY)


def most_lists(memory_bytes: int, dimensions: int, vector_type: str = "vector") -> int:
    """The most lists whose build fits into this memory; 0 if not even one does."""
    lists = range(1, _MOST_LISTS + 1)
    return bisect.bisect_right(lists, memory_bytes, key=lambda each: build_bytes(each, dimensions, vector_type))


def index_bytes(n_rows: int, lists: int, dimensions: int, vector_type: str) -> int:
    """The size of an index: pages of centres, and pages of each list, of which the last is half full on average."""
    vector = _vector_bytes(dimensions, vector_type)
    centres = math.ceil(lists / _per_page(vector + _LIST_BYTES))
    rows_per_page = _per_page(vector + _TUPLE_BYTES)
    rows = math.ceil(n_rows / rows_per_page) + (lists // 2 if rows_per_page > 1 else 0)
    return _PAGE_BYTES * (1 + centres + max(lists, rows))


def graph_bytes(n_rows: int, dimensions: int) -> int:
    """The size of an HNSW index on bits: of each row an element with its bits, and its neighbors."""
    element = math.ceil((_ELEMENT_BYTES + _vector_bytes(dimensions, "bit")) / 8) * 8
    neighbors = math.ceil((_NEIGHBOR_HEADER_BYTES + _NEIGHBORS * _NEIGHBOR_BYTES) / 8) * 8
    rows_per_page = (_PAGE_BYTES - _PAGE_OVERHEAD_BYTES) // (element + neighbors + 2 * _POINTER_BYTES)
    return _PAGE_BYTES * (1 + math.ceil(n_rows / max(1, rows_per_page)))


def graph_memory_bytes(n_rows: int, dimensions: int) -> int:
    """Memory in which an HNSW index on bits is built at once; with less, the rest is added row by row on disk."""
    neighbors = 1.07 * _NEIGHBORS * _BUILD_NEIGHBOR_BYTES
    return math.ceil(n_rows * (_BUILD_ELEMENT_BYTES + _vector_bytes(dimensions, "bit") + neighbors))


def table_bytes(n_rows: int, dimensions: int, vector_type: str) -> int:
    """The size of a table and its primary key; a vector that fits into a page is stored in its row's page."""
    row = _ROW_BYTES + _vector_bytes(dimensions, vector_type)
    pages = math.ceil(row / _PAGE_BYTES) if row > _PAGE_BYTES - _PAGE_OVERHEAD_BYTES else 1 / _per_page(row)
    return math.ceil(n_rows * (_PAGE_BYTES * pages + _KEY_BYTES))


def _vector_bytes(dimensions: int, vector_type: str) -> int:
    return math.ceil(_VALUE_BYTES[vector_type] * dimensions) + 8


def _per_page(n_bytes: int) -> int:
    return max(1, (_PAGE_BYTES - _PAGE_OVERHEAD_BYTES) // (math.ceil(n_bytes / 8) * 8 + _POINTER_BYTES))


def estimate_build(
    n_rows: int, lists: int, dimensions: int, vector_type: str = "vector", workers: int = 0
) -> BuildEstimate:
    """Estimate what a build needs.

    Args:
        dimensions: values per vector.
        vector_type: the column's type.
        workers: parallel processes in addition to the one that builds.
    """
    size = index_bytes(n_rows, lists, dimensions, vector_type)
    memory = build_bytes(lists, dimensions, vector_type, workers)
    sorted_bytes = n_rows * (_vector_bytes(dimensions, vector_type) + _SORT_TUPLE_BYTES)
    # parallel workers pass their sorted rows on in files, even if they are few
    spills = workers > 0 or sorted_bytes > memory
    return BuildEstimate(n_rows, lists, memory, size, sorted_bytes if spills else 0)


def estimate_graph(n_rows: int, dimensions: int, memory_bytes: int, workers: int = 0) -> BuildEstimate:
    """Estimate what an HNSW build on bits needs, of which it gets no more memory than there is."""
    least = max((workers + 1) * SORT_MEMORY_PER_PROCESS, MIN_BUILD_MEMORY)
    memory = min(memory_bytes, max(graph_memory_bytes(n_rows, dimensions), least))
    return BuildEstimate(n_rows, 0, memory, graph_bytes(n_rows, dimensions), 0)


def format_bytes(n_bytes: int) -> str:
    """`512 MiB`, `3.8 GiB`."""
    return f"{n_bytes / (1 << 20):,.0f} MiB" if n_bytes < 1 << 30 else f"{n_bytes / (1 << 30):,.1f} GiB"


@dataclass(frozen=True)
class Capacity:
    """What a build may take.

    Attributes:
        memory_bytes: of the server.
        memory_source: how that is known, in words.
        temporary_bytes: of files while it sorts; None: no limit.
        free_bytes: on the disk of the server's data; None: not known, as on another machine.
        workers: parallel processes in addition to the one that builds.
    """

    memory_bytes: int
    memory_source: str
    temporary_bytes: int | None
    free_bytes: int | None
    workers: int

    def fit_lists(self, lists: int, dimensions: int, vector_type: str) -> tuple[int, str]:
        """How many of these lists fit into memory, and why no more; no reason if all do.

        Raises:
            DatabaseError: not even one does.
        """
        fitting = most_lists(self.memory_bytes, dimensions, vector_type)
        needed = build_bytes(lists, dimensions, vector_type)
        if fitting >= lists:
            return lists, ""
        shortage = (
            f"{lists:,} lists need {format_bytes(needed)} of memory, {format_bytes(self.memory_bytes)} may be taken "
            f"({self.memory_source})"
        )
        if not fitting:
            raise DatabaseError(
                f"{shortage}: raise SONGVEC_INDEX_MEMORY_MB, or give the server more memory", "index.no-room"
            )
        return fitting, shortage

    def check_disk(self, estimate: BuildEstimate, table_bytes: int = 0) -> None:
        """Raise DatabaseError if the build would exceed the limit of temporary files, or fill the disk.

        Args:
            table_bytes: of rows that are to be loaded before it.
        """
        needed = estimate.temporary_bytes
        if self.temporary_bytes is not None and needed > self.temporary_bytes:
            raise DatabaseError(
                f"the build sorts in up to {format_bytes(needed)} of temporary files, temp_file_limit is "
                f"{format_bytes(self.temporary_bytes)}: let an administrator raise it, with ALTER ROLE … SET "
                f"temp_file_limit = '{needed // (1 << 20) + 1}MB'",
                "index.no-room",
            )
        needed += estimate.index_bytes + table_bytes
        rows = f", after {format_bytes(table_bytes)} for the rows to come" if table_bytes else ""
        if self.free_bytes is not None and needed > self.free_bytes:
            raise DatabaseError(
                f"the build needs {format_bytes(estimate.index_bytes)} of disk for the index and up to "
                f"{format_bytes(estimate.temporary_bytes)} while it sorts{rows}, {format_bytes(self.free_bytes)} are "
                "free: make room, halve it with SONGVEC_VECTOR_TYPE=halfvec, or index bits with "
                "SONGVEC_INDEX_KIND=ivfflat_bit",
                "index.no-room",
            )


def read_capacity(database: Database, memory_bytes: int | None = None, searched: bool = False) -> Capacity:
    """Ask the server what it has.

    Args:
        memory_bytes: of the setting; None: half of what is available, if that can be read.
        searched: whether searches go on meanwhile: a core is left to them.
    """
    with database.get_connection() as connection:
        limits = connection.execute(text(_LIMITS)).one()
        files = dict.fromkeys(_FILES, "")
        if limits.reads_files:
            read = text("SELECT coalesce(pg_read_file(:name, 0, 65536, true), '')")
            files = {name: str(connection.scalar(read, {"name": name})) for name in _FILES}
        folder = connection.scalar(text("SELECT current_setting('data_directory')")) if limits.disk_is_one else None
    available, cores = _available_memory(files), files["/proc/cpuinfo"].count("processor\t:") or None
    if memory_bytes is not None:
        source = "SONGVEC_INDEX_MEMORY_MB"
    elif available is not None:
        memory_bytes = available // 2
        source = (
            f"half of the {format_bytes(available)} available on the server; SONGVEC_INDEX_MEMORY_MB says otherwise"
        )
    else:
        memory_bytes = limits.cache_bytes
        source = "the server's effective_cache_size; SONGVEC_INDEX_MEMORY_MB says otherwise"
    # if the cores are not known, half of what the administrator allows, or what a build takes anyway
    workers = max(limits.workers // 2, limits.own_workers)
    if cores:
        # the process that builds takes a core itself
        workers = min(cores - (2 if searched else 1), MOST_WORKERS)
    return Capacity(
        memory_bytes,
        source,
        limits.temporary_bytes if limits.temporary_bytes >= 0 else None,
        _free_bytes(folder),
        max(0, min(workers, limits.workers, memory_bytes // SORT_MEMORY_PER_PROCESS - 1)),
    )


def _available_memory(files: dict[str, str]) -> int | None:
    """MemAvailable of a Linux server, or its container's limit if that is lower."""
    fields = dict(line.split(":", 1) for line in files["/proc/meminfo"].splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    available, limit = int(fields["MemAvailable"].split()[0]) * 1024, files["/sys/fs/cgroup/memory.max"].strip()
    return min(available, int(limit)) if limit.isdigit() else available


def _free_bytes(folder: str | None) -> int | None:
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except OSError:
        return None  # the socket is of a container's server
