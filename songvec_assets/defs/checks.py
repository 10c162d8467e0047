"""Asset checks: measure, compare, report. Coverage warns; a wrong vector or a mixed model blocks what is downstream."""

import dagster as dg

from songvec_assets.defs.assets import ivfflat_index, song_embeddings_table
from songvec_assets.defs.resources import FireworksResource, PostgresResource, StorageResource, open_deployment
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.status import measure_status
from songvec_assets.vectors.audit import audit_index, audit_models, audit_recall, audit_vectors


@dg.asset_check(
    asset=song_embeddings_table, description="Every song of the snapshot has an embedding or a named reason."
)
def coverage(postgres: PostgresResource, fireworks: FireworksResource, storage: StorageResource) -> dg.AssetCheckResult:
    """Warns under 100 %."""
    with failing_clearly():
        total = measure_status(open_deployment(postgres, fireworks, storage)).total
    return dg.AssetCheckResult(
        passed=total.n_missing == 0,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{total.n_loaded:,} of {total.n_songs:,} songs are loaded, {total.n_set_aside:,} set aside",
        metadata={"songs": total.n_songs, "loaded": total.n_loaded, "set aside": total.n_set_aside,
                  "missing": total.n_missing},
    )  # fmt: skip


@dg.asset_check(
    asset=song_embeddings_table,
    blocking=True,
    description="No vector of a sample is zero, not finite or of another size.",
)
def vectors_are_sound(
    postgres: PostgresResource, fireworks: FireworksResource, storage: StorageResource
) -> dg.AssetCheckResult:
    """Reads a sample of the table; every vector was checked before it was loaded."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        audit = audit_vectors(deployment.database, deployment.table_spec)
    return dg.AssetCheckResult(
        passed=not audit.bad_song_ids,
        description=f"{len(audit.bad_song_ids)} of {audit.n_sampled:,} sampled vectors are bad",
        metadata={"sampled": audit.n_sampled, "bad song_ids": str(audit.bad_song_ids[:20]),
                  "mean norm": round(audit.mean_norm, 6)},
    )  # fmt: skip


@dg.asset_check(asset=song_embeddings_table, blocking=True, description="All loaded ranges are of one model and size.")
def one_model(
    postgres: PostgresResource, fireworks: FireworksResource, storage: StorageResource
) -> dg.AssetCheckResult:
    """Reads the ledger."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        models = audit_models(deployment.database)
    expected = f"{deployment.settings.model} ({deployment.settings.embedding_dimensions})"
    return dg.AssetCheckResult(
        passed=list(models) == [expected],
        description=f"expected only {expected}, the ledger has {', '.join(models) or 'nothing'}",
        metadata={model: n_songs for model, n_songs in models.items()},  # noqa: C416 - dagster wants a mutable dict
    )


@dg.asset_check(
    asset=ivfflat_index, description="The index is valid, and used where the table is large enough for that."
)
def index_is_used(
    postgres: PostgresResource, fireworks: FireworksResource, storage: StorageResource
) -> dg.AssetCheckResult:
    """Asks the planner; a sequential scan of a small table is right."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        audit = audit_index(deployment.database, deployment.table_spec)
    return dg.AssetCheckResult(
        passed=audit.valid and (audit.used or not audit.should_be_used),
        description=audit.describe(),
        metadata={"valid": audit.valid, "used by the planner": audit.used, "rows": audit.n_rows},
    )


@dg.asset_check(asset=ivfflat_index, description="Searches find the target share of the true ten nearest songs.")
def recall_reaches_target(
    postgres: PostgresResource, fireworks: FireworksResource, storage: StorageResource
) -> dg.AssetCheckResult:
    """Takes what was measured after the build; measures anew where over a hundredth of the rows changed since."""
    with failing_clearly():
        deployment = open_deployment(postgres, fireworks, storage)
        target = deployment.settings.target_recall
        audit = audit_recall(deployment.database, deployment.cache, deployment.table_spec, target)
    measured: dict[str, float] = {}
    if audit.point is not None:
        measured = {"recall": audit.point.recall, "probes": audit.point.probes, "median ms": audit.point.ms_median}
    return dg.AssetCheckResult(
        passed=audit.reached, description=audit.describe(), metadata={**measured, "target": audit.target}
    )
