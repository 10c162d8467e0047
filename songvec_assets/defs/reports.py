"""Core reports as Dagster metadata, data versions and pictures. No decisions."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import dagster as dg

from songvec_assets.cache.fill import FillReport
from songvec_assets.defs.pictures import draw_coverage, draw_map, draw_recall, draw_tokens, show_picture
from songvec_assets.deployment import Deployment
from songvec_assets.postgres.schema import read_pgvector_caution
from songvec_assets.search.preview import Preview
from songvec_assets.songs.export import ExportReport
from songvec_assets.songs.snapshots import SIZE_CLASS_BYTES
from songvec_assets.status import measure_coverage
from songvec_assets.vectors.index.recall import RecallReport
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets.vectors.swap import PublishReport

Metadata = dict[str, Any]
_MAX_TABLE_ROWS = 50
_MOST_TOKEN_BARS = 40
_INCOMPLETE = "incomplete"


def _schema(**columns: tuple[str, str]) -> Metadata:
    described = [dg.TableColumn(name, kind, words) for name, (kind, words) in columns.items()]
    return {"dagster/column_schema": dg.TableSchema(columns=described)}


_SONG_ID = ("integer", "The song's id in the source table.")
SOURCE_SCHEMA = _schema(
    song_id=("integer", "Its primary key, or SONGVEC_SONG_ID_COLUMN."),
    name=("text", "SONGVEC_NAME_COLUMN. Songs without one are rejected, if the text template names it."),
    artist=("text", "SONGVEC_ARTIST_COLUMN. Songs without one are rejected, if the text template names it."),
    lyrics=("text", "SONGVEC_LYRICS_COLUMN. May be NULL, if the text template names more than lyrics."),
)
SNAPSHOT_SCHEMA = _schema(
    song_id=_SONG_ID,
    name=("string", "As in the source."),
    artist=("string", "As in the source."),
    lyrics=("string", "As in the source; null for instrumentals."),
    set_aside=("string", "Why the song cannot be embedded; null for most."),
    source_hash=("bigint", "The server's hash of name, artist and lyrics: finds what changed."),
    text_hash=("binary(16)", "BLAKE2b of the text to embed; null if the song cannot be embedded."),
    truncated=("boolean", "Whether that text was cut to SONGVEC_MAX_TEXT_CHARS; null if the song cannot be embedded."),
)
SHARD_SCHEMA = _schema(
    song_id=_SONG_ID,
    text_hash=("binary(16)", "BLAKE2b of the text that was embedded."),
    checksum=("uint64", "XXH3 of the row: finds what a disk changed."),
    reason=("string", "Why the provider refuses the song; null where there is a vector."),
    embedding=("list<float32>", "The vector as the provider gave it."),
)


def table_schema(column_type: str = "vector", model: str = "the configured model") -> Metadata:
    """Columns of `song_embeddings`."""
    return _schema(
        song_id=_SONG_ID,
        embedding=(column_type, f"Vector by {model}."),
        created_at=("timestamp", "When the row was written."),
    )


def report_export(report: ExportReport, deployment: Deployment, log: Any) -> dg.MaterializeResult[None]:
    """An export's totals and pictures; its version is that of all snapshots."""
    snapshots, caution = deployment.store.songs, deployment.source.caution
    if caution:
        log.warning(caution)
    metadata = describe_export(report) | {"folder": dg.MetadataValue.path(str(snapshots.storage.root.resolve()))}
    metadata |= {"row security": caution} if caution else {}
    if any(each.written for each in report.ranges):
        # before anything is paid for
        for line in deployment.describe_boilerplate():
            log.warning(line)
    metadata |= _illustrate(log, lambda: _describe_tokens(report, deployment))
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(snapshots.digest_all()))


def report_publish(report: PublishReport, deployment: Deployment, log: Any) -> dg.MaterializeResult[None]:
    """A load's totals and what every range came to; its version is that of the ledger."""
    log.info(report.target.reason)
    if report.comparison is not None:
        log.info(f"swapped in: {report.comparison.describe()}")
    if report.n_unmanaged:
        log.warning(
            f"{report.n_unmanaged:,} rows of song_embeddings are somebody else's: nothing was ever loaded of their "
            "ranges. Searches find them; delete them if they should not"
        )
    metadata = describe_publish(report, deployment) | _illustrate(log, lambda: _describe_coverage(deployment))
    version = deployment.table.ledger.digest(deployment.table_spec)
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(version))


def report_index(report: IndexReport, deployment: Deployment, log: Any) -> dg.MaterializeResult[None]:
    """What was decided and measured, and what the vectors look like; its version is that of the build."""
    log.info(report.reason)
    if caution := read_pgvector_caution(deployment.database):
        log.warning(caution)
    metadata = describe_index(report)
    if report.recall is not None:
        recall = report.recall
        metadata |= _illustrate(log, lambda: describe_recall(recall))
    metadata |= _illustrate(log, lambda: describe_preview(deployment.preview()))
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(report.index.version))


def _illustrate(log: Any, describe: Callable[[], Metadata]) -> Metadata:
    """What is there to be looked at only: where it cannot be made, that is told, and what was done stays done."""
    try:
        return describe()
    except Exception as error:  # noqa: BLE001 - any: of a database, of a title that no font can draw
        log.warning(f"something to look at could not be made, and nothing else is the worse for it: {error!r}")
        return {}


