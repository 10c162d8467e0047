"""The four assets, each a sentence: read, one call into the core, report; and the songs that they begin with."""

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
from songvec_assets.defs.partitions import one_run, ranges_policy, song_id_ranges
from songvec_assets.defs.resources import RunResource
from songvec_assets.defs.steps import (
    Emit,
    FillRecorder,
    asked_anew_by,
    budget_of,
    failing_clearly,
    launched_keys,
    run_step,
)

GROUP = "songvec"
OWNERS = ["team:songvec"]


def _asset(**given: Any) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """An asset of this graph: what all four have in common."""
    return dg.asset(  # type: ignore[no-any-return]
        group_name=GROUP, owners=OWNERS, code_version="1", freshness_policy=FRESHNESS, **given
    )


songs = dg.AssetSpec(
    "songs",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres", "table"},
    description=(
        "The catalogue in Postgres: a row a song; key: its integer id. Others fill it. The sensor `songs_source` looks "
        "whether it changed."
    ),
    metadata=reports.SOURCE_SCHEMA,
)


@_asset(
    kinds={"postgres", "parquet"},
    tags={"grain": "song", "key": "song_id"},
    backfill_policy=one_run,
    deps=[songs],
    automation_condition=WHEN_SONGS_CHANGED,
    metadata=reports.SNAPSHOT_SCHEMA,
)
def songs_parquet(context: dg.AssetExecutionContext, run: RunResource) -> dg.MaterializeResult[None]:
    """Snapshots of the songs in Postgres: one Parquet file a song_id range, rewritten only where songs changed.

    Grain: a row a song. Key: song_id.
    """
    with failing_clearly(), run.open() as deployment:
        return run_step(
            context,
            deployment,
            lambda emit: reports.report_export(
                deployment.export(run.export_mode, emit, run.confirm_deletions), deployment, context.log
            ),
        )


@_asset(
    kinds={"fireworks", "arrow"},
    tags={"grain": "song", "key": "song_id"},
    partitions_def=song_id_ranges,
    backfill_policy=ranges_policy,
    deps=[songs_parquet],
    automation_condition=WHEN_RANGES_ARE_BEHIND,
    metadata=reports.SHARD_SCHEMA,
)
def embedding_cache(context: dg.AssetExecutionContext, run: RunResource) -> None:
    """Every vector that was paid for: one Arrow file a song_id range and model; a text is sent once.

    Grain: a row a song, its last one holds. Key: song_id, with the hash of the text that was embedded.
    """
    with failing_clearly(), run.open() as deployment:
        recorder = FillRecorder(context, deployment)

        def fill(emit: Emit) -> None:
            anew = asked_anew_by(context.run) if run.reembed else None
            # first: it binds the store, and cuts its tail where the stop was raised
            confirmed = run.confirm_reembedding
            filler = deployment.filler(emit, budget_of(context.run), anew, run.retry_rejected, confirmed)
            filler.fill_ranges(run.choose_ranges(deployment, launched_keys(context)), report=emit)

        with failing_clearly(recorder.describe_stop):
            try:
                run_step(context, deployment, fill, on_report=recorder.record)
            finally:
                recorder.log_total()
        recorder.conclude()


@_asset(
    kinds={"postgres", "pgvector"},
    tags={"grain": "song", "key": "song_id"},
    backfill_policy=one_run,
    deps=[embedding_cache],
    automation_condition=WHEN_CACHE_CHANGED,
    metadata=reports.table_schema(),
)
def song_embeddings_table(context: dg.AssetExecutionContext, run: RunResource) -> dg.MaterializeResult[None]:
    """Table `song_embeddings`: equal to the cache for every loaded range, one transaction a range.

    Grain: a row a song. Key: song_id.
    """
    with failing_clearly(), run.open() as deployment:
        return run_step(
            context, deployment, lambda emit: reports.report_publish(deployment.publish(emit), deployment, context.log)
        )


@_asset(
    kinds={"postgres", "pgvector"},
    tags={"grain": "index", "key": "embeddings_ivfflat_idx"},
    backfill_policy=one_run,
    deps=[song_embeddings_table],
    automation_condition=WHEN_TABLE_CHANGED,
)
def ivfflat_index(context: dg.AssetExecutionContext, run: RunResource) -> dg.MaterializeResult[None]:
    """Index `embeddings_ivfflat_idx` for cosine distance: built when there is none or it no longer fits the rows.

    Grain: one index. Key: its name.
    """
    with failing_clearly(), run.open() as deployment:
        return run_step(
            context,
            deployment,
            lambda emit: reports.report_index(deployment.index(run.rebuild_index, emit), deployment, context.log),
        )
