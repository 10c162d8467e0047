"""The core's reports as Dagster metadata and data versions. Numbers stay numbers, which the UI plots; keys name units.

When to add here: a figure that people look at in the UI. Keep out: decisions, and how a chart is drawn (`charts`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.plan import FillReport
from songvec_assets.defs.charts import digest_data, draw_coverage, draw_if_changed, draw_map, draw_recall, show_chart
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.extension import read_pgvector_caution
from songvec_assets.search.preview import Preview
from songvec_assets.songs.reports import ExportReport
from songvec_assets.vectors.index.audit import Comparison
from songvec_assets.vectors.index.recall import RecallReport
from songvec_assets.vectors.index.recall_searches import RecallPoint
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets.vectors.swap import LoadReport

Metadata = dict[str, Any]
_MAX_TABLE_ROWS = 50
COVERAGE, RECALL, MAP = "coverage by range", "recall against latency", "map of the songs"
RECALL_POINTS, NEAREST = "recall and latency by probes", "songs and their nearest"


def make_schema(**columns: tuple[str, str]) -> Metadata:
    described = [dg.TableColumn(name, kind, meaning) for name, (kind, meaning) in columns.items()]
    return {"dagster/column_schema": dg.TableSchema(columns=described)}


SONG_ID = ("integer", "The song's id in the source table.")


def table_schema(column_type: str = "vector", model: str = "the configured model") -> Metadata:
    """Columns of `song_embeddings`."""
    return make_schema(
        song_id=SONG_ID,
        embedding=(column_type, f"Vector by {model}."),
        created_at=("timestamp", "When the row was written."),
    )


def report_export(report: ExportReport, pipeline: Pipeline, log: Any) -> dg.MaterializeResult[None]:
    """An export's totals; the version is the digest of all snapshots."""
    if caution := pipeline.source.caution:
        log.warning(caution)
    if any(each.written for each in report.ranges):
        # before anything is paid for
        for line in pipeline.describe_boilerplate():
            log.warning(line)
    metadata = describe_export(report) | {"folder": dg.MetadataValue.path(pipeline.store.songs.storage.location)}
    metadata |= {"row security": caution} if caution else {}
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(pipeline.store.songs.digest_all()))


def report_load(
    report: LoadReport, pipeline: Pipeline, context: dg.AssetExecutionContext
) -> dg.MaterializeResult[None]:
    """A load's totals and the changed ranges; the version is the digest of the ledger."""
    context.log.info(report.target.reason)
    if report.comparison is not None:
        context.log.info(f"swapped in: {report.comparison.describe()}")
        if report.comparison.quality and (warning := report.comparison.quality.warning):
            context.log.warning(warning)
    if report.n_unmanaged:
        context.log.warning(
            f"{report.n_unmanaged:,} rows of song_embeddings are unmanaged: nothing was ever loaded into their ranges. "
            "Searches find them; delete them if they should not"
        )
    version = pipeline.table.ledger.digest(pipeline.table_spec)
    coverage = pipeline.read_inventory(with_source=False).coverage

    def draw() -> Metadata:
        return {COVERAGE: show_chart(draw_coverage(coverage), "songs by range: loaded, cached, rejected, missing")}

    charts = draw_if_changed(context, (COVERAGE,), digest_data(coverage.rows()), draw) if len(coverage) else {}
    return dg.MaterializeResult(metadata=describe_load(report, pipeline) | charts, data_version=dg.DataVersion(version))


def report_index(
    report: IndexReport, pipeline: Pipeline, context: dg.AssetExecutionContext
) -> dg.MaterializeResult[None]:
    """What was decided and measured, and charts; its version is that of the build."""
    context.log.info(report.reason)
    if caution := read_pgvector_caution(pipeline.database):
        context.log.warning(caution)
    metadata = describe_index(report)
    if recall := report.recall:

        def draw() -> Metadata:
            return {RECALL: show_chart(draw_recall(recall), "recall@10 against milliseconds, by probes")}

        metadata |= draw_if_changed(context, (RECALL,), digest_data(recall), draw)
    loaded = pipeline.table.ledger.digest(pipeline.table_spec)
    metadata |= draw_if_changed(context, (MAP, NEAREST), loaded, lambda: describe_preview(pipeline.preview()))
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(report.index.version))


