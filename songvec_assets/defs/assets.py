"""The source and the four assets. The body of each is one call into the core, then its report.

When to add here: another asset. Keep out: what an asset computes (the core), and how a report reads (`reports`).
"""

from collections.abc import Callable
from typing import Any

import dagster as dg

from songvec_assets.defs import reports
from songvec_assets.defs.automation import (
    FRESHNESS,
    WHEN_CACHE_CHANGED,
    WHEN_RANGES_ARE_BEHIND,
    WHEN_SONGS_CHANGED,
    WHEN_TABLE_CHANGED,
)
from songvec_assets.defs.charts import importing_ahead
from songvec_assets.defs.partitions import one_run, ranges_policy, song_id_ranges
from songvec_assets.defs.resources import RunResource
from songvec_assets.defs.steps import (
    Emit,
    FillRecorder,
    budget_of,
    failing_clearly,
    finding_incomplete,
    launched_keys,
    reembed_request_of,
    run_step,
)

COMMON: dict[str, Any] = {"group_name": "songvec", "owners": ["team:songvec"]}
SONGS = {"grain": "song", "key": "song_id"}
SOURCE_SCHEMA = reports.make_schema(
    song_id=("integer", "The primary key, or SONGVEC_SONG_ID_COLUMN."),
    name=("text", "SONGVEC_NAME_COLUMN. Songs without one are rejected, if the text template names it."),
    artist=("text", "SONGVEC_ARTIST_COLUMN. Songs without one are rejected, if the text template names it."),
    lyrics=("text", "SONGVEC_LYRICS_COLUMN. May be NULL, if the text template names more than lyrics."),
)
SNAPSHOT_SCHEMA = reports.make_schema(
    song_id=reports.SONG_ID,
    name=("string", "As in the source."),
    artist=("string", "As in the source."),
    lyrics=("string", "As in the source; null for instrumentals."),
    rejected=("string", "Why the song is rejected; null for most."),
    source_hash=("bigint", "The server's hash of name, artist and lyrics: finds what changed."),
    text_hash=("binary(16)", "BLAKE2b of the text to embed; null if the song is rejected."),
    truncated=("boolean", "Whether that text was cut to SONGVEC_MAX_TEXT_CHARS; null if the song is rejected."),
)
CACHE_SCHEMA = reports.make_schema(
    song_id=reports.SONG_ID,
    text_hash=("binary(16)", "BLAKE2b of the text that was embedded."),
    checksum=("uint64", "XXH3 of the row: finds what a disk changed."),
    reason=("string", "Why the provider rejected the song; null if there is a vector."),
    embedding=("list<float32>", "The vector as the provider returned it."),
)


def _asset(**given: Any) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """An asset of this graph."""
    return dg.asset(code_version="1", freshness_policy=FRESHNESS, **{"backfill_policy": one_run, **COMMON, **given})  # type: ignore[no-any-return]


songs = dg.AssetSpec(
    "songs",
    kinds={"postgres", "table"},
    description="The table of songs in Postgres, filled by others. The sensor `songs_source` watches it for changes.",
    metadata=SOURCE_SCHEMA,
    **COMMON,
)


@_asset(
    kinds={"postgres", "parquet"},
    tags=SONGS,
    deps=[songs],
    automation_condition=WHEN_SONGS_CHANGED,
    metadata=SNAPSHOT_SCHEMA,
)
def songs_parquet(context: dg.AssetExecutionContext, run: RunResource) -> dg.MaterializeResult[None]:
    """Snapshots of the songs, from which later steps see what changed: one Parquet file per range of song_ids."""
    with failing_clearly(), run.open(context.run.run_id) as pipeline, finding_incomplete("export", pipeline):
        return run_step(
            context,
            pipeline,
            lambda emit: pipeline.export(run.export_mode, emit, run.confirm_deletions),
            lambda report: reports.report_export(report, pipeline, context.log),
        )


@_asset(
    kinds={"fireworks", "arrow"},
    tags=SONGS,
    partitions_def=song_id_ranges,
    backfill_policy=ranges_policy,
    deps=[songs_parquet],
    automation_condition=WHEN_RANGES_ARE_BEHIND,
    metadata=CACHE_SCHEMA,
)
def embedding_cache(context: dg.AssetExecutionContext, run: RunResource) -> None:
    """Every vector that was paid for, so that no text is paid for twice: Arrow files, a folder per model and range."""
    with failing_clearly(), run.open(context.run.run_id) as pipeline:
        recorder = FillRecorder(context, pipeline)

        def fill(emit: Emit) -> None:
            request = reembed_request_of(context.run) if run.reembed else None
            choices = {
                "retry_rejected": run.retry_rejected,
                "confirm_reembedding": run.confirm_reembedding,
                "confirm_model_change": run.confirm_model_change,
            }
            # before the ranges are chosen: it binds the store, and divides its tail if the stop was raised
            filler = pipeline.filler(emit, budget_of(context.run), request, **choices)
            filler.fill_ranges(run.choose_ranges(pipeline, launched_keys(context)), report=emit)

        with failing_clearly(recorder.find_incomplete):
            try:
                run_step(context, pipeline, fill, lambda _: None, recorder.record)
            finally:
                recorder.log_total()
        recorder.conclude()


@_asset(
    kinds={"postgres", "pgvector"},
    tags=SONGS,
    deps=[embedding_cache],
    automation_condition=WHEN_CACHE_CHANGED,
    metadata=reports.table_schema(),
)
def song_embeddings_table(context: dg.AssetExecutionContext, run: RunResource) -> dg.MaterializeResult[None]:
    """The table that searches read, `song_embeddings`: equal to the cache, loaded in one transaction per range."""
    with failing_clearly(), run.open(context.run.run_id) as pipeline, finding_incomplete("load", pipeline):
        return run_step(
            context,
            pipeline,
            lambda emit: pipeline.load(importing_ahead(emit)),
            lambda report: reports.report_load(report, pipeline, context),
        )


@_asset(
    kinds={"postgres", "pgvector"},
    tags={"grain": "index", "key": "embeddings_ivfflat_idx"},
    deps=[song_embeddings_table],
    automation_condition=WHEN_TABLE_CHANGED,
)
def ivfflat_index(context: dg.AssetExecutionContext, run: RunResource) -> dg.MaterializeResult[None]:
    """The index that makes searches fast, `embeddings_ivfflat_idx`: built if missing or out of date."""
    with failing_clearly(), run.open(context.run.run_id) as pipeline:
        return run_step(
            context,
            pipeline,
            lambda emit: pipeline.build_index(run.rebuild_index, emit),
            lambda report: reports.report_index(report, pipeline, context),
        )
