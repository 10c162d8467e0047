"""Jobs by intent. What each may spend and which ranges it takes is in its run config: resources, run.

When to add here: another thing to do with the assets. Keep out: what starts it (`automation`, `cli`).
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.execution.build_resources import wrap_resources_for_execution

from songvec_assets.defs.resources import RunResource, make_resources, present_values
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.settings import PostgresSettings, ProviderSettings

_OPTIONS = "Its options are in the run config under resources, run: budget, ranges, concurrency and others."


class _JobWithDefaults(UnresolvedAssetJobDefinition):
    """An asset job whose launchpad is prefilled with the options that make it this job.

    The launchpad shows the defaults of the resources' fields. A job's `config` would not do: it is not shown if an
    asset of the job is partitioned, and hides all other options if none is.
    """

    resources: Mapping[str, Any]

    def resolve(self, *given: Any, **named: Any) -> dg.JobDefinition:
        """The asset graph's job, with this job's resources."""
        job = super().resolve(*given, **named)
        return job.with_top_level_resources({**job.resource_defs, **wrap_resources_for_execution(self.resources)})


class _RebuildIndex(_JobWithDefaults):
    resources = make_resources(run={"rebuild_index": True})


class _Swap(_JobWithDefaults):
    # shown as they are, to be typed over
    resources = make_resources(
        run={"swap": True},
        fireworks=present_values(ProviderSettings, "embedding_model", "model_id", "embedding_dimensions"),
        postgres=present_values(PostgresSettings, "vector_type"),
    )


refresh_job = dg.define_asset_job(
    "refresh",
    selection=dg.AssetSelection.assets("songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index"),
    description=f"Export, embed, load and index: each step processes only what changed. {_OPTIONS}",
)

embed_job = dg.define_asset_job(
    "embed",
    selection=dg.AssetSelection.assets("songs_parquet", "embedding_cache"),
    description=f"Export and embed: pays for what is missing, and does not change the table. {_OPTIONS}",
)

load_job = dg.define_asset_job(
    "load",
    selection=dg.AssetSelection.assets("song_embeddings_table"),
    description="Load the cache into the table: writes what changed, and sends no song to the provider.",
)

rebuild_index_job = _RebuildIndex(
    "rebuild_index",
    selection=dg.AssetSelection.assets("ivfflat_index"),
    description="Build a new index while the current one serves, measure its recall, and replace the current one.",
)

swap_job = _Swap(
    "swap",
    selection=dg.AssetSelection.assets("songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index"),
    description=(
        "Switch to another model, size or type: build and index a staging table, compare it with the serving one, and "
        "replace it. Type over the current values in the run config: resources, fireworks (embedding_model, "
        "embedding_dimensions; model_id if it is set) and postgres (vector_type). Searches work throughout; the "
        "previous table is kept as song_embeddings_old."
    ),
)

verify_job = dg.define_asset_job(
    "verify",
    selection=dg.AssetSelection.all_asset_checks(),
    description="Run all checks of the table and the index; changes nothing, and sends nothing to the provider.",
)


@dg.op(description="Make the table that served before the last swap serve again; the current one is kept.")
def restore_previous_table(context: dg.OpExecutionContext, run: RunResource) -> None:
    """See `Pipeline.roll_back`."""
    with failing_clearly(), run.open(context.run.run_id) as pipeline:
        serving = pipeline.roll_back(lambda progress: context.log.info(progress.note))
        context.log.info(f"searches now find {serving}")


@dg.job(name="rollback", description="Undo the last swap: the previous table serves again.")
def rollback_job() -> None:
    """One op."""
    restore_previous_table()


@dg.op(description="Show what a refresh would send, write and build, and what it would cost.")
def plan(context: dg.OpExecutionContext, run: RunResource) -> None:
    """See `Pipeline.dry_run`."""
    with failing_clearly(), run.open(context.run.run_id) as pipeline:
        for line in pipeline.dry_run(run.choose_ranges(pipeline, None), run.reembed).describe():
            context.log.info(line)


@dg.job(
    name="dry_run",
    description=(
        "Plan and price a refresh from the snapshots: sends nothing, exports nothing, writes no vector and no row. The "
        f"plan is in the log. {_OPTIONS}"
    ),
)
def dry_run_job() -> None:
    """One op."""
    plan()
