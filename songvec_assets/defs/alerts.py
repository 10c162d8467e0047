"""What a person is told of a failed run who does not look at the UI: which, why, what is kept, how to go on."""

import dagster as dg
import httpx2

from songvec_assets.errors import AlertError

_TIMEOUT_S = 10.0
_MAX_WORDS = 1_500


def describe_failed_run(context: dg.RunFailureSensorContext) -> str:
    """A message that can be acted on."""
    run = context.dagster_run
    reasons = [describe_failure(event) for event in context.get_step_failure_events()]
    words = "\n".join(reasons) or context.failure_event.message or "it failed before its first step"
    return (
        f"songvec: run {run.run_id[:8]} ({run.job_name}) failed.\n{words[:_MAX_WORDS]}\n"
        "What was done is kept and is not paid for again. When the cause is mended, open the run in Dagster and choose "
        "“From failure”, beside “Re-execute all”, or start the same command again."
    )


def describe_failure(event: dg.DagsterEvent) -> str:
    """A failed step in the words of its error."""
    data = event.step_failure_data
    words = data.user_failure_data.description if data.user_failure_data else None
    return f"{event.step_key}: {words or (data.error.to_string() if data.error else 'failed')}"


def post_alert(url: str, words: str) -> None:
    """Send a message to a webhook, as JSON with a `text`.

    Raises:
        AlertError: it did not take it. The URL is a secret, and not named.
    """
    try:
        response = httpx2.post(url, json={"text": words}, timeout=_TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AlertError(
            f"SONGVEC_WEBHOOK_URL could not be reached ({type(error).__name__}): is the address right, may this "
            "machine reach it?"
        ) from None
    if response.is_error:
        raise AlertError(
            f"SONGVEC_WEBHOOK_URL answered {response.status_code} to a message: it must take POST with a JSON `text`"
        )
