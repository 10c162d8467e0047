"""The three charts in the metadata: recall against latency, coverage by range, a map of the songs. PNG in Markdown.

When to add here: a chart that people make decisions by. Keep out: its data (the core), and its name (`reports`).
"""

import base64
import importlib
import io
import math
import threading
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import dagster as dg
import msgspec
import numpy as np
import polars as pl

from songvec_assets.progress import Progress
from songvec_assets.search.preview import SongMap
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.index.recall import RecallReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE_LETTERS = 20
_LABELS_APART = 0.12
_SEPARATE_BARS = 100
_BLUE, _RED, _GRID = "#1f3a5f", "#d1495b", "#e6e6e6"
_STATES = {"loaded": _BLUE, "cached, not loaded": "#7fa7d1", "rejected": "#c9c9c9", "missing": _RED}
_CLUSTERS = ("#1f3a5f", "#d1495b", "#2a9d8f", "#e9a03b", "#7b5ea7", "#6a994e", "#3f88c5", "#8d6e63")


def show_chart(png: bytes, text: str) -> dg.MarkdownMetadataValue:
    """A PNG as metadata: the image itself, not a link to one."""
    return dg.MetadataValue.md(f"![{text}](data:image/png;base64,{base64.b64encode(png).decode()})")


def importing_ahead(emit: Callable[[Any], None]) -> Callable[[Any], None]:
    """Pass on what a step emits, and load what draws its chart as soon as there is work: the server works meanwhile."""
    # 0.5 s to import
    thread = threading.Thread(target=importlib.import_module, args=("matplotlib.figure",), daemon=True)

    def receive(item: Any) -> None:
        if isinstance(item, Progress) and item.total and thread.ident is None:
            thread.start()
        emit(item)

    return receive


def digest_data(data: object) -> str:
    """A digest of what a chart shows."""
    return blake2b(msgspec.json.encode(data), digest_size=8).hexdigest()


def draw_if_changed(
    context: dg.AssetExecutionContext, names: Sequence[str], digest: str, draw: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Charts of an asset: those of its previous materialization if their data is the same.

    A chart that fails is a warning: the step itself succeeded.

    Args:
        names: of the metadata that `draw` returns.
        digest: of the data shown.
    """
    key = f"{names[0]}, digest of its data"
    event = context.instance.get_latest_materialization_event(context.asset_key)
    previous = event.asset_materialization.metadata if event and event.asset_materialization else {}
    if key in previous and previous[key].value == digest:
        return {name: previous[name] for name in (*names, key) if name in previous}
    try:
        return draw() | {key: digest}
    except Exception as error:  # noqa: BLE001 - of a database, of a title that no font can draw
        context.log.warning(f"Could not render a chart; the step itself succeeded: {error!r}")
        return {}


def draw_recall(report: RecallReport) -> bytes:
    """Recall against milliseconds, a point for each number of probes, as PNG."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = _begin(
        f"Recall of {report.chosen.n_queries:,} searches among {report.n_rows:,} rows; labels are probes",
        "median time of a search, ms (log scale)",
        "recall@10",
    )
    chosen = report.chosen
    # powers of two, and the chosen point: times of adjacent points differ by chance, and the line would turn back
    points = [each for each in report.points if each.probes.bit_count() == 1 or each in (chosen, report.points[-1])]
    times = [each.ms_median for each in points]
    axes.plot(times, [each.recall for each in points], "o-", color=_BLUE, linewidth=1.5, markersize=4)
    axes.axhline(report.target, color=_RED, linewidth=1, label=f"target {report.target:.0%}")
    axes.plot(
        chosen.ms_median, chosen.recall, "o", markersize=12, markerfacecolor="none", markeredgecolor=_RED,
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
            textcoords="offset points", ha="center", va="center", fontsize=8, color=_BLUE,
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
    """Songs by range of song_ids, stacked by their state, as PNG; see `Inventory.coverage`. At least one row."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ranges, counts = [SongIdRange.from_key(key) for key in coverage["key"]], coverage.drop("key").to_numpy().T
    n_songs, n_missing = counts.sum(), coverage["missing"].sum()
    width = min(each.stop - each.start for each in ranges)
    figure, axes = _begin(f"{n_songs:,} songs by range: {n_missing:,} missing", "first song_id of the range", "songs")
    starts = np.array([each.start for each in ranges])
    bottoms = counts.cumsum(axis=0) - counts
    edge = 0.5 if len(ranges) <= _SEPARATE_BARS else 0
    for (name, color), heights, bottom in zip(_STATES.items(), counts, bottoms, strict=True):
        label = f"{name}: {heights.sum():,}"
        axes.bar(
            starts, heights, width, bottom, align="edge", color=color, label=label, edgecolor="white", linewidth=edge
        )
    axes.set_xlim(starts[0], starts[-1] + width)
    axes.set_ylim(0, 1.25 * max(counts.sum(axis=0).max(), 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(fontsize=8, loc="upper center", ncols=len(_STATES))
    return _finish(figure)


def draw_map(song_map: SongMap) -> bytes:
    """A sample of the songs on its two main axes, colored by cluster; a cluster is named by a song near its centre."""
    figure, axes = _begin(
        f"{len(song_map.points):,} of {song_map.n_rows:,} songs; colors are clusters, named by a song in the middle",
        f"first principal axis (both show {song_map.share:.0%} of the variance)",
        "second principal axis",
    )
    for cluster, titles in enumerate(song_map.titles):
        points = song_map.points[song_map.clusters == cluster]
        color = _CLUSTERS[cluster % len(_CLUSTERS)]
        axes.scatter(points[:, 0], points[:, 1], s=14, color=color, alpha=0.6, linewidths=0, label=_choose(titles))
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
    # 0.5 s to import: only for the steps that draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.6)
    return figure, axes


def _finish(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
