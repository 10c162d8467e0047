"""Pictures of reports, as PNG in the Markdown that Dagster's UI shows. No decisions."""

import base64
import io
import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np

from songvec_assets.status import RangeCoverage
from songvec_assets.vectors.preview import SongMap
from songvec_assets.vectors.recall import RecallReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MARK, _LINE, _GRID = "#1f3a5f", "#d1495b", "#8a8a8a", "#e6e6e6"
_STATES = {"loaded": _INK, "cached, not loaded": "#7fa7d1", "set aside": "#c9c9c9", "missing": _MARK}
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
    times = [point.ms_median for point in report.points]
    kinds = {
        "rows of the table": [point.recall_of_rows for point in report.points],
        "made-up queries": [point.recall_of_synthetic for point in report.points],
    }
    for (name, recalls), style in zip(kinds.items(), ("--", ":"), strict=True):
        axes.plot(times, recalls, style, color=_LINE, linewidth=1, label=name)
    lower = [point.recall for point in report.points]
    axes.plot(times, lower, "o-", color=_INK, linewidth=1.5, markersize=4, label="the lower of both")
    axes.axhline(report.target, color=_MARK, linewidth=1, label=f"target {report.target:.0%}")
    chosen = report.chosen
    axes.plot(
        chosen.ms_median, chosen.recall, "o", markersize=12, markerfacecolor="none", markeredgecolor=_MARK,
        markeredgewidth=2, linestyle="none", label=f"chosen: {chosen.probes:,} probes, {chosen.recall:.1%}",
    )  # fmt: skip
    for place, point in enumerate(report.points):
        # halved gaps lie close together: every other label goes below
        side = -1 if place % 2 else 1
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


def draw_coverage(ranges: Sequence[RangeCoverage]) -> bytes:
    """Songs by range of song_ids, stacked by what became of them, as PNG. At least one range."""
    n_songs = sum(each.n_songs for each in ranges)
    n_missing = sum(each.n_missing for each in ranges)
    width = min(each.range.stop - each.range.start for each in ranges)
    figure, axes = _begin(
        f"{n_songs:,} songs in {len(ranges):,} ranges: {n_missing:,} missing", "first song_id of the range", "songs"
    )
    starts = np.array([each.range.start for each in ranges])
    counts = (
        [each.n_loaded for each in ranges],
        [each.n_waiting for each in ranges],
        [each.n_set_aside for each in ranges],
        [each.n_missing for each in ranges],
    )
    below = np.zeros(len(ranges))
    for (name, colour), heights in zip(_STATES.items(), counts, strict=True):
        axes.bar(starts, heights, width, below, align="edge", color=colour, label=f"{name}: {sum(heights):,}")
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
    """A sample of the catalogue on its two main axes, coloured by cluster, with a title in the middle of each."""
    figure, axes = _begin(
        f"{len(song_map.points):,} of {song_map.n_rows:,} songs: near is alike in meaning. Colours are clusters",
        f"first principal axis (both show {song_map.share:.0%} of the variance)",
        "second principal axis",
    )
    for cluster in sorted(set(song_map.clusters.tolist())):
        points = song_map.points[song_map.clusters == cluster]
        axes.scatter(
            points[:, 0], points[:, 1], s=14, color=_CLUSTERS[cluster % len(_CLUSTERS)], alpha=0.55, linewidths=0
        )
    for place, title in song_map.titles.items():
        short = title if len(title) <= 28 else f"{title[:27]}…"
        axes.annotate(
            # a dollar sign would begin a formula
            short.replace("$", r"\$"), song_map.points[place], fontsize=8, color=_INK, ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": _LINE, "linewidth": 0.5},
        )  # fmt: skip
    return _finish(figure)


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
    with warnings.catch_warnings():
        # titles in scripts that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(png, format="png")
    return png.getvalue()