def _describe_coverage(deployment: Deployment) -> Metadata:
    coverage = measure_coverage(deployment)
    if not coverage:
        return {}
    words = "songs by range: loaded, cached, set aside, missing"
    return {"coverage by range": show_picture(draw_coverage(coverage), words)}


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
        "tokens expected": report.n_tokens_expected,
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


@dataclass(frozen=True)
class Incomplete:
    """What a failed step lacks, where it leaves enough to go on without.

    Attributes:
        reasons: keys of ranges by the reason why they are not complete; no keys where the reason names them.
        figures: what was done for these ranges all the same, as `describe_fill` has it.
    """

    reasons: dict[str, list[str]]
    figures: dict[str, float] = field(default_factory=dict)


def describe_incomplete(incomplete: Incomplete) -> Metadata:
    """The metadata of such a failure; `read_incomplete` is the inverse."""
    return {_INCOMPLETE: dg.MetadataValue.json(asdict(incomplete))}


def read_incomplete(event: dg.DagsterEvent) -> Incomplete | None:
    """What a failed step lacks; None: what comes after it cannot go on, or it did not fail."""
    failure = event.step_failure_data.user_failure_data if event.is_step_failure else None
    described = (failure.metadata or {}).get(_INCOMPLETE) if failure else None
    if not isinstance(described, dg.JsonMetadataValue):
        return None
    return Incomplete(**described.value)  # type: ignore[arg-type]


def describe_publish(report: PublishReport, deployment: Deployment) -> Metadata:
    """Totals of a load, what was swapped in, a row a range that was written."""
    loads, compared, spec = report.loads, report.comparison, deployment.table_spec
    swapped = {}
    if compared is not None:
        swapped = {
            "comparison": compared.describe(),
            "rows before": compared.n_serving,
            "neighbours shared with the table before": round(compared.overlap, 3),
        }
    written = [load for load in loads if load.n_written or load.n_deleted]
    seconds = sum(load.seconds for load in written)
    n_written = sum(load.n_written for load in written)
    return {
        "dagster/row_count": sum(load.n_rows for load in loads),
        "dagster/table_name": "song_embeddings",
        "model": spec.model,
        "column": spec.column_type,
        "query prompt": spec.query_prompt or "",
        "document prompt": spec.document_prompt or "",
        "database": deployment.database.describe(),
        "reason": report.target.reason,
        "swapped": compared is not None,
        "rows of somebody else": report.n_unmanaged,
        **swapped,
        "ranges": len(loads),
        "ranges written": len(written),
        "rows written": n_written,
        "rows deleted": sum(load.n_deleted for load in written),
        "seconds": round(seconds, 3),
        "rows per second": round(n_written / seconds, 1) if seconds else 0.0,
        **table_schema(spec.column_type, spec.model),
        **_table(
            "ranges changed",
            [
                {"range": load.range.key, "rows": load.n_rows, "written": load.n_written, "deleted": load.n_deleted}
                for load in written[:_MAX_TABLE_ROWS]
            ],
        ),
    }


def describe_index(report: IndexReport) -> Metadata:
    """What was decided, the index as it is, what a build takes, and recall."""
    estimate = report.estimate
    return {
        "reason": report.reason,
        "built": report.built,
        "dagster/row_count": report.index.n_rows,
        "lists": report.index.lists,
        "probes": report.index.probes,
        "bytes": report.index.n_bytes,
        "seconds": round(report.seconds, 3),
        "estimated bytes of memory": estimate.memory_bytes,
        "estimated bytes while it sorts": estimate.temporary_bytes,
    }


def describe_recall(recall: RecallReport) -> Metadata:
    return {
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


def describe_preview(preview: Preview) -> Metadata:
    """A map of the catalogue, and some songs with their nearest."""
    return {
        "map of the catalogue": show_picture(draw_map(preview.map), "songs on the two main axes, coloured by cluster"),
        **_table(
            "songs and their nearest",
            [
                {"song": f"{each.name} — {each.artist}"}
                | {f"nearest {place}": "" for place in (1, 2, 3)}
                | {
                    f"nearest {place}": f"{hit.name} — {hit.artist} ({hit.similarity:.2f})"
                    for place, hit in enumerate(each.nearest, 1)
                }
                for each in preview.neighborhoods
            ],
        ),
    }


def _describe_tokens(report: ExportReport, deployment: Deployment) -> Metadata:
    """Songs by size as songs by tokens, in a few bars."""
    if not report.text_sizes:
        return {}
    bytes_per_token, largest = deployment.token_estimator().bytes_per_token, max(report.text_sizes)
    classes_a_bar = largest // _MOST_TOKEN_BARS + 1
    counts = [0] * (largest // classes_a_bar + 1)
    for size, n_songs in report.text_sizes.items():
        counts[size // classes_a_bar] += n_songs
    edges = [bar * classes_a_bar * SIZE_CLASS_BYTES / bytes_per_token for bar in range(len(counts) + 1)]
    words = f"how many songs have how many tokens, at {bytes_per_token:.1f} bytes a token"
    return {"tokens per song": show_picture(draw_tokens(counts, edges), words)}


def _table(name: str, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """A table of metadata, or nothing where it has no rows."""
    if not rows:
        return {}
    kinds = {bool: "bool", int: "int", float: "float"}
    schema = dg.TableSchema(
        [dg.TableColumn(column, kinds.get(type(value), "string")) for column, value in rows[0].items()]
    )
    return {name: dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema)}
