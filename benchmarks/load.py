"""Rows per second into the table: this package's load, its peers, and the server's own COPY of a ready file.

    python -m benchmarks.load                     rounds of all clients, then a million rows and what changes of them
    python -m benchmarks.load --parts rounds      only the rounds; `long` for only the million rows
    python -m benchmarks.load --vector-type halfvec --parts rounds    this package and the limit, on halfvec

In every round a client gets a fresh table and its own process, after a CHECKPOINT; slow ones get fewer of the same
rows, and are assumed to continue at that rate. Rates count from the call to the last commit, and ratios are taken
within a round. This package's call is the whole path of a first load: it compares, reads mapped files, checks every
row, and keeps its ledger; its VACUUM (ANALYZE) follows the last commit and has a separate column. Memory is the
client's RssAnon: mapped files are the kernel's. `loaders` has the clients.

The long part loads a million rows with the package's defaults, then changes 1 % of the songs, scattered over all
ranges, and loads again, ten times, and then all songs of one range, ten times: each time after a CHECKPOINT, when
changes cost most WAL, and with a VACUUM after it in place of autovacuum. It needs 30 GB of disk. Exit code 1
if a goal is missed.
"""

import argparse
import getpass
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.embedding_client import print_table
from benchmarks.load_parts import Bench, Figure, Result, Size, run_long, run_rounds
from benchmarks.load_process import Outcome
from benchmarks.loaders import CLIENTS, CORE, ORM, PSYCOPG3, SERVER, SERVER_TWO, SOCKET, SOCKET_TWO, THIS, THIS_TWO
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets_tests.administration import dispose, execute, with_parts

PARTS = ("rounds", "long")
SERVER_SETTINGS = {"max_wal_size": "8GB", "min_wal_size": "2GB"}
"""Added to the embedded server's own: no checkpoint, and no making of WAL files, falls into one client's time."""
_SHOWN = (
    "server_version shared_buffers max_wal_size fsync synchronous_commit wal_level full_page_writes data_checksums "
    "autovacuum"
).split()
_KNOW_HALFVEC = [SERVER, SOCKET, THIS, THIS_TWO, SERVER_TWO, SOCKET_TWO]
_RATIOS = [
    (THIS, (SERVER,), 0.9),
    (SOCKET, (SERVER,), 0.9),
    (THIS, (SOCKET,), 0.9),
    (THIS, (PSYCOPG3,), 1.4),
    (THIS, (ORM, CORE), 50),
    (THIS_TWO, (THIS,), 1.25),
]


def run(
    size: Size,
    parts: Sequence[str] = PARTS,
    clients: Sequence[str] = tuple(CLIENTS),
    vector_type: str = "vector",
    folder: Path | None = None,
) -> Result:
    """Measure on a new embedded server, which is removed afterwards.

    Args:
        size: how much is loaded.
        parts: of PARTS.
        clients: of CLIENTS, for the rounds.
        vector_type: the column's type.
        folder: for the server and the cache meanwhile; None: the folder of temporary files.
    """
    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    made = tempfile.TemporaryDirectory(prefix=f"load-{getpass.getuser()}-", dir=folder, ignore_cleanup_errors=True)
    with made as name:
        # the embedded server may run as another user, and reads files here
        Path(name).chmod(0o755)
        url = start_embedded_server(Path(name) / "pg").url
        for setting, value in SERVER_SETTINGS.items():
            execute(url, f"ALTER SYSTEM SET {setting} = '{value}'")
        execute(url, "SELECT pg_reload_conf()")
        execute(url, "CREATE DATABASE bench")
        bench = Bench(with_parts(url, database="bench"), Path(name), size, vector_type)
        result = Result(settings=", ".join(f"{each} {bench.ask(f'SHOW {each}')}" for each in _SHOWN))
        try:
            if "rounds" in parts:
                run_rounds(bench, clients, result)
                result.figures += compare_rounds(result)
            if "long" in parts:
                run_long(bench, result)
        finally:
            dispose(bench.url)
    return result


