"""Runs a core function as a Dagster step: off the main thread, progress in the log, errors that people can read.

An interrupt (Ctrl+C, SIGTERM, SIGHUP, the UI's Terminate) reaches the main thread at once; the core is asked to end and
keeps what it has, and the log says how to continue. When to add here: what every step does. Keep out: what a step does.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import dagster as dg

from songvec_assets.cache.plan import FillReport
from songvec_assets.defs import reports
from songvec_assets.errors import SongvecError, StoppedError, describe
from songvec_assets.pipeline import Pipeline
from songvec_assets.progress import Progress, ProgressLines, run_in_worker
from songvec_assets.recorder import Recorder
from songvec_assets.reports import Step, continues_without
from songvec_assets.songs.reports import IncompleteExportError

Report = TypeVar("Report")
Result = TypeVar("Result")

Emit = Callable[[Any], None]

GRACE_S = 30.0
CONTINUE = (
    "The rest is done and kept: `songvec run` continues with it; in the UI, “Materialize” the assets downstream, up to "
    "ivfflat_index"
)

listener: ContextVar[Emit | None] = ContextVar("listener", default=None)
"""Called with what the steps of this process emit: `Progress`, the core's reports, `Incomplete`, results of checks.

`songvec` sets it to show progress as bars and to summarize the run; Dagster's log then has no lines of progress.
"""


@dataclass(frozen=True)
class Incomplete:
    """What a failed step leaves undone, if the steps after it can run without that.

    Attributes:
        reasons: keys of the ranges that are not complete, by reason; no keys if the reason names the range.
    """

    reasons: dict[str, list[str]]


def notify(item: object) -> None:
    """Pass an object to the listener, if there is one."""
    if (listen := listener.get()) is not None:
        listen(item)


@contextlib.contextmanager
def failing_clearly(
    find: Callable[[SongvecError], Incomplete | None] = lambda _: None,
) -> Iterator[None]:
    """Turn the core's errors into failures that show the message and are not retried: retrying alone rarely helps.

    Args:
        find: what the error leaves undone, if the steps after this one run without that; None: it ends the run.
    """
    try:
        yield
    except SongvecError as error:
        raise fail(describe(error), find(error)) from error


def finding_incomplete(step: Step, pipeline: Pipeline) -> AbstractContextManager[None]:
    """As `failing_clearly`, for a step whose error names the ranges that it left undone."""

    def find(error: SongvecError) -> Incomplete | None:
        if not continues_without(step, error, pipeline.is_swap):
            return None
        return Incomplete(error.reasons if isinstance(error, IncompleteExportError) else {describe(error): []})

    return failing_clearly(find)


def fail(message: str, incomplete: Incomplete | None) -> dg.Failure:
    """The failure of a step; the listener is notified of what is incomplete."""
    sentences = [message]
    if incomplete is not None:
        notify(incomplete)
        sentences.append(CONTINUE)
    return dg.Failure(". ".join(sentences), allow_retries=False)


def run_step(
    context: dg.AssetExecutionContext,
    pipeline: Pipeline,
    work: Callable[[Emit], Report],
    make_result: Callable[[Report], Result],
    on_report: Emit = lambda _: None,
) -> Result:
    """Run `work` in a worker thread, and pass on in the main thread what it emits and returns.

    Args:
        pipeline: what the work uses; it is cancelled on an interrupt.
        work: a core function's call; it gets the callback for progress and reports.
        make_result: from the work's report; called in the worker thread, too.
        on_report: called with every emitted object that is not `Progress`.

    Raises:
        Whatever the core raises; the interrupt, after the core had time to end.
    """
    write = context.log.info if listener.get() is None else lambda _: None
    log_progress = ProgressLines(write, context.log.warning)

    def receive(item: object) -> None:
        notify(item)
        if isinstance(item, Progress):
            log_progress(item)
        else:
            on_report(item)

    def run(emit: Emit) -> Result:
        report = work(emit)
        if report is not None:
            emit(report)
        return make_result(report)

    kept = (
        f"What was done is kept in {pipeline.storage.location} and in {pipeline.database.describe()}, and is "
        "not paid for again: “From failure”, next to “Re-execute all”, or the same command, continues from there."
    )
    try:
        context.log.info(pipeline.describe())
        return run_in_worker(run, report=receive, stop=pipeline.cancel, grace_s=GRACE_S)
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        context.log.warning(f"Interrupted. {kept}")
        raise
    except Exception:
        context.log.error(f"Failed. {kept}")
        raise


def budget_of(run: dg.DagsterRun) -> str:
    """The name of a run's budget: the runs of a backfill share one."""
    return run.tags.get("dagster/backfill", run.run_id)


