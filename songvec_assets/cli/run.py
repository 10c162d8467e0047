"""Runs a job without the UI, in this process and the project's Dagster instance, and prints its outcome.

When to add here: another way to run a job, another line about a run. Keep out: tables (`render`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from songvec_assets.cache.plan import FillReport
from songvec_assets.cli.render import describe_incomplete_run, run_table
from songvec_assets.cli.terminal import fail, interruptible, out, say, showing_progress
from songvec_assets.definitions import defs
from songvec_assets.defs.automation import describe_failure
from songvec_assets.defs.checks import CheckResult
from songvec_assets.defs.instance import open_instance, origin_of
from songvec_assets.defs.steps import Incomplete, listener
from songvec_assets.errors import SongvecError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.extension import read_pgvector_caution
from songvec_assets.progress import Progress
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.reports import ExportReport
from songvec_assets.vectors.swap import LoadReport

Report = TypeVar("Report")

_PARTITIONED = dg.AssetKey("embedding_cache")


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        reports: what its steps emitted: the core's reports, `Incomplete`, results of checks.
        seconds: of each step that succeeded, by name.
        failures: messages of what failed. Empty, with nothing incomplete: the run succeeded.
    """

    reports: list[object] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def of(self, kind: type[Report]) -> list[Report]:
        """The reports of a kind, in order."""
        return [each for each in self.reports if isinstance(each, kind)]

    @property
    def incomplete(self) -> dict[str, list[str]]:
        """Keys of ranges that are not complete, by reason; the run continued without them."""
        merged: dict[str, list[str]] = {}
        for each in self.of(Incomplete):
            for reason, keys in each.reasons.items():
                merged.setdefault(reason, []).extend(keys)
        return merged


def run_job(
    job: dg.JobDefinition,
    span: tuple[SongIdRange, SongIdRange] | None = None,
    resources: Mapping[str, Mapping[str, Any]] | None = None,
    show: Callable[[Progress], None] = lambda _: None,
) -> RunResult:
    """Run a job of the project. If a step fails for some ranges only, the steps after it run without them.

    Dagster would skip them: a step of several partitions either succeeds for all of them or fails.

    Args:
        span: first and last range, if it embeds.
        resources: fields that override the settings, by resource.

    Raises:
        KeyboardInterrupt: Ctrl+C, SIGTERM or SIGHUP; what was done is kept.
    """
    config: dict[str, Any] = {
        "resources": {name: {"config": dict(given)} for name, given in (resources or {}).items() if given},
        "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
    }
    tags = {} if span is None else {
        "dagster/asset_partition_range_start": span[0].key, "dagster/asset_partition_range_end": span[1].key
    }  # fmt: skip
    result = RunResult()
    keys = [
        key for key in job.asset_layer.asset_graph.toposorted_asset_keys if key in job.asset_layer.selected_asset_keys
    ]
    selected: list[dg.AssetKey] | None = None
    token = listener.set(lambda item: show(item) if isinstance(item, Progress) else result.reports.append(item))
    try:
        with open_instance() as instance:
            while selected is None or selected:
                if selected and _PARTITIONED not in selected:
                    tags = {}
                n_incomplete = len(result.of(Incomplete))
                failed = _execute(job, instance, config, tags, selected, result)
                if len(result.of(Incomplete)) == n_incomplete:
                    result.failures += map(describe_failure, failed)
                    break
                selected = keys[[key.to_user_string() for key in keys].index(str(failed[0].step_key)) + 1 :]
    finally:
        listener.reset(token)
    return result


def _execute(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    selected: list[dg.AssetKey] | None,
    result: RunResult,
) -> list[dg.DagsterEvent]:
    """Run a job in this process; returns the steps that failed.

    Unlike a run of `execute_in_process`, this run has an origin, so the UI lists it under its job.
    """
    try:
        run = instance.create_run_for_job(
            job.get_subset(asset_selection=frozenset(selected)) if selected else job,
            run_config=config,
            tags={**job.run_tags, **tags},
            asset_selection=frozenset(selected) if selected else None,
            remote_job_origin=origin_of(job),
        )
        events = execute_run(InMemoryJob(job), run, instance).all_events
    except dg.DagsterExecutionInterruptedError as error:
        raise KeyboardInterrupt from error
    for event in events:
        if event.is_step_success:
            result.seconds[str(event.step_key)] = event.step_success_data.duration_ms / 1000
    failed = [event for event in events if event.is_step_failure]
    for event in failed:
        cause = event.step_failure_data.error
        if cause is not None and cause.cls_name == dg.DagsterExecutionInterruptedError.__name__:
            raise KeyboardInterrupt
    return failed


def run_and_print(
    job: str,
    pipeline: Pipeline,
    span: tuple[SongIdRange, SongIdRange] | None = None,
    resources: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunResult:
    """Run a job with its progress shown, and print a summary; a run that failed or is incomplete ends the command."""
    say(pipeline.describe())
    with interruptible(), showing_progress() as show:
        result = run_job(defs.resolve_job_def(job), span, resources, show)
    table = run_table(result, out.width)
    if table.row_count:
        out.print(table)
    for line in _describe_outcome(result):
        say(line)
    warnings = [
        f"Check {each.check} did not pass: {each.finding.message}"
        for each in result.of(CheckResult)
        if not each.finding.passed
    ]
    compared = [load.comparison.quality for load in result.of(LoadReport) if load.comparison]
    warnings += [quality.warning for quality in compared if quality]
    for warning in filter(None, [*warnings, read_pgvector_caution(pipeline.database)]):
        say(warning, style="yellow")
    if result.incomplete:
        fail("\n".join([*result.failures, _describe_incomplete(result, pipeline, job)]))
    if result.failures:
        fail("\n".join(result.failures))
    return result


def _describe_outcome(result: RunResult) -> list[str]:
    lines = [f"Swapped in: {each.comparison.describe()}." for each in result.of(LoadReport) if each.comparison]
    n_rejected = sum(each.n_rejected for each in result.of(FillReport))
    n_rejected += sum(sum(each.unreachable.values()) for each in result.of(ExportReport))
    if n_rejected:
        lines.append(f"Rejected: {n_rejected:,} songs; `songvec status` shows which and why.")
    return lines


def _describe_incomplete(result: RunResult, pipeline: Pipeline, job: str) -> str:
    try:
        status = pipeline.status()
    except SongvecError:  # why the run failed matters more
        status = None
    return describe_incomplete_run(result, status, loads=job != "embed")
