"""What 12 and 100 million songs take, worked out from what was measured at smaller sizes: the tables of docs/scale.md.

    python -m benchmarks.scale            print them
    python -m benchmarks.scale --write    put them into the page

An input stands once, in `INPUTS`, with the size it was measured at and the command that measures it anew. A figure is a
formula over inputs, n (songs), L (lists) and b (bytes a value of the column's type); the formula printed beside it is
the one that computes it. Sizes are bytes, G is 10⁹; times are hours.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from songvec_assets.vectors.sizes import build_bytes, choose_lists, choose_probes, estimate_build, index_bytes

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
DIMENSIONS = 2_000
CORES = 2
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Input:
    """Something measured or given.

    Attributes:
        symbol: in formulas.
        meaning: in words.
        value, unit: the figure.
        size: at which it was measured.
        command: measures it anew.
    """

    symbol: str
    meaning: str
    value: float
    unit: str
    size: str
    command: str


INPUTS = {
    each.symbol: each
    for each in (
        Input("tokens", "tokens a song", 400, "", "assumed: 1,600 characters", "`songvec estimate` tells yours"),
        Input("price", "dollars a million tokens", 0.10, "", "given", "`SONGVEC_USD_PER_MILLION_TOKENS`"),
        Input("quota", "tokens a minute", 900_000, "", "given", "`SONGVEC_TOKENS_PER_MINUTE`"),
        Input("used", "share of the quota used", 0.984, "", "180 s", "`make bench-quota`"),
        Input("fill", "songs into the cache, without latency and quota", 10_770, "/s", "50,000", "`make bench-client`"),
        Input("shard", "cache, a song", 8_037, "B", "20,480", "`make bench-client`"),
        Input("snapshot", "Parquet snapshot, a song", 188, "B", "1,000,000 generated", "`make bench-export`"),
        Input("export", "songs exported", 100_000, "/s", "1,000,000", "`make bench-export`"),
        Input("load", "rows loaded, no index", 20_000, "/s", "1,000,000", "`make bench-load`"),
        Input("update", "rows changed, in place under the index", 2_000, "/s", "80,000", "`make bench-serving`"),
        Input("exact", "rows held against 200 queries", 50_000, "/s", "80,000", "`make bench-index`"),
        Input("compare", "cache and ledger compared, a song", 1e-6, "s", "1,000,000", "`make bench-load`"),
        Input("wal", "WAL of a load, a row", 8_100, "B", "80,000", "`make bench-load`"),
        Input("index_wal", "WAL of an index, a byte of it", 1.0, "B", "80,000", "`make bench-index`"),
    )
}


@dataclass(frozen=True)
class Case:
    """A catalogue of n songs."""

    n: int
    vector_type: str = "vector"

    @property
    def value_bytes(self) -> int:
        """b."""
        return 2 if self.vector_type == "halfvec" else 4

    @property
    def lists(self) -> int:
        """L."""
        return choose_lists(self.n)

    def __str__(self) -> str:
        return f"{self.n // 1_000_000} M {self.vector_type}"


CASES = [Case(n, vector_type) for n in (12_000_000, 100_000_000) for vector_type in ("vector", "halfvec")]


@dataclass(frozen=True)
class Figure:
    """A quantity: its name, its formula in words, and the formula."""

    name: str
    formula: str
    compute: Callable[[Case], float]
    unit: str


def of(symbol: str) -> float:
    """An input's value."""
    return INPUTS[symbol].value


def _rows_a_page(case: Case) -> int:
    return 8_168 // (case.value_bytes * DIMENSIONS + 8 + 44)


def _table_bytes(case: Case) -> float:
    return 8_192 * math.ceil(case.n / _rows_a_page(case))


def _index_bytes(case: Case) -> float:
    return index_bytes(case.n, case.lists, DIMENSIONS, case.vector_type)


def _build(case: Case) -> dict[str, float]:
    estimate = estimate_build(
        case.n, case.lists, DIMENSIONS, case.vector_type, workers=CORES - 1, cores=CORES, concurrently=False
    )
    return {"temporary": estimate.temporary_bytes} | estimate.seconds
