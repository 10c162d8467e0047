"""What starts runs without a person: conditions, the source's sensor, a nightly schedule; and alerts.

Runs spend money, so all but the alerts are stopped until somebody switches them on. Each run keeps to the run's and the
month's budget. When to add here: another way to start runs. Keep out: what a run does.
"""

from datetime import timedelta

import dagster as dg

from songvec_assets.defs.jobs import refresh_job
from songvec_assets.defs.resources import FireworksResource, PostgresResource, RunResource, StorageResource
from songvec_assets.defs.steps import failing_clearly
from songvec_assets.errors import AlertError
from songvec_assets.settings import RunSettings
from songvec_assets.songs.watch import look_at_source

AUTOMATION = "automation"
FRESHNESS = dg.FreshnessPolicy.time_window(warn_window=timedelta(hours=26), fail_window=timedelta(hours=50))
"""A nightly run may be late by two hours; two in a row may not fail."""
_ALERT_TIMEOUT_S = 10.0
_MAX_ALERT_CHARS = 1_500


class RangesBehind(dg.AutomationCondition[dg.AssetKey]):
    """The ranges whose songs are not all in the cache: read from the store, since Dagster knows only of runs."""

    def evaluate(self, context: dg.AutomationContext[dg.AssetKey]) -> dg.AutomationResult[dg.AssetKey]:
        """Read footers and manifests, if a partition is a candidate."""
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        run = RunResource(postgres=PostgresResource(), fireworks=FireworksResource(), storage=StorageResource())
        with run.open() as pipeline:
            keys = {
                song_range.key for song_range in pipeline.read_inventory(with_table=False, with_source=False).behind
            }
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(keys))


_FIRST_LOOK = dg.AutomationCondition.initial_evaluation()
_HANDLED = dg.AutomationCondition.newly_requested() | dg.AutomationCondition.newly_updated()
_NEWS = dg.AutomationCondition.any_deps_updated().since(_HANDLED)
# Dagster does not report what changed before it was switched on: at first, songs are exported and ranges checked once
_NEWS_OR_FIRST_LOOK = (dg.AutomationCondition.any_deps_updated() | _FIRST_LOOK).since(_HANDLED)
_QUIET = ~dg.AutomationCondition.any_deps_in_progress() & ~dg.AutomationCondition.in_progress()

WHEN_SONGS_CHANGED = (_NEWS_OR_FIRST_LOOK & _QUIET).with_label("songs changed in Postgres")
WHEN_RANGES_ARE_BEHIND = (_NEWS_OR_FIRST_LOOK & _QUIET & RangesBehind()).with_label("ranges whose songs changed")
WHEN_CACHE_CHANGED = (_NEWS & _QUIET).with_label("vectors were added")
WHEN_TABLE_CHANGED = (_NEWS & _QUIET & dg.AutomationCondition.all_deps_blocking_checks_passed()).with_label(
    "the table changed, and its vectors are valid"
)

automation_sensor = dg.AutomationConditionSensorDefinition(
    AUTOMATION,
    target=dg.AssetSelection.groups("songvec"),
    default_status=dg.DefaultSensorStatus.STOPPED,
    minimum_interval_seconds=30,
    # one condition reads the store, which the daemon cannot
    use_user_code_server=True,
    description=(
        "Keeps the table up to date: exports once when it is switched on and then when songs changed, embeds the "
        "ranges that changed, loads them, and indexes if that is worth it. Switch `songs_source` on too: it finds "
        "out whether songs changed. Spends money, up to SONGVEC_MAX_USD per run and SONGVEC_MAX_USD_A_MONTH."
    ),
)


@dg.sensor(
    name="songs_source",
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=(
        "Finds out each minute whether a song's text or id changed, and records it as an event of the asset `songs`, "
        "which `automation` acts on. Compares count and ids, and a digest of all texts if rows were written or the "
        "server does not count writes (views, foreign tables). A digest reads the whole table; digests take at most "
        "5 % of the time. Spends nothing."
    ),
)
def songs_source_sensor(context: dg.SensorEvaluationContext, run: RunResource) -> dg.SensorResult | dg.SkipReason:
    """See `look_at_source`."""
    with failing_clearly(), run.open() as pipeline:
        found = look_at_source(pipeline.source, context.cursor)
    state = found.look.state
    if not found.changed:
        context.update_cursor(found.look.dump())
        return dg.SkipReason(f"{found.note}: {state.describe()}")
    metadata = {"dagster/row_count": state.n_songs, "highest song_id": state.highest_id, "newest": state.newest or ""}
    event = dg.AssetMaterialization("songs", metadata=metadata, description=state.describe())
    return dg.SensorResult(asset_events=[event], cursor=found.look.dump())


nightly_schedule = dg.ScheduleDefinition(
    name="nightly",
    job=refresh_job,
    cron_schedule="0 3 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Runs the whole graph at 3:00 UTC, over all ranges that hold songs. Spends money.",
)


@dg.run_failure_sensor(
    name="failed_runs",
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Sends a message for each failed run to SONGVEC_WEBHOOK_URL; idle if that is not set.",
)
def failed_runs_sensor(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
    """One message per run."""
    with failing_clearly():
        url = RunSettings().webhook_url
        if not url:
            return dg.SkipReason("SONGVEC_WEBHOOK_URL is not set: no message is sent")
        post_alert(url, describe_failed_run(context))
    return None


def describe_failed_run(context: dg.RunFailureSensorContext) -> str:
    """Which run failed and why, what is kept, and how to continue."""
    run = context.dagster_run
    reasons = [describe_failure(event) for event in context.get_step_failure_events()]
    message = "\n".join(reasons) or context.failure_event.message or "it failed before its first step"
    return (
        f"songvec: run {run.run_id[:8]} ({run.job_name}) failed.\n{message[:_MAX_ALERT_CHARS]}\n"
        "What was done is kept and is not paid for again. When the cause is fixed, open the run in Dagster and choose "
        "“From failure”, next to “Re-execute all”, or start the same command again."
    )


def describe_failure(event: dg.DagsterEvent) -> str:
    """A failed step and the message of its error."""
    data = event.step_failure_data
    message = data.user_failure_data.description if data.user_failure_data else None
    return f"{event.step_key}: {message or (data.error.to_string() if data.error else 'failed')}"


def post_alert(url: str, message: str) -> None:
    """Send a message to a webhook, as JSON with a `text`.

    Raises:
        AlertError: the webhook refused it. Its URL is a secret, and not named.
    """
    import httpx2  # only a failed run needs it

    try:
        response = httpx2.post(url, json={"text": message}, timeout=_ALERT_TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AlertError(
            f"SONGVEC_WEBHOOK_URL could not be reached ({type(error).__name__}): is the address right, may this "
            "machine reach it?"
        ) from None
    if response.is_error:
        raise AlertError(
            f"SONGVEC_WEBHOOK_URL answered {response.status_code} to a message: it must take POST with a JSON `text`"
        )
