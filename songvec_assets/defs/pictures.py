"""Pictures of reports, as PNG in the Markdown that Dagster's UI shows. No decisions."""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import polars as pl

from songvec_assets.search.preview import SongMap
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.index.recall import RecallReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE_LETTERS = 20
_LABELS_APART = 0.12
_SEPARATE_BARS = 100
_INK, _MARK, _LINE, _GRID = "#1f3a5f", "#d1495b", "#8a8a8a", "#e6e6e6"
_STATES = {"loaded": _INK, "cached, not loaded": "#7fa7d1", "rejected": "#c9c9c9", "missing": _MARK}
_CLUSTERS = ("#1f3a5f", "#d1495b", "#2a9d8f", "#e9a03b", "#7b5ea7", "#6a994e", "#3f88c5", "#8d6e63")


def show_picture(png: bytes, words: str) -> dg.MarkdownMetadataValue:
    """A PNG as metadata: the picture itself, not a link to one.

    Args:
        png: the file's bytes.
        words: for who cannot see it.
    """
    return dg.MetadataValue.md(f"![{words}](data:image/png;base64,{base64.b64encode(png).decode()})")


def draw_recall(report: RecallReport) -> bytes:
    """Recall against milliseconds, a point for each number of probes, as PNG."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = _begin(
        f"Recall of {report.n_queries:,} searches among {report.n_rows:,} rows; labels are probes",
        "median time of a search, ms (log scale)",
        "recall@10",
    )
    chosen = report.chosen
    # between the doublings only what was chosen: times of neighbours differ by chance, and the line would go back
    points = [
        each for each in report.points if each.probes & (each.probes - 1) == 0 or each in (chosen, report.points[-1])
    ]
    times = [point.ms_median for point in points]
    kinds = {
        "rows of the table": [point.recall_of_rows for point in points],
        "made-up queries": [point.recall_of_synthetic for point in points],
    }
    for (name, recalls), style in zip(kinds.items(), ("--", ":"), strict=True):
        axes.plot(times, recalls, style, color=_LINE, linewidth=1, label=name)
    lower = [point.recall for point in points]
    axes.plot(times, lower, "o-", color=_INK, linewidth=1.5, markersize=4, label="the lower of both")
    axes.axhline(report.target, color=_MARK, linewidth=1, label=f"target {report.target:.0%}")
    axes.plot(
        chosen.ms_median, chosen.recall, "o", markersize=12, markerfacecolor="none", markeredgecolor=_MARK,
        markeredgewidth=2, linestyle="none", label=f"chosen: {chosen.probes:,} probes, {chosen.recall:.1%}",
    )  # fmt: skip
    labelled = [chosen]
    for point in points:
        if all(abs(math.log(point.ms_median / each.ms_median)) > _LABELS_APART for each in labelled):
            labelled.append(point)
    for point in labelled:
        side = -1 if point is chosen else 1
        axes.annotate(
            f"{point.probes:,}", (point.ms_median, point.recall), xytext=(side * -4, side * 9),
            textcoords="offset points", ha="center", va="center", fontsize=8, color=_INK,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.margins(x=0.08, y=0.12)
    axes.legend(fontsize=8, loc="lower right")
    return _finish(figure)


def draw_coverage(coverage: pl.DataFrame) -> bytes:
    """Songs by range, stacked by what became of them, as PNG; see `Inventory.coverage`. At least one row."""
    ranges, counts = [SongIdRange.from_key(key) for key in coverage["key"]], coverage.drop("key")
    n_songs, n_missing = sum(counts.sum().row(0)), counts["missing"].sum()
    width = min(each.stop - each.start for each in ranges)
    figure, axes = _begin(f"{n_songs:,} songs by range: {n_missing:,} missing", "first song_id of the range", "songs")
    starts = np.array([each.start for each in ranges])
    below = np.zeros(len(ranges))
    edge = 0.5 if len(ranges) <= _SEPARATE_BARS else 0
    for (name, colour), heights in zip(_STATES.items(), counts.to_numpy().T, strict=True):
        label = f"{name}: {sum(heights):,}"
        axes.bar(
            starts, heights, width, below, align="edge", color=colour, label=label, edgecolor="white", linewidth=edge
        )
        below += heights
    axes.set_xlim(starts[0], starts[-1] + width)
    axes.set_ylim(0, 1.25 * max(below.max(), 1))
    _count_thousands(axes.xaxis, axes.yaxis)
    axes.legend(fontsize=8, loc="upper center", ncols=len(_STATES))
    return _finish(figure)


def draw_tokens(counts: Sequence[int], edges: Sequence[float]) -> bytes:
    """How many songs have how many tokens, as PNG.

    Args:
        counts: songs between one edge and the next.
        edges: tokens; one more than counts, ascending.
    """
    total = sum(counts)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    mean = sum(count * middle for count, middle in zip(counts, middles, strict=True)) / max(1, total)
    figure, axes = _begin(f"Tokens a song, of {total:,} songs: about {mean:,.0f} on average", "tokens", "songs")
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_INK, edgecolor="white", linewidth=0.5)
    axes.axvline(mean, color=_MARK, linewidth=1, label=f"mean: {mean:,.0f}")
    last = max((place for place, count in enumerate(counts) if count), default=0)
    axes.set_xlim(0, edges[last + 1])
    _count_thousands(axes.xaxis, axes.yaxis)
    axes.legend(fontsize=8)
    return _finish(figure)


def draw_map(song_map: SongMap) -> bytes:
    """A sample of the catalogue on its two main axes, coloured by cluster, each named by a song in its middle."""
    figure, axes = _begin(
        f"{len(song_map.points):,} of {song_map.n_rows:,} songs; colours are clusters, named by a song in the middle",
        f"first principal axis (both show {song_map.share:.0%} of the variance)",
        "second principal axis",
    )
    for cluster, titles in enumerate(song_map.titles):
        points = song_map.points[song_map.clusters == cluster]
        colour = _CLUSTERS[cluster % len(_CLUSTERS)]
        axes.scatter(points[:, 0], points[:, 1], s=14, color=colour, alpha=0.6, linewidths=0, label=_choose(titles))
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False, markerscale=2, handletextpad=0.1)
    return _finish(figure)


def _choose(titles: list[str]) -> str:
    """The first title that the font can draw, shortened."""
    from matplotlib.font_manager import findfont, get_font

    drawn = get_font(findfont("DejaVu Sans")).get_charmap()
    title = next((each for each in titles if all(ord(letter) in drawn for letter in each)), "…")
    short = title if len(title) <= _TITLE_LETTERS else f"{title[: _TITLE_LETTERS - 1]}…"
    return short.replace("$", r"\$")  # which would begin a formula


def _begin(title: str, x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    # 0.5 s to import, for the steps that draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.6)
    return figure, axes


def _count_thousands(*each_axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in each_axis:
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _finish(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