def reembed_request_of(run: dg.DagsterRun) -> str:
    """What identifies a request to re-embed: a run's re-executions are the same request, and pay for nothing again."""
    names = (run.tags.get(tag) for tag in ("dagster/root_backfill_id", "dagster/backfill"))
    return next(filter(None, names), None) or run.root_run_id or run.run_id


def launched_keys(context: dg.AssetExecutionContext) -> list[str] | None:
    """The partitions that a run was launched for; None: it was launched without."""
    launched = context.has_partition_key or context.has_partition_key_range
    return list(context.partition_keys) if launched else None


class FillRecorder:
    """Records each range of a run as it finishes: if it changed, its event is durable even if the run fails later."""

    def __init__(self, context: dg.AssetExecutionContext, pipeline: Pipeline) -> None:
        self._context = context
        self._pipeline = pipeline
        self._recorder = Recorder(pipeline)
        self._reports: list[FillReport] = []

    def record(self, report: FillReport) -> None:
        """Materialize a range that is complete; remember one that is not."""
        self._reports.append(report)
        self._recorder.count([report])
        key, context = report.range.key, self._context
        if report.error is not None:
            context.log.error(f"{key} is not complete: {describe(report.error)}")
            return
        metadata = reports.describe_fill(report, self._pipeline.cache)
        is_launched = launched_keys(context) is not None
        # nothing was done in a range that was complete: the event at the end says it, too, and each costs four syncs
        if report.seconds or not is_launched:
            context.log_event(dg.AssetMaterialization(asset_key=context.asset_key, partition=key, metadata=metadata))
        # the end of a run writes another event for each partition it was launched for, which would hide this one
        if is_launched:
            context.add_asset_metadata(metadata, partition_key=key)

    def log_total(self) -> None:
        """Log the totals of the run, complete or not: every answer counted here is kept."""
        self._context.log.info(reports.describe_fills(self._reports))

    def conclude(self) -> None:
        """Set the version of all that is cached; raise a failure if ranges are not complete.

        Raises:
            dg.Failure: names them.
        """
        self._context.set_data_version(self._context.asset_key, dg.DataVersion(self._pipeline.cache.digest()))
        if failed := {each.range.key: each.error for each in self._reports if each.error is not None}:
            named = "; ".join(f"{key}: {describe(error)}" for key, error in [*failed.items()][:5])
            incomplete = self._find_incomplete(next(iter(failed.values())), {})
            raise fail(f"{len(failed)} of {len(self._reports)} ranges are not complete: {named}", incomplete)
        self._recorder.succeed(None)

    def find_incomplete(self, error: SongvecError) -> Incomplete | None:
        """What is incomplete if an error ended the step: what was embedded before can be loaded."""
        return self._find_incomplete(error, {describe(error): []})

    def _find_incomplete(self, error: Exception, reasons: dict[str, list[str]]) -> Incomplete | None:
        is_continued = continues_without("embed", error, self._pipeline.is_swap)
        if not is_continued or not any(map(reports.count_vectors, self._reports)):
            return None
        for each in self._reports:
            if each.error is not None:
                # a range that was stopped because another failed
                reason = error if isinstance(each.error, StoppedError) else each.error
                reasons.setdefault(describe(reason), []).append(each.range.key)
        return Incomplete(reasons)
