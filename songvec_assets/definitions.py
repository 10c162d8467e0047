"""The code location: what Dagster loads. When to add here: another definition. Keep out: logic."""

import dagster as dg

from songvec_assets.defs.assets import embedding_cache, ivfflat_index, song_embeddings_table, songs, songs_parquet
from songvec_assets.defs.automation import automation_sensor, failed_runs_sensor, nightly_schedule, songs_source_sensor
from songvec_assets.defs.checks import index_checks, table_checks
from songvec_assets.defs.jobs import (
    dry_run_job,
    embed_job,
    load_job,
    rebuild_index_job,
    refresh_job,
    rollback_job,
    swap_job,
    verify_job,
)
from songvec_assets.defs.resources import RESOURCES

defs = dg.Definitions(
    assets=[songs, songs_parquet, embedding_cache, song_embeddings_table, ivfflat_index],
    asset_checks=[table_checks, index_checks],
    jobs=[refresh_job, embed_job, load_job, rebuild_index_job, swap_job, rollback_job, verify_job, dry_run_job],
    sensors=[automation_sensor, songs_source_sensor, failed_runs_sensor],
    schedules=[nightly_schedule],
    resources=RESOURCES,
    # the graph is a line and every step is parallel inside; a process per step costs 10 s and doubles the memory
    executor=dg.in_process_executor,
)
