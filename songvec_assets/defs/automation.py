"""Jobs. Sensors and schedules spend money: whatever is added here starts stopped."""

import dagster as dg

refresh_job = dg.define_asset_job(
    "refresh",
    selection=dg.AssetSelection.all(),
    description="Export, embed, load and index: every step does what changed, and nothing else.",
)
