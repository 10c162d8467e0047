"""How many lists: builds and searches with √n, half as many, and rows/1000, as pgvector's page advises.

    python -m benchmarks.lists                     50,000 rows of 2,000 values, three rounds: 5 minutes
    python -m benchmarks.lists --rows 300000       another size; --rounds says how often each is built

Rows are made up, see `lifelike`. Each index is built as `songvec index` builds it, while the one before serves; numbers
of lists alternate within a round. Probes are the fewest that reach 95 % of 200 queries without a time limit.
Milliseconds are those of `SELECT … FROM songvec.search(…)` for ten songs, by one caller, and pages are those that it
reads. Medians over the rounds; ratios are taken within a round. Exit code 1 if searches are slower with √n.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.embedding_client import print_table
from benchmarks.lifelike import make_rows
from benchmarks.search import DIMENSIONS, TARGET, World, build_world, choose_knobs
from songvec_assets.vectors.index.build_plan import IndexSettings
from songvec_assets.vectors.index.recall import RecallReport, write_recall
from songvec_assets.vectors.index.recall_searches import RecallSearches
from songvec_assets.vectors.index.sizing import choose_lists
from songvec_assets.vectors.index.upkeep import bring_index_up_to_date
from songvec_assets_tests.administration import dispose

_EXPLAINED = 50


@dataclass(frozen=True)
class Measure:
    """One index.

    Attributes:
        build_s: of its build.
        ms: median of a search.
        pages: that a search reads, on average.
    """

    build_s: float
    report: RecallReport
    ms: float
    pages: float


def measure(world: World, lists: int) -> Measure:
    """Build an index with so many lists, choose its probes, and search."""
    wanted = IndexSettings(lists=lists, target_recall=TARGET)
    built = bring_index_up_to_date(world.table, world.cache, world.spec, wanted)
    searches = RecallSearches.over(world.table, world.cache)
    report = choose_knobs(searches)
    with world.database.get_connection() as connection:
        write_recall(connection, world.table, report)
    literals = [json.dumps(query.tolist()) for query in searches.exact.queries]
    ms = 1000 * median(world.search(literals, 1))
    return Measure(built.seconds, report, ms, world.count_pages(literals[:_EXPLAINED]))


def compare(measures: dict[int, list[Measure]]) -> tuple[list[list[str]], bool]:
    """A row for each number of lists, and whether no search is faster than those with the first."""
    first, rows = next(iter(measures.values())), []
    ratios = {
        lists: median(each.ms / other.ms for each, other in zip(runs, first, strict=True))
        for lists, runs in measures.items()
    }
    for lists, runs in measures.items():
        faster = median(other.build_s / each.build_s for each, other in zip(runs, first, strict=True))
        probes, times = sorted(each.report.probes for each in runs), sorted(each.ms for each in runs)
        rows.append(
            [
                f"{lists:,}",
                f"{median(each.build_s for each in runs):.1f}",
                f"{faster:.2f}",
                f"{probes[0]}–{probes[-1]}",
                f"{median(each.report.recall for each in runs):.3f}",
                f"{median(times):.1f} ({times[0]:.1f}–{times[-1]:.1f})",
                f"{ratios[lists]:.2f}",
                f"{median(each.pages for each in runs):,.0f}",
            ]
        )
    return rows, min(ratios.values()) == 1


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    root = choose_lists(given.rows)
    measures: dict[int, list[Measure]] = {lists: [] for lists in (root, root // 2, max(1, given.rows // 1000))}
    with tempfile.TemporaryDirectory(prefix="lists-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # the embedded server may run as another user
        world = build_world(folder, given.rows, DIMENSIONS, make_rows(given.rows, DIMENSIONS))
        try:
            for number in range(1, given.rounds + 1):
                for lists, runs in measures.items():
                    runs.append(measure(world, lists))
                    print(f"round {number}, {lists:,} lists: {runs[-1].build_s:.1f} s", file=sys.stderr, flush=True)
        finally:
            dispose(world.database.url)
    rows, is_root_fastest = compare(measures)
    columns = "lists | build s | builds faster | probes | recall@10 | search ms | of √n's | pages"
    print_table(columns, rows, given.markdown)
    return 0 if is_root_fastest else 1


if __name__ == "__main__":
    sys.exit(main())
