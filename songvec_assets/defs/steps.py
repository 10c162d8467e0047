"""Runs a core function as a Dagster step: off the main thread, with progress in the log, and errors people can read.

An interrupt (Ctrl+C, SIGTERM, SIGHUP, the UI's Terminate) reaches the main thread at once; the core is asked to end,
keeps what it has, and the log says how to go on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import dagster as dg

from songvec_assets.cache.plan import FillReport
from songvec_assets.defs.pace import Pace, describe_progress
from songvec_assets.defs.reports import Incomplete, Metadata, describe_fill, describe_incomplete
from songvec_assets.deployment import Deployment
from songvec_assets.errors import BudgetExceededError, DamagedShardError, ProviderError, SongvecError, StoppedError
from songvec_assets.progress import Progress, run_in_worker
from songvec_assets.songs.export import IncompleteExportError

Result = TypeVar("Result")

Emit = Callable[[Any], None]

LOG_EVERY_S = 5.0
GRACE_S = 30.0

GO_ON_WITHOUT = (
    "The rest is done and kept: `songvec run` goes on with it; in the UI, “Materialize” the assets downstream, up to "
    "ivfflat_index"
)

show_progress: ContextVar[Callable[[Progress], None] | None] = ContextVar("show_progress", default=None)
"""Where `songvec` shows progress instead of Dagster's log: a terminal has bars."""


def _describe_partial(error: SongvecError) -> Metadata:
    """What an error says of the ranges that failed, where the others are done; empty where it ends everything."""
    if isinstance(error, IncompleteExportError) and error.is_partial:
        return describe_incomplete(Incomplete(error.reasons))
    # the range is named in its words
    return describe_incomplete(Incomplete({str(error): []})) if isinstance(error, DamagedShardError) else {}


@contextlib.contextmanager
def failing_clearly(describe: Callable[[SongvecError], Metadata] = _describe_partial) -> Iterator[None]:
    """Turn the core's errors into failures that show their words, and are not retried: a rerun alone rarely helps.

    Args:
        describe: gives `describe_incomplete` of an error that leaves something to go on with, else nothing.
    """
    try:
        yield
    except SongvecError as error:
        metadata = describe(error)
        words = f"{error}. {GO_ON_WITHOUT}" if metadata else str(error)
        raise dg.Failure(words, metadata=metadata, allow_retries=False) from error


class StepContext(Protocol):
    """What a step needs of Dagster's context."""

    @property
    def log(self) -> Any:
        """The run's log."""


def run_step(
    context: StepContext,
    deployment: Deployment,
    work: Callable[[Emit], Result],
    on_report: Callable[[Any], None] | None = None,
) -> Result:
    """Run `work` with progress, interrupts and errors taken care of.

    Args:
        context: of the asset.
        deployment: what the work uses; it is cancelled on an interrupt.
        work: a core function's call; it gets the callback for progress and reports.
        on_report: told, in the main thread, what the work emits beside Progress.

    Raises:
        Whatever the core raises; the interrupt, after the core had time to end.
    """
    listener = _ProgressLog(context)

    def report(item: object) -> None:
        if isinstance(item, Progress):
            listener(item)
        elif on_report is not None:
            on_report(item)

    try:
        context.log.info(deployment.describe())
        return run_in_worker(work, report=report, stop=deployment.cancel, grace_s=GRACE_S)
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        context.log.warning(f"Interrupted. {_how_to_go_on(deployment)}")
        raise
    except Exception:
        context.log.error(f"Failed. {_how_to_go_on(deployment)}")
        raise


def _how_to_go_on(deployment: Deployment) -> str:
    return (
        f"What was done is kept in {deployment.storage_root.resolve()} and in {deployment.database.describe()}, and is "
        "not paid for again: “From failure”, beside “Re-execute all”, or the same command, goes on from there."
    )


def budget_of(run: dg.DagsterRun) -> str:
    """Whose budget a run spends: its backfill's, where it is one of many, or its own."""
    return run.tags.get("dagster/backfill", run.run_id)


def asked_anew_by(run: dg.DagsterRun) -> str:
    """Who asks that songs be embedded again: a run's re-executions do not ask anew."""
    names = (run.tags.get(tag) for tag in ("dagster/root_backfill_id", "dagster/backfill"))
    return next(filter(None, names), None) or run.root_run_id or run.run_id


