"""What runs by itself, once a person has switched it on: conditions, a look at the source, a night's run, alerts.

All of it but the alerts spends money, so it starts stopped. Each run keeps to the run's and the month's budget.
"""

from datetime import timedelta

import dagster as dg

from songvec_assets.defs.alerts import describe_failed_run, post_alert
from songvec_assets.defs.jobs import refresh_job
from songvec_assets.defs.resources import FireworksResource, PostgresResource, RunResource, StorageResource
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.settings import RunSettings
from songvec_assets.songs.watch import SourceState, look_at_source

AUTOMATION = "automation"
FRESHNESS = dg.FreshnessPolicy.time_window(warn_window=timedelta(hours=26), fail_window=timedelta(hours=50))
"""A night's run may be late by two hours; two in a row may not fail."""


class RangesBehind(dg.AutomationCondition[dg.AssetKey]):
    """The ranges whose snapshot is not answered in full by the cache: looked up, where Dagster only knows runs."""

    def evaluate(self, context: dg.AutomationContext[dg.AssetKey]) -> dg.AutomationResult[dg.AssetKey]:
        """Look at footers and marks, where anything asks for it."""
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        run = RunResource(postgres=PostgresResource(), fireworks=FireworksResource(), storage=StorageResource())
        with run.open() as deployment:
            keys = {song_range.key for song_range in deployment.ranges_behind()}
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(keys))


_FIRST_LOOK = dg.AutomationCondition.initial_evaluation()
_HANDLED = dg.AutomationCondition.newly_requested() | dg.AutomationCondition.newly_updated()
_NEWS = dg.AutomationCondition.any_deps_updated().since(_HANDLED)
# what changed before the first look is no news to Dagster: then the songs are exported, and ranges looked at, once
_NEWS_OR_FIRST_LOOK = (dg.AutomationCondition.any_deps_updated() | _FIRST_LOOK).since(_HANDLED)
_QUIET = ~dg.AutomationCondition.any_deps_in_progress() & ~dg.AutomationCondition.in_progress()

WHEN_SONGS_CHANGED = (_NEWS_OR_FIRST_LOOK & _QUIET).with_label("songs changed in Postgres")
WHEN_RANGES_ARE_BEHIND = (_NEWS_OR_FIRST_LOOK & _QUIET & RangesBehind()).with_label("ranges whose songs changed")
WHEN_CACHE_CHANGED = (_NEWS & _QUIET).with_label("vectors were added")
WHEN_TABLE_CHANGED = (_NEWS & _QUIET & dg.AutomationCondition.all_deps_blocking_checks_passed()).with_label(
    "the table changed, and its vectors are sound"
)

automation_sensor = dg.AutomationConditionSensorDefinition(
    AUTOMATION,
    target=dg.AssetSelection.groups("songvec"),
    default_status=dg.DefaultSensorStatus.STOPPED,
    minimum_interval_seconds=30,
    # one condition asks the store, which the daemon cannot
    use_user_code_server=True,
    description=(
        "Exports once when it is switched on and then when songs changed, embeds the ranges that changed, loads them, "
        "indexes where that is worth it. Switch `songs_source` on too: it is what sees that songs changed. Spends "
        "money, within SONGVEC_MAX_USD a run and SONGVEC_MAX_USD_A_MONTH."
    ),
)


@dg.sensor(
    name="songs_source",
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=(
        "Looks every minute whether a song's text or id changed: by count and ids, and by a digest of all texts where "
        "rows were written, or where the server does not count writes (views, foreign tables). A digest reads the "
        "whole table, for a twentieth of the time at most. Records a change as an event of the asset `songs`; what "
        "follows is up to `automation`."
    ),
)
def songs_source_sensor(context: dg.SensorEvaluationContext, run: RunResource) -> dg.SensorResult | dg.SkipReason:
    """See `look_at_source`."""
    with failing_clearly(), run.open() as deployment:
        look, quiet = look_at_source(deployment.database, deployment.source, context.cursor)
    if quiet:
        context.update_cursor(look.dump())
        return dg.SkipReason(f"{quiet}: {look.state.describe()}")
    return dg.SensorResult(asset_events=[_observe(look.state)], cursor=look.dump())


def _observe(state: SourceState) -> dg.AssetMaterialization:
    metadata = {"dagster/row_count": state.n_songs, "highest song_id": state.highest_id, "newest": state.newest or ""}
    return dg.AssetMaterialization("songs", metadata=metadata, description=state.describe())


nightly_schedule = dg.ScheduleDefinition(
    name="nightly",
    job=refresh_job,
    cron_schedule="0 3 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="The whole graph at three in the morning (UTC), over all ranges that hold songs. Spends money.",
)


@dg.run_failure_sensor(
    name="failed_runs",
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells SONGVEC_WEBHOOK_URL of each run that failed, in words; idle where that is not set.",
)
def failed_runs_sensor(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
    """One message a run."""
    with failing_clearly():
        url = RunSettings().webhook_url
        if not url:
            return dg.SkipReason("SONGVEC_WEBHOOK_URL is not set: nobody is told")
        post_alert(url, describe_failed_run(context))
    return None
