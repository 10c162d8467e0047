"""Core reports as Dagster metadata, and as the lines of a log. No decisions."""

import time
from collections.abc import Mapping
from typing import Any

import dagster as dg

from songvec_assets.cache.fill import FillReport
from songvec_assets.defs.pictures import draw_recall, show_picture
from songvec_assets.progress import Progress
from songvec_assets.songs.export import ExportReport
from songvec_assets.vectors.ivfflat import IndexReport
from songvec_assets.vectors.publish import PublishReport
from songvec_assets.vectors.table import TableSpec

Metadata = dict[str, Any]
_MAX_TABLE_ROWS = 50


class Pace:
    """Units a second of each step, since it began; a step that begins again with less done begins anew."""

    def __init__(self) -> None:
        self._starts: dict[str, tuple[float, int, int]] = {}

    def rate(self, progress: Progress) -> float:
        """The pace so far; 0 at the start."""
        now = time.monotonic()
        started, first, before = self._starts.get(progress.step, (now, progress.done, progress.done))
        if progress.done < before:
            started, first = now, progress.done
        self._starts[progress.step] = (started, first, progress.done)
        return (progress.done - first) / (now - started) if now > started else 0.0


def describe_progress(progress: Progress, rate: float) -> str:
    """One line: done, total, rate, time left.

    Args:
        progress: as the core told it.
        rate: units a second.
    """
    percent = progress.unit == "%"
    line = f"{progress.step}: {progress.done:,}" + ("%" if percent else "")
    if progress.total and not percent:
        line += f" of {progress.total:,} {progress.unit}"
    elif not percent:
        line += f" {progress.unit}"
    if rate and not percent:
        line += f", {rate:,.0f}/s"
    if rate and progress.total > progress.done:
        line += f", {describe_seconds((progress.total - progress.done) / rate)} left"
    return line + (f" ({progress.note})" if progress.note else "")


def describe_seconds(seconds: float) -> str:
    """`42 s`, `12 min`, `3.7 h`, `2.1 days`."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def describe_export(report: ExportReport) -> Metadata:
    """Totals of an export, a row a changed range, reasons of songs set aside."""
    written = [each for each in report.ranges if each.written]
    return {
        "dagster/row_count": report.total("n_songs"),
        "ranges": len(report.ranges),
        "ranges written": len(written),
        "songs new": report.total("n_new"),
        "songs changed": report.total("n_changed"),
        "songs gone": report.total("n_gone"),
        "songs set aside": sum(report.set_aside.values()),
        "songs out of reach": sum(report.unreachable.values()),
        **_table(
            "set aside",
            [
                {"reason": reason, "songs": count}
                for reason, count in (report.set_aside + report.unreachable).most_common(_MAX_TABLE_ROWS)
            ],
        ),
        **_table(
            "ranges changed",
            [
                {
                    "range": each.range.key,
                    "songs": each.n_songs,
                    "new": each.n_new,
                    "changed": each.n_changed,
                    "gone": each.n_gone,
                }
                for each in written[:_MAX_TABLE_ROWS]
            ],
        ),
    }


def describe_fill(report: FillReport, path: str, embedder: str) -> Metadata:
    """One range's fill, as numbers that the UI plots over ranges and time."""
    return {
        "dagster/partition_row_count": report.n_songs - report.n_set_aside,
        "songs": report.n_songs,
        "songs new": report.n_new,
        "songs changed": report.n_changed,
        "songs gone": report.n_gone,
        "songs unchanged": report.n_unchanged,
        "songs reused": report.n_reused,
        "songs embedded": report.n_embedded,
        "songs set aside": report.n_set_aside,
        "songs truncated": report.n_truncated,
        "bytes damaged": report.n_bytes_damaged,
        "retries": report.n_retries,
        "429s": report.n_limited,
        "tokens": report.n_tokens,
        "usd": report.usd,
        "seconds": round(report.seconds, 3),
        "songs per second": round(report.n_embedded / report.seconds, 1) if report.seconds else 0.0,
        "embedder": embedder,
        "file": dg.MetadataValue.path(path),
        **_table(
            "set aside by the provider",
            [{"song_id": song_id, "reason": reason} for song_id, reason in report.set_aside[:_MAX_TABLE_ROWS]],
        ),
    }


def describe_publish(report: PublishReport, spec: TableSpec, where: str) -> Metadata:
    """Totals of a load, what was swapped in, a row a range that was written."""
    loads, compared = report.loads, report.comparison
    swapped = {}
    if compared is not None:
        swapped = {
            "rows before": compared.n_serving,
            "neighbours shared with the table before": round(compared.overlap, 3),
        }
    written = [load for load in loads if load.n_written or load.n_deleted]
    seconds = sum(load.seconds for load in written)
    n_written = sum(load.n_written for load in written)
    return {
        "dagster/row_count": sum(load.n_rows for load in loads),
        "model": spec.model,
        "column": spec.column_type,
        "database": where,
        "reason": report.place.reason,
        "swapped": compared is not None,
        "rows of somebody else": report.n_foreign,
        **swapped,
        "ranges": len(loads),
        "ranges written": len(written),
        "rows written": n_written,
        "rows deleted": sum(load.n_deleted for load in written),
        "seconds": round(seconds, 3),
        "rows per second": round(n_written / seconds, 1) if seconds else 0.0,
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("song_id", "integer", "The song's id in the source table."),
                dg.TableColumn("embedding", spec.column_type, f"Vector by {spec.model}."),
                dg.TableColumn("created_at", "timestamp", "When the row was written."),
            ]
        ),
        **_table(
            "ranges changed",
            [
                {"range": load.range.key, "rows": load.n_rows, "written": load.n_written, "deleted": load.n_deleted}
                for load in written[:_MAX_TABLE_ROWS]
            ],
        ),
    }


def describe_index(report: IndexReport) -> Metadata:
    """What was decided, the index as it is, what a build takes, and recall: a table and a picture."""
    estimate, recall = report.estimate, report.recall
    measured: Metadata = {}
    if recall is not None:
        measured = {
            "recall": round(recall.recall, 4),
            "target recall": recall.target,
            "median ms of a search": round(recall.chosen.ms_median, 3),
            "recall by probes": show_picture(draw_recall(recall), "recall@10 against milliseconds, by probes"),
            **_table(
                "recall and latency by probes",
                [
                    {
                        "probes": point.probes,
                        "chosen": point.probes == recall.probes,
                        "recall": round(point.recall, 4),
                        "recall of rows": round(point.recall_of_rows, 4),
                        "recall of made-up queries": round(point.recall_of_synthetic, 4),
                        "median ms": round(point.ms_median, 3),
                        "p99 ms": round(point.ms_p99, 3),
                    }
                    for point in recall.points
                ],
            ),
        }
    return {
        "reason": report.reason,
        "built": report.built,
        "dagster/row_count": report.index.n_rows,
        "lists": report.index.lists,
        "probes": report.index.probes,
        "bytes": report.index.n_bytes,
        "seconds": round(report.seconds, 3),
        "estimated seconds of a build": round(estimate.total_seconds, 1),
        "estimated bytes of memory": estimate.memory_bytes,
        "estimated bytes while it sorts": estimate.temporary_bytes,
        **measured,
    }


def _table(name: str, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """A table of metadata, or nothing where it has no rows."""
    return {name: dg.MetadataValue.table([dg.TableRecord(row) for row in rows])} if rows else {}