def compare_rounds(result: Result) -> list[Figure]:
    """How many times as fast, within each round: medians and spread. Of several peers, the fastest."""
    rates = {name: _rates(outcomes) for name, outcomes in result.outcomes.items()}
    figures = []
    for ours, theirs, bound in _RATIOS:
        there = [name for name in theirs if name in rates]
        if ours in rates and there:
            fastest = [max(each) for each in zip(*(rates[name] for name in there), strict=True)]
            ratios = [our / their for our, their in zip(rates[ours], fastest, strict=True)]
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
            figures.append(Figure(f"{ours} / {' or '.join(there)}", median(ratios), bound, spread=spread))
    for name, searches in result.searches.items():
        if name == THIS:
            share = 100 * max(each.n_dirtied for each in searches) / result.outcomes[THIS][0].n_rows
            figures.append(Figure("pages written to by the first search / rows", share, 1, False, " %"))
    return figures


def _rates(outcomes: list[Outcome]) -> list[float]:
    return [each.n_rows / each.seconds for each in outcomes]


def print_result(result: Result, markdown: bool) -> None:
    """All tables."""
    print(result.settings, end="\n\n")
    limit = median(_rates(result.outcomes[SERVER])) if SERVER in result.outcomes else None
    rows = []
    for name, outcomes in result.outcomes.items():
        rates = _rates(outcomes)
        rows.append(
            [
                name,
                result.storages[name],
                f"{outcomes[0].n_rows:,}",
                f"{median(rates):,.0f}",
                f"{min(rates):,.0f}–{max(rates):,.0f}",
                f"{median(rates) / limit:.2f}" if limit else "",
                f"{median(each.cpu_s / each.n_rows for each in outcomes) * 1e6:,.1f}",
                f"{max(each.peak_anon_mb for each in outcomes):,.0f}",
                f"{median(each.upkeep_s for each in outcomes):.1f}" if CLIENTS[name].makes_table else "",
            ]
        )
    columns = "client | storage | rows | rows/s | min–max | of the limit | client CPU µs/row | RssAnon MB | VACUUM s"
    print_table(columns, rows, markdown)
    rows = [
        [
            "VACUUM (ANALYZE)" if name == THIS else "nothing",
            f"{median(each.first_ms for each in searches):,.0f}",
            f"{median(each.next_ms for each in searches):,.0f}",
            f"{median(each.n_dirtied for each in searches):,.0f}",
        ]
        for name, searches in result.searches.items()
    ]
    print_table("between load and search | first search ms | next ms | pages the first wrote to", rows, markdown)
    print_table("long load | figure", [list(fact) for fact in result.facts], markdown)
    for name, changes in (("1 % changed", result.changes), ("a range reloaded", result.reloads)):
        rows = [
            [
                f"{number}",
                f"{each.n_written:,}",
                f"{each.cache_bytes / 1e6:,.0f}",
                f"{each.wal_bytes / 1e6:,.0f}",
                f"{each.seconds:.1f}",
                f"{each.n_pages:,}",
                f"{each.n_dead_kept:,}",
            ]
            for number, each in enumerate(changes, 1)
        ]
        columns = f"{name}, no. | rows written | cache MB | WAL MB | s | pages after VACUUM | dead rows"
        print_table(columns, rows, markdown)
    print_table("figure | value | min–max | to reach | reached", [each.row() for each in result.figures], markdown)


def main() -> None:
    """Measure what the command line asks for, print it, and say whether all holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=Size.n_rounds)
    parser.add_argument("--ranges", type=int, default=Size.n_ranges_long, help="of 50,000 rows, in the long part")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=None, metavar="CLIENT")
    parser.add_argument("--vector-type", choices=("vector", "halfvec"), default="vector")
    parser.add_argument("--folder", type=Path, help="folder with 30 GB free; default: that of temporary files")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    clients = asked.clients or (list(CLIENTS) if asked.vector_type == "vector" else _KNOW_HALFVEC)
    size = Size(n_rounds=asked.rounds, n_ranges_long=asked.ranges)
    result = run(size, asked.parts, clients, asked.vector_type, asked.folder)
    print_result(result, asked.markdown)
    sys.exit(not all(figure.holds for figure in result.figures))


if __name__ == "__main__":
    main()
