"""The code location: nouns listed, no logic."""

import dagster as dg

from songvec_assets.defs.assets import embedding_cache, ivfflat_index, song_embeddings_table, songs_parquet
from songvec_assets.defs.automation import refresh_job, rollback_job, swap_job
from songvec_assets.defs.checks import coverage, index_is_used, one_model, recall_reaches_target, vectors_are_sound
from songvec_assets.defs.resources import FireworksResource, PostgresResource, StorageResource

defs = dg.Definitions(
    assets=[songs_parquet, embedding_cache, song_embeddings_table, ivfflat_index],
    asset_checks=[coverage, vectors_are_sound, one_model, index_is_used, recall_reaches_target],
    jobs=[refresh_job, swap_job, rollback_job],
    resources={
        "postgres": PostgresResource(),
        "fireworks": FireworksResource(),
        "storage": StorageResource(),
    },
    # the graph is a line and every step is parallel inside; a process a step costs 10 s and halves the memory bound
    executor=dg.in_process_executor,
)