def describe_export(report: ExportReport) -> Metadata:
    """Totals of an export, a row per changed range, reasons of rejected songs."""
    written = [each for each in report.ranges if each.written]
    rejected = (report.rejected + report.unreachable).most_common(_MAX_TABLE_ROWS)
    return {
        "dagster/row_count": report.n_songs,
        "ranges": len(report.ranges),
        "ranges written": len(written),
        "songs new": report.changes.n_new,
        "songs changed": report.changes.n_changed,
        "songs deleted": report.changes.n_deleted,
        "songs rejected": report.rejected.total(),
        "songs outside all ranges": report.unreachable.total(),
        **_table("rejected songs", [{"reason": reason, "songs": count} for reason, count in rejected]),
        **_table(
            "changed ranges",
            [
                {
                    "range": each.range.key,
                    "songs": each.footer.n_songs,
                    "new": each.changes.n_new,
                    "changed": each.changes.n_changed,
                    "deleted": each.changes.n_deleted,
                }
                for each in written[:_MAX_TABLE_ROWS]
            ],
        ),
    }


def describe_fill(report: FillReport, cache: ModelCache) -> Metadata:
    """One range's fill, as numbers that the UI plots over ranges and time."""
    rejected = report.rejected[:_MAX_TABLE_ROWS]
    return {
        "dagster/partition_row_count": count_vectors(report),
        "songs": report.n_songs,
        "songs new": report.n_new,
        "songs changed": report.n_changed,
        "songs deleted": report.n_deleted,
        "songs unchanged": report.n_unchanged,
        "songs reused": report.n_reused,
        "songs embedded": report.n_embedded,
        "songs rejected": report.n_rejected,
        "songs truncated": report.n_truncated,
        "damaged data (MB)": round(report.n_bytes_damaged / 1e6, 3),
        "retries": report.n_retries,
        "retries after 429": report.n_limited,
        "tokens": report.n_tokens,
        "tokens estimated": report.n_tokens_expected,
        "cost ($)": round(report.usd, 6),
        "duration (s)": round(report.seconds, 3),
        "songs per second": round(report.n_embedded / report.seconds, 1) if report.seconds else 0.0,
        "model": cache.model,
        "folder": dg.MetadataValue.path(cache.storage.describe(report.range.key)),
        **_table("songs rejected by the provider", [{"song_id": each, "reason": why} for each, why in rejected]),
    }


def count_vectors(report: FillReport) -> int:
    """Songs of a range that have a vector, complete or not."""
    return report.n_unchanged + report.n_reused + report.n_embedded


def describe_fills(reports: Sequence[FillReport]) -> str:
    """The totals of a run, in one line."""

    def total(name: str) -> Any:
        return sum(getattr(each, name) for each in reports)

    return (
        f"{total('n_embedded'):,} songs embedded in {len(reports):,} ranges, {total('n_rejected'):,} rejected; "
        f"{total('n_tokens'):,} tokens, ${total('usd'):,.4f} as billed; {total('n_retries'):,} retries, "
        f"{total('n_limited'):,} of them after 429"
    )


def describe_load(report: LoadReport, pipeline: Pipeline) -> Metadata:
    """Totals of a load, what was swapped in, a row per range that was written."""
    compared, spec = report.comparison, pipeline.table_spec
    written = [load for load in report.loads if load.n_written or load.n_deleted]
    seconds, n_written = sum(load.seconds for load in written), sum(load.n_written for load in written)
    return {
        "dagster/row_count": sum(load.n_rows for load in report.loads),
        "dagster/table_name": "song_embeddings",
        "model": spec.model,
        "column type": spec.column_type,
        "query prompt": spec.query_prompt or "",
        "document prompt": spec.document_prompt or "",
        "database": pipeline.database.describe(),
        "reason": report.target.reason,
        "swapped": compared is not None,
        "rows unmanaged": report.n_unmanaged,
        **(describe_comparison(compared) if compared else {}),
        "ranges": len(report.loads),
        "ranges written": len(written),
        "rows written": n_written,
        "rows deleted": sum(load.n_deleted for load in written),
        "duration (s)": round(seconds, 3),
        "rows per second": round(n_written / seconds, 1) if seconds else 0.0,
        **table_schema(spec.column_type, spec.model),
        **_table(
            "changed ranges",
            [
                {"range": load.range.key, "rows": load.n_rows, "written": load.n_written, "deleted": load.n_deleted}
                for load in written[:_MAX_TABLE_ROWS]
            ],
        ),
    }