def launched_keys(context: dg.AssetExecutionContext) -> list[str] | None:
    """The partitions that a run was launched for; None: it was launched without."""
    launched = context.has_partition_key or context.has_partition_key_range
    return list(context.partition_keys) if launched else None


class _ProgressLog:
    """Thins progress out to a line every few seconds, with rate and time left; and trouble to a warning as often."""

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._pace = Pace()
        self._next = self._next_warning = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.is_trouble and now >= self._next_warning:
            self._next_warning = now + LOG_EVERY_S
            self._context.log.warning(progress.note)
        shown = show_progress.get()
        if shown is not None:
            shown(progress)
            return
        rate = self._pace.rate(progress)
        if now >= self._next:
            self._next = now + LOG_EVERY_S
            self._context.log.info(describe_progress(progress, rate))


class FillRecorder:
    """Records each range of a run as it finishes: its event is durable at once, whatever becomes of the run."""

    def __init__(self, context: dg.AssetExecutionContext, deployment: Deployment) -> None:
        self._context = context
        self._deployment = deployment
        self._failed: dict[str, Exception] = {}
        self._reports: list[FillReport] = []

    def record(self, report: FillReport) -> None:
        """Materialize a range that is complete; remember one that is not."""
        self._reports.append(report)
        key = report.range.key
        if report.error is not None:
            self._failed[key] = report.error
            self._context.log.error(f"{key} is not complete: {report.error}")
            return
        cache = self._deployment.cache
        metadata = describe_fill(report, cache.storage.describe(report.range.key), cache.model)
        self._context.log_event(
            dg.AssetMaterialization(asset_key=self._context.asset_key, partition=key, metadata=metadata)
        )
        # the end of a run writes an event of its own for each partition it was launched for, which would hide this one
        if launched_keys(self._context) is not None:
            self._context.add_asset_metadata(metadata, partition_key=key)

    def log_total(self) -> None:
        """Say what the run came to, whatever became of it: each answer that is counted here is kept."""
        done = self._reports
        self._context.log.info(
            f"{sum(each.n_embedded for each in done):,} songs embedded in {len(done):,} ranges, "
            f"{sum(each.n_rejected for each in done):,} set aside; {sum(each.n_tokens for each in done):,} tokens, "
            f"${sum(each.usd for each in done):,.4f} as billed; {sum(each.n_retries for each in done):,} retries, "
            f"{sum(each.n_limited for each in done):,} of them after 429"
        )

    def conclude(self) -> None:
        """End the step: with the version of all that is cached, or a failure that names the ranges not complete."""
        self._context.set_data_version(self._context.asset_key, dg.DataVersion(self._deployment.cache.digest()))
        if self._failed:
            named = "; ".join(f"{key}: {error}" for key, error in list(self._failed.items())[:5])
            raise dg.Failure(
                f"{len(self._failed)} of {len(self._reports)} ranges are not complete. {GO_ON_WITHOUT}. {named}",
                metadata=self._describe_incomplete(),
                allow_retries=False,
            )

    def describe_stop(self, error: SongvecError) -> Metadata:
        """See `failing_clearly`: the end of a budget, or of a provider, leaves what was embedded before."""
        is_partial = isinstance(error, (BudgetExceededError, ProviderError))
        return self._describe_incomplete(error) if is_partial else {}

    def _describe_incomplete(self, stop: SongvecError | None = None) -> Metadata:
        """The ranges that are not complete, where something can be loaded without them; else nothing."""
        n_vectors = sum(map(_count_vectors, self._reports))
        deployment = self._deployment
        serving = deployment.table.spec
        # another model's table would be built and indexed, and then refused for what it lacks
        is_swap = deployment.settings.swap and serving not in (None, deployment.table_spec)
        if not n_vectors or is_swap:
            return {}
        reasons: dict[str, list[str]] = {}
        for key, error in self._failed.items():
            # ranges that others took with them
            reason = stop if stop and isinstance(error, StoppedError) else error
            reasons.setdefault(str(reason), []).append(key)
        if stop:
            reasons.setdefault(str(stop), [])
        rest = [each for each in self._reports if each.error is not None]
        figures = {
            "dagster/partition_row_count": sum(map(_count_vectors, rest)),
            "tokens": sum(each.n_tokens for each in rest),
            "usd": sum(each.usd for each in rest),
        }
        return describe_incomplete(Incomplete(reasons, figures))


def _count_vectors(report: FillReport) -> int:
    """Songs that have their vector, whether the range is complete or not."""
    return report.n_unchanged + report.n_reused + report.n_embedded
