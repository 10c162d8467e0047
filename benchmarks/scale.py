"""What 12 and 100 million songs take, computed from measurements at smaller sizes: the tables of docs/scale.md.

    python -m benchmarks.scale            print the page with its tables computed again
    python -m benchmarks.scale --write    put them into the page

An input stands once, with the size at which it was measured and the command that measures it again. A figure is what
the formula printed next to it gives: the text is the code. Sizes are bytes, times seconds; GB are 10⁹ bytes.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from songvec_assets.vectors.index.catalog import choose_probes
from songvec_assets.vectors.index.sizing import choose_lists

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
DIMENSIONS = 2_000
_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Input:
    """Something measured, given or assumed.

    Attributes:
        symbol: in formulas.
        meaning: in words.
        value: the figure.
        size: at which it was measured.
        command: measures or sets it.
    """

    symbol: str
    meaning: str
    value: float
    size: str
    command: str


_CLIENT, _LOAD, _INDEX = "`make bench-client`", "`make bench-load`", "`make bench-index`"
INPUTS = (
    Input("tokens", "tokens per song", 400, "assumed: 1,600 characters", "`songvec estimate` shows yours"),
    Input("price", "dollars per million tokens", 0.10, "given", "`SONGVEC_USD_PER_MILLION_TOKENS`"),
    Input("quota", "tokens per minute", 900_000, "given", "`SONGVEC_TOKENS_PER_MINUTE`"),
    Input("cores", "of the server, for index builds", 2, "given", ""),
    Input("used", "share of the quota that is used", 0.984, "three minutes", "`make bench-quota`"),
    Input("fill", "songs per second into the cache, without quota and latency", 10_770, "50,000 songs", _CLIENT),
    Input("cached", "bytes per song in the cache", 8_033, "20,000 songs", _CLIENT),
    Input("parquet", "bytes per song in the snapshots", 212, "1,000,000 songs of 1.2 KB, zstd", ""),
    Input(
        "export",
        "songs per second from Postgres to snapshots",
        347_000,
        "1,000,000 songs of 1.3 KB",
        "`make bench-export`",
    ),
    Input("load", "rows per second into a table without an index", 31_900, "1,000,000 rows, two connections", _LOAD),
    Input("change", "changed rows per second, without an index", 4_500, "10,000 of 1,000,000 rows", _LOAD),
    Input("compare", "songs per second compared, nothing changed", 1_250_000, "100,000 rows", _LOAD),
    Input("wal", "bytes of WAL per row loaded and vacuumed", 16_500, "1,000,000 rows", _LOAD),
    Input("kmeans", "CPU seconds of k-means per squared list", 72e-6, "100,000 rows, 100 to 632 lists", _INDEX),
    Input("row", "CPU seconds of assigning per row", 25e-6, "100,000 rows, 100 to 632 lists", _INDEX),
    Input("assign", "CPU seconds of assigning per row and list", 0.39e-6, "100,000 rows, 100 to 632 lists", _INDEX),
    Input("write", "seconds of writing an index, per GB", 5.6, "100,000 rows", _INDEX),
    Input("validate", "seconds of validating, per GB of index or table", 1.9, "100,000 rows", _INDEX),
)


@dataclass(frozen=True)
class Case:
    """A catalogue: number of songs, type of the column, number of lists; None: as the package chooses."""

    n: int
    vector_type: str = "vector"
    lists: int | None = None

    def __str__(self) -> str:
        return f"{self.n // 1_000_000} M, {self.vector_type}" + (f", L = {self.lists:,}" if self.lists else "")

    def names(self) -> dict[str, float]:
        """What formulas start from."""
        lists, value_bytes = self.lists or choose_lists(self.n), {"vector": 4, "halfvec": 2}[self.vector_type]
        probes = choose_probes(lists, self.n)
        return {"n": self.n, "L": lists, "p": probes, "d": DIMENSIONS, "b": value_bytes}


@dataclass(frozen=True)
class Figure:
    """A quantity.

    Attributes:
        name: in words.
        symbol: in later formulas; may be empty.
        formula: of names of the case, inputs and earlier figures: Python.
        show: the number as it is read.
    """

    name: str
    symbol: str
    formula: str
    show: Callable[[float], str]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _disk(value: float) -> str:
    return f"{value / 1e9:,.1f} GB" if value < 10e9 else f"{value / 1e9:,.0f} GB"


def _usd(value: float) -> str:
    return f"${value:,.0f}"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}" if seconds < 20 * length else f"{seconds / length:,.0f} {unit}"
    return f"{1e3 * seconds:,.0f} ms"


FIGURES = {
    "provider": (
        Figure("tokens", "T", "n * tokens", _count),
        Figure("price of a first run", "", "T / 1e6 * price", _usd),
        Figure("at the full quota", "", "T / (quota * used) * 60", _time),
        Figure("with no quota and no latency, one process", "", "n / fill", _time),
    ),
    "disk": (
        Figure("snapshots", "", "n * parquet", _disk),
        Figure("cache", "", "n * cached", _disk),
        Figure("rows per page of 8 KiB", "k", "(8192 - 24) // (b * d + 52)", _count),
        Figure("table", "table", "n / k * 8192", _disk),
        Figure("its primary key", "key", "n * 31.5", _disk),
        Figure("index", "index", "n / k * 8192", _disk),
        Figure("ledger of what is loaded", "ledger", "n * 12", _disk),
        Figure("serving", "serving", "table + key + index + ledger", _disk),
        Figure("temporary files of a build", "temporary", "n * (b * d + 48)", _disk),
        Figure("while a staging table is built", "", "2 * serving + temporary", _disk),
        Figure("WAL of a load and a build", "", "n * wal * b / 4 + index", _disk),
    ),
    "memory": (
        Figure("lists", "", "L", _count),
        Figure("rows that k-means samples", "S", "max(10000, 50 * L)", _count),
        Figure("bytes per vector", "v", "b * d + 8", _count),
        Figure(
            "memory of a build, on the server",
            "memory",
            "S * v + 2 * L * v + 4 * L * d + 4 * S * L + 4 * L ** 2 + 8 * S",
            _disk,
        ),
    ),
    "time": (
        Figure("export", "", "n / export", _time),
        Figure("load without an index", "", "n / load", _time),
        Figure("k-means", "clustering", "kmeans * L ** 2", _time),
        Figure("assigning rows to lists", "assigning", "(row + assign * L) * n / cores", _time),
        Figure(
            "writing the index, and validating it while writers go on",
            "writing",
            "(write + 2 * validate) * index / 1e9",
            _time,
        ),
        Figure("the whole build", "", "clustering + assigning + writing", _time),
        Figure("1 % of the rows changed", "", "0.01 * n / change", _time),
        Figure("nothing changed", "", "n / compare", _time),
    ),
    "search": (
        Figure("lists visited, until recall is measured", "", "p", _count),
        Figure("rows visited", "visited", "p * n / L", _count),
        Figure("bytes visited", "", "visited * v", _disk),
    ),
}
CASES = tuple(Case(n, vector_type) for n in (12_000_000, 100_000_000) for vector_type in ("vector", "halfvec"))
BY_LISTS = tuple(Case(100_000_000, "vector", lists) for lists in (2_000, 4_000, 10_000))


def work_out(case: Case) -> dict[str, float]:
    """All figures of a case by name, those with a symbol also by that, its own names and the inputs."""
    values = case.names() | {each.symbol: each.value for each in INPUTS}
    for figure in (figure for figures in FIGURES.values() for figure in figures):
        value = float(eval(figure.formula, {"max": max}, values))
        values |= {figure.name: value} | ({figure.symbol: value} if figure.symbol else {})
    return values


def render_inputs() -> str:
    """The table of inputs."""
    rows = ["| symbol | | figure | at | measured or set by |", "| --- | --- | ---: | --- | --- |"]
    rows += [f"| {each.symbol} | {each.meaning} | {each.value:,} | {each.size} | {each.command} |" for each in INPUTS]
    return "\n".join(rows)


def render(figures: Iterator[Figure] | tuple[Figure, ...], cases: tuple[Case, ...] = CASES) -> str:
    """Figures as a Markdown table, a column per case."""
    worked_out = [work_out(case) for case in cases]
    rows = [
        f"| | formula | {' | '.join(map(str, cases))} |",
        f"| --- | --- |{' ---: |' * len(cases)}",
    ]
    for figure in figures:
        values = " | ".join(figure.show(values[figure.name]) for values in worked_out)
        rows.append(f"| {figure.name} | {_name(figure)} | {values} |")
    return "\n".join(rows)


def _name(figure: Figure) -> str:
    formula = figure.formula
    for code, words in (("1e6", "10⁶"), (" ** 2", "²"), (" * ", " · "), ("//", "÷"), ("10000", "10,000")):
        formula = formula.replace(code, words)
    return f"{figure.symbol} = {formula}" if figure.symbol else formula


def render_tables() -> dict[str, str]:
    """All tables by the name that the page gives them."""
    tables = {name: render(figures) for name, figures in FIGURES.items()}
    changed = {"memory of a build, on the server", "k-means", "assigning rows to lists", "the whole build"}
    of_lists = tuple(
        figure
        for name in ("memory", "time", "search")
        for figure in FIGURES[name]
        if name == "search" or figure.name in changed
    )
    return tables | {"inputs": render_inputs(), "lists": render(of_lists, BY_LISTS)}


def update(page: str) -> str:
    """The page with its tables worked out again."""
    tables = render_tables()
    return _TABLE.sub(lambda found: f"<!-- table: {found[1]} -->\n{tables[found[1]]}\n<!-- end -->", page)


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    page = update(PAGE.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
