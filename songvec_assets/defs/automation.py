"""Jobs. Sensors and schedules spend money: whatever is added here starts stopped."""

import dagster as dg

from songvec_assets.defs.resources import FireworksResource, PostgresResource, StorageResource, open_deployment
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.postgres.schema import hold_lock
from songvec_assets.vectors.swap import LOCK, roll_back

refresh_job = dg.define_asset_job(
    "refresh",
    selection=dg.AssetSelection.all(),
    description="Export, embed, load and index: every step does what changed, and nothing else.",
)

swap_job = dg.define_asset_job(
    "swap",
    selection=dg.AssetSelection.all(),
    config={"resources": {"postgres": {"config": {"swap": True}}}},
    description=(
        "Build another model, size or type beside the serving table, index it, compare both, and put it in its place. "
        "Name it in the run config of resources: fireworks (embedding_model, embedding_dimensions), postgres "
        "(vector_type). Searches go on all the while; the table before is kept as song_embeddings_old."
    ),
)


@dg.op(description="The table that served before the last swap serves again; the present one stays beside it.")
def put_back_table_before(
    context: dg.OpExecutionContext,
    postgres: PostgresResource,
    fireworks: FireworksResource,
    storage: StorageResource,
) -> None:
    """See `roll_back`."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)

        def tell_waiting() -> None:
            context.log.info("waiting for a load or swap to end")

        with hold_lock(deployment.database, LOCK, on_wait=tell_waiting, check=deployment.stop.check):
            context.log.info(f"searches now find {roll_back(deployment.database)}")


@dg.job(name="rollback", description="Undo the last swap: the table before serves again.")
def rollback_job() -> None:
    """One op."""
    put_back_table_before()
