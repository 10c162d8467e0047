"""The four assets, each a sentence: read, one call into the core, report."""

import dagster as dg

from songvec_assets.defs import reports
from songvec_assets.defs.partitions import TILING, one_run, ranges_policy, song_id_ranges
from songvec_assets.defs.resources import FireworksResource, PostgresResource, StorageResource, open_deployment
from songvec_assets.defs.steps import Emit, FillRecorder, budget_of, failing_clearly, run_step
from songvec_assets.songs.export import ExportMode, cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.ivfflat import bring_index_up_to_date

GROUP = "songvec"


class ExportConfig(dg.Config):
    """How the snapshots are brought up to date."""

    mode: ExportMode = "all"


class FillConfig(dg.Config):
    """What a run may spend."""

    max_usd: float | None = None


@dg.asset(group_name=GROUP, kinds={"postgres", "parquet"}, backfill_policy=one_run, code_version="1")
def songs_parquet(
    context: dg.AssetExecutionContext,
    config: ExportConfig,
    postgres: PostgresResource,
    fireworks: FireworksResource,
    storage: StorageResource,
) -> dg.MaterializeResult[None]:
    """Snapshots of the songs in Postgres: one Parquet file a song_id range, rewritten only where songs changed."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        report = run_step(
            context,
            deployment,
            lambda emit: cache_songs_to_parquet(
                deployment.database,
                deployment.source,
                deployment.store.songs,
                TILING,
                config.mode,
                also=deployment.cache.ranges(),
                progress=emit,
                stop=deployment.stop,
            ),
        )
        return dg.MaterializeResult(metadata=reports.describe_export(report))


@dg.asset(
    group_name=GROUP,
    kinds={"fireworks", "arrow"},
    partitions_def=song_id_ranges,
    backfill_policy=ranges_policy,
    deps=[songs_parquet],
    code_version="1",
)
def embedding_cache(
    context: dg.AssetExecutionContext,
    config: FillConfig,
    postgres: PostgresResource,
    fireworks: FireworksResource,
    storage: StorageResource,
) -> None:
    """Every vector that was paid for: one Arrow file a song_id range and model; a text is sent once."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        ranges = [SongIdRange.from_key(key) for key in context.partition_keys]
        recorder = FillRecorder(context, deployment.cache)

        def fill(emit: Emit) -> None:
            filler = deployment.filler(config.max_usd, progress=emit, run=budget_of(context.run))
            filler.fill_ranges(ranges, report=emit)

        try:
            run_step(context, deployment, fill, on_report=recorder.record)
        finally:
            recorder.log_total()
        recorder.fail_where_incomplete()


@dg.asset(
    group_name=GROUP,
    kinds={"postgres", "pgvector"},
    backfill_policy=one_run,
    deps=[embedding_cache],
    code_version="1",
)
def song_embeddings_table(
    context: dg.AssetExecutionContext,
    postgres: PostgresResource,
    fireworks: FireworksResource,
    storage: StorageResource,
) -> dg.MaterializeResult[None]:
    """Table `song_embeddings`, a row a song: equal to the cache for every loaded range, one transaction a range."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        report = run_step(context, deployment, deployment.publish)
        context.log.info(report.place.reason)
        if report.n_foreign:
            context.log.warning(
                f"{report.n_foreign:,} rows of song_embeddings are somebody else's: nothing was ever loaded of their "
                "ranges. Searches find them; delete them if they should not"
            )
        described = reports.describe_publish(report, deployment.table_spec, deployment.database.describe())
        return dg.MaterializeResult(metadata=described)


@dg.asset(
    group_name=GROUP,
    kinds={"postgres", "pgvector"},
    backfill_policy=one_run,
    deps=[song_embeddings_table],
    code_version="1",
)
def ivfflat_index(
    context: dg.AssetExecutionContext,
    postgres: PostgresResource,
    fireworks: FireworksResource,
    storage: StorageResource,
) -> dg.MaterializeResult[None]:
    """Index `embeddings_ivfflat_idx` for cosine distance: built when there is none or it no longer fits the rows."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        report = run_step(
            context,
            deployment,
            lambda emit: bring_index_up_to_date(
                deployment.database,
                deployment.cache,
                deployment.table_spec,
                deployment.index_settings,
                progress=emit,
                stop=deployment.stop,
            ),
        )
        context.log.info(report.reason)
        return dg.MaterializeResult(metadata=reports.describe_index(report))
