"""What the server has for an index build, and whether a build fits: refused or made smaller before it begins.

Sizes are bytes. What cannot be seen from here is not assumed: the build then says what it needs.
"""

import shutil
from dataclasses import dataclass

from sqlalchemy import text

from songvec_assets.errors import DatabaseError
from songvec_assets.postgres.engine import Database
from songvec_assets.vectors.sizes import SORT_MEMORY_A_PROCESS, BuildEstimate, build_bytes, format_bytes, most_lists

MOST_WORKERS = 8
"""More parallel processes than this wait for the disk."""

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
class Capacity:
    """What a build may take.

    Attributes:
        memory_bytes: of the server.
        memory_source: how that is known, in words.
        temporary_bytes: of files while it sorts; None: no limit.
        free_bytes: on the disk of the server's data; None where that is not seen from here.
        workers: parallel processes beside the one that builds.
        cores: of the server; None where that is not seen from here.
    """

    memory_bytes: int
    memory_source: str
    temporary_bytes: int | None
    free_bytes: int | None
    workers: int
    cores: int | None = None

    def fit_lists(self, lists: int, dimensions: int, vector_type: str) -> tuple[int, str]:
        """As many of these lists as fit into memory, and why no more do; no reason where all do.

        Raises:
            DatabaseError: not even one does.
        """
        fitting = most_lists(self.memory_bytes, dimensions, vector_type)
        needed = build_bytes(lists, dimensions, vector_type)
        if fitting >= lists:
            return lists, ""
        told = (
            f"{lists:,} lists need {format_bytes(needed)} of memory, {format_bytes(self.memory_bytes)} may be taken "
            f"({self.memory_source})"
        )
        if not fitting:
            raise DatabaseError(f"{told}: raise SONGVEC_INDEX_MEMORY_MB, or give the server more memory")
        return fitting, told

    def check_disk(self, estimate: BuildEstimate, table_bytes: int = 0) -> None:
        """Raise DatabaseError where the build would run into a limit of temporary files, or out of disk.

        Args:
            estimate: of the build.
            table_bytes: of rows that are to be loaded before it.
        """
        needed = estimate.temporary_bytes
        if self.temporary_bytes is not None and needed > self.temporary_bytes:
            raise DatabaseError(
                f"the build sorts in up to {format_bytes(needed)} of temporary files, temp_file_limit is "
                f"{format_bytes(self.temporary_bytes)}: let an administrator raise it, with ALTER ROLE … SET "
                f"temp_file_limit = '{needed // (1 << 20) + 1}MB'"
            )
        needed += estimate.index_bytes + table_bytes
        rows = f", after {format_bytes(table_bytes)} for the rows to come" if table_bytes else ""
        if self.free_bytes is not None and needed > self.free_bytes:
            raise DatabaseError(
                f"the build needs {format_bytes(estimate.index_bytes)} of disk for the index and up to "
                f"{format_bytes(estimate.temporary_bytes)} while it sorts{rows}, {format_bytes(self.free_bytes)} are "
                "free: make room, or halve it with SONGVEC_VECTOR_TYPE=halfvec"
            )


def read_capacity(database: Database, memory_bytes: int | None = None, searched: bool = False) -> Capacity:
    """Ask the server what it has.

    Args:
        database: of the table.
        memory_bytes: that may be taken, where a person said it; else half of what is available, where that shows.
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
    # without a look at the cores, half of what the administrator allows, or what a build takes anyway
    workers = max(limits.workers // 2, limits.own_workers)
    if cores:
        # the process that builds takes a core itself
        workers = min(cores - (2 if searched else 1), MOST_WORKERS)
    return Capacity(
        memory_bytes,
        source,
        limits.temporary_bytes if limits.temporary_bytes >= 0 else None,
        _free_bytes(folder),
        max(0, min(workers, limits.workers, memory_bytes // SORT_MEMORY_A_PROCESS - 1)),
        cores,
    )


def _available_memory(files: dict[str, str]) -> int | None:
    """MemAvailable of a Linux server, or its container's limit where that is lower."""
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
