"""Pictures of reports, as PNG in the Markdown that Dagster's UI shows. No decisions."""

import base64
import io

import dagster as dg

from songvec_assets.vectors.recall import RecallReport

_INK, _MARK, _LINE = "#1f3a5f", "#d1495b", "#8a8a8a"


def show_picture(png: bytes, words: str) -> dg.MarkdownMetadataValue:
    """A PNG as metadata: the picture itself, not a link to one.

    Args:
        png: the file's bytes.
        words: for who cannot see it.
    """
    return dg.MetadataValue.md(f"![{words}](data:image/png;base64,{base64.b64encode(png).decode()})")


def draw_recall(report: RecallReport) -> bytes:
    """Recall against milliseconds, a point for each number of probes, as PNG."""
    # 0.5 s to import, for the one step that draws
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
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
    axes.set_title(
        f"Recall of {report.n_queries:,} searches among {report.n_rows:,} rows; labels are probes", fontsize=10
    )
    axes.set_xlabel("median time of a search, ms (log scale)")
    axes.set_ylabel("recall@10")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower right")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