def describe_comparison(compared: Comparison) -> Metadata:
    """The staging table, compared with the one that it replaced."""
    measured = compared.quality if compared.quality and not compared.quality.trouble else None
    return {
        "comparison": compared.describe(),
        "rows of the previous table": compared.n_serving,
        "neighbors shared with the previous table (%)": round(100 * compared.overlap, 1),
        **({"nDCG@10 of labelled queries": round(measured.staged, 4)} if measured else {}),
        **({"nDCG@10 of labelled queries, previous table": round(measured.serving, 4)} if measured else {}),
    }


def describe_index(report: IndexReport) -> Metadata:
    """What was decided, the index as it is, what a build needs, and recall."""
    metadata = {
        "reason": report.reason,
        "built": report.built,
        "dagster/row_count": report.index.n_rows,
        "kind": report.index.kind,
        "lists": report.index.lists,
        "probes": report.index.probes,
        "candidates": report.index.candidates or 0,
        "size (MB)": round(report.index.n_bytes / 1e6, 1),
        "duration (s)": round(report.seconds, 3),
        "memory for a build, estimated (MB)": round(report.estimate.memory_bytes / 1e6, 1),
        "disk for a build, estimated (MB)": round(report.estimate.temporary_bytes / 1e6, 1),
    }
    return metadata | (describe_recall(report.recall) if report.recall else {})


def describe_recall(recall: RecallReport) -> Metadata:
    """What was measured, a row per number of probes."""
    return {
        "recall (%)": round(100 * recall.recall, 2),
        "recall, 95% interval (%)": describe_interval(recall.chosen),
        "recall, queries": recall.chosen.n_queries,
        "recall, rows compared": recall.n_read,
        "recall, duration (s)": round(recall.seconds, 1),
        "target recall (%)": 100 * recall.target,
        "median search (ms)": round(recall.chosen.ms_median, 3),
        **_table(
            RECALL_POINTS,
            [
                {
                    "probes": point.probes,
                    "chosen": point.probes == recall.probes,
                    "recall (%)": round(100 * point.recall, 2),
                    "95% interval (%)": describe_interval(point),
                    "queries": point.n_queries,
                    "recall of rows (%)": round(100 * point.recall_of_rows, 2),
                    "recall of synthetic queries (%)": round(100 * point.recall_of_synthetic, 2),
                    "median (ms)": round(point.ms_median, 3),
                    "p99 (ms)": round(point.ms_p99, 3),
                }
                for point in recall.points
            ],
        ),
    }


def describe_interval(point: RecallPoint) -> str:
    return f"{100 * point.low:.1f} to {100 * point.high:.1f}"


def describe_preview(preview: Preview) -> Metadata:
    """A map of the songs, and some songs with their nearest."""

    def describe_nearest(number: int, each: Any) -> str:
        if number > len(each.nearest):
            return ""
        hit = each.nearest[number - 1]
        return f"{hit.name} — {hit.artist} ({hit.similarity:.2f})"

    rows = [
        {"song": f"{each.name} — {each.artist}", **{f"nearest {n}": describe_nearest(n, each) for n in (1, 2, 3)}}
        for each in preview.neighborhoods
    ]
    chart = show_chart(draw_map(preview.map), "songs on the two main axes, colored by cluster")
    return {MAP: chart, **_table(NEAREST, rows)}


def _table(name: str, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """A table of metadata, or nothing if it has no rows."""
    if not rows:
        return {}
    kinds = {bool: "bool", int: "int", float: "float"}
    columns = [dg.TableColumn(column, kinds.get(type(value), "string")) for column, value in rows[0].items()]
    return {name: dg.MetadataValue.table([dg.TableRecord(row) for row in rows], dg.TableSchema(columns))}
