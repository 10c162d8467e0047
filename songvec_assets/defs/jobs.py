"""Jobs by intent. What each may spend and looks at is in its run config: resources, run."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.execution.build_resources import wrap_resources_for_execution

from songvec_assets.defs.resources import RunResource, make_resources, present_values
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.dry_run import plan_run
from songvec_assets.progress import RunContext
from songvec_assets.settings import PostgresSettings, ProviderSettings
from songvec_assets.vectors.swap import roll_back

_OPTIONS = "Its options are in the run config under resources, run: budget, ranges, concurrency and others."


class _JobWithDefaults(UnresolvedAssetJobDefinition):
    """An asset job with defaults of its own: what makes it this job is prefilled in the launchpad.

    The launchpad shows the defaults of the resources' fields. A job's `config` is not shown where one of its assets is
    partitioned, and hides all other options where none is.
    """

    resources: Mapping[str, Any]

    def resolve(self, *given: Any, **named: Any) -> dg.JobDefinition:
        """As the asset graph has it, with this job's resources."""
        job = super().resolve(*given, **named)
        return job.with_top_level_resources({**job.resource_defs, **wrap_resources_for_execution(self.resources)})


class _RebuildIndex(_JobWithDefaults):
    resources = make_resources(run={"rebuild_index": True})


class _Swap(_JobWithDefaults):
    # what to swap to is to be typed here: it stands there as it is now
    resources = make_resources(
        run={"swap": True},
        fireworks=present_values(ProviderSettings, "embedding_model", "embedding_dimensions"),
        postgres=present_values(PostgresSettings, "vector_type"),
    )


refresh_job = dg.define_asset_job(
    "refresh",
    selection=dg.AssetSelection.assets("songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index"),
    description=f"Export, embed, load and index: every step does what changed, and nothing else. {_OPTIONS}",
)

embed_job = dg.define_asset_job(
    "embed",
    selection=dg.AssetSelection.assets("songs_parquet", "embedding_cache"),
    description=f"Export and embed: pays for what is missing; the table stays as it is. {_OPTIONS}",
)

load_job = dg.define_asset_job(
    "load",
    selection=dg.AssetSelection.assets("song_embeddings_table"),
    description="Make the table equal the cache. Sends nothing to the provider.",
)

rebuild_index_job = _RebuildIndex(
    "rebuild_index",
    selection=dg.AssetSelection.assets("ivfflat_index"),
    description="Build the index anew beside the one that serves, measure its recall, and let it take its place.",
)

swap_job = _Swap(
    "swap",
    selection=dg.AssetSelection.assets("songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index"),
    description=(
        "Build another model, size or type beside the serving table, index it, compare both, and put it in its place. "
        "Name it in the run config, where the present ones stand: resources, fireworks (embedding_model, "
        "embedding_dimensions) and postgres (vector_type). Searches go on all the while; the table before is kept as "
        "song_embeddings_old."
    ),
)

verify_job = dg.define_asset_job(
    "verify",
    selection=dg.AssetSelection.all_asset_checks(),
    description="Ask all checks of table and index; changes nothing, and sends nothing to the provider.",
)


@dg.op(description="The table that served before the last swap serves again; the present one stays beside it.")
def put_back_table_before(context: dg.OpExecutionContext, run: RunResource) -> None:
    """See `roll_back`."""
    with failing_clearly(), run.open() as deployment:
        waiting = RunContext(lambda progress: context.log.info(progress.note), deployment.stop)
        context.log.info(f"searches now find {roll_back(deployment.database, waiting)}")


@dg.job(name="rollback", description="Undo the last swap: the table before serves again.")
def rollback_job() -> None:
    """One op."""
    put_back_table_before()


@dg.op(description="What a refresh would send, write and build, and what it would cost.")
def plan(context: dg.OpExecutionContext, run: RunResource) -> None:
    """See `plan_run`."""
    with failing_clearly(), run.open() as deployment:
        planned = plan_run(deployment, run.choose_ranges(deployment, None), run.embed_anew)
        for line in planned.describe():
            context.log.info(line)


@dg.job(
    name="dry_run",
    description=(
        "Plan and price a refresh from the snapshots as they are: sends nothing, exports nothing, writes no vector and "
        f"no row. The plan is in the log. {_OPTIONS}"
    ),
)
def dry_run_job() -> None:
    """One op."""
    plan()
