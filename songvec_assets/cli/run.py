"""A job without the UI: run in this process and the project's Dagster instance, summed up in a few rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from songvec_assets.defs.alerts import describe_failure
from songvec_assets.defs.instance import open_instance, origin_of
from songvec_assets.defs.reports import read_incomplete
from songvec_assets.songs.ranges import SongIdRange

_PARTITIONED = dg.AssetKey("embedding_cache")


@dataclass
class AssetRow:
    """What a run did to one asset; None where a figure does not apply."""

    asset: str
    rows: int = 0
    seconds: float = 0.0
    tokens: int | None = None
    usd: float | None = None
    new: int | None = None
    changed: int | None = None
    unchanged: int | None = None

    def cells(self) -> Iterator[str]:
        """The figures as text, in the table's order."""
        yield f"{self.rows:,}"
        yield f"{self.seconds:.2f}"
        yield "" if self.tokens is None else f"{self.tokens:,}"
        yield "" if self.usd is None else f"${self.usd:,.4f}"
        for count in (self.unchanged, self.new, self.changed):
            yield "" if count is None else f"{count:,}"


@dataclass
class RunResult:
    """A run's end.

    Attributes:
        rows: one an asset, in the graph's order.
        warnings: of checks that did not pass.
        answers: of checks that did.
        failures: in the words of what failed.
        incomplete: ranges that are not complete, by the reason; the run went on without them. Neither these nor
            failures: the run succeeded.
        n_set_aside: songs without a vector, for a named reason.
        comparison: of a table that was swapped in with the one before; empty where none was.
    """

    rows: list[AssetRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    incomplete: dict[str, list[str]] = field(default_factory=dict)
    n_set_aside: int = 0
    comparison: str = ""


def run_job(
    job: dg.JobDefinition,
    span: tuple[SongIdRange, SongIdRange] | None = None,
    resources: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunResult:
    """Run a job of the project. Where a step fails for some ranges, the steps after it run without them.

    Dagster would skip them: a step of many partitions either succeeds for all of them or fails.

    Args:
        job: which.
        span: first and last range, where it embeds.
        resources: fields that win over the settings, by resource.

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
    events: list[dg.DagsterEvent] = []
    selected: list[dg.AssetKey] | None = None
    with open_instance() as instance:
        while selected is None or selected:
            if selected and _PARTITIONED not in selected:
                tags = {}
            try:
                run = _execute(job, instance, config, tags, selected)
            except dg.DagsterExecutionInterruptedError as error:
                raise KeyboardInterrupt from error
            # of the instance: the result lacks what a step that failed had recorded of single ranges
            logged = [each.dagster_event for each in instance.all_logs(run.run_id) if each.dagster_event]
            if any(_is_interrupt(event) for event in logged):
                raise KeyboardInterrupt
            events += logged
            selected = _find_rest(job, logged)
    return _summarize(events)


def _execute(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    selected: Sequence[dg.AssetKey] | None,
) -> dg.DagsterRun:
    """Run a job in this process. Unlike `execute_in_process` the run has an origin: the UI lists it under its job."""
    run = instance.create_run_for_job(
        job.get_subset(asset_selection=frozenset(selected)) if selected else job,
        run_config=config,
        tags={**job.run_tags, **tags},
        asset_selection=frozenset(selected) if selected else None,
        remote_job_origin=origin_of(job),
    )
    execute_run(InMemoryJob(job), run, instance)
    return run


def _find_rest(job: dg.JobDefinition, events: Sequence[dg.DagsterEvent]) -> list[dg.AssetKey]:
    """The assets after one that failed for some ranges only; empty: there is nothing to go on with."""
    partial = [event.step_key for event in events if read_incomplete(event) is not None]
    layer = job.asset_layer
    ordered = [key for key in layer.asset_graph.toposorted_asset_keys if key in layer.selected_asset_keys]
    names = [key.to_user_string() for key in ordered]
    return ordered[names.index(partial[0]) + 1 :] if partial and partial[0] in names else []


def _summarize(events: Sequence[dg.DagsterEvent]) -> RunResult:
    result = RunResult()
    rows: dict[str, AssetRow] = {}
    seconds: dict[str, float] = {}
    latest: dict[tuple[str, str | None], Mapping[str, Any]] = {}
    for event in events:
        if event.is_step_success and event.step_key:
            seconds[event.step_key] = event.step_success_data.duration_ms / 1000
        elif event.is_step_materialization:
            materialization = event.step_materialization_data.materialization
            values = {name: value.value for name, value in materialization.metadata.items()}
            latest[materialization.asset_key.to_user_string(), materialization.partition] = values
        elif event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            check = event.asset_check_evaluation_data
            if check.passed:
                result.answers.append(f"{check.check_name}: {check.description}")
            else:
                result.warnings.append(f"Check {check.check_name} did not pass: {check.description}")
        elif (incomplete := read_incomplete(event)) is not None:
            for reason, keys in incomplete.reasons.items():
                result.incomplete.setdefault(reason, []).extend(keys)
            if incomplete.figures:
                latest[str(event.step_key), None] = incomplete.figures
        elif event.is_step_failure:
            result.failures.append(describe_failure(event))
    for (asset, _), metadata in latest.items():
        counted = {"embedding_cache": "songs set aside", "songs_parquet": "songs out of reach"}.get(asset)
        result.n_set_aside += metadata.get(counted, 0) if counted else 0
        result.comparison = metadata.get("comparison", result.comparison)
        _add(rows.setdefault(asset, AssetRow(asset, seconds=seconds.get(asset, 0.0))), metadata)
    result.rows = list(rows.values())
    return result


def _is_interrupt(event: dg.DagsterEvent) -> bool:
    error = event.step_failure_data.error if event.is_step_failure else None
    return error is not None and error.cls_name == dg.DagsterExecutionInterruptedError.__name__


def _add(row: AssetRow, metadata: Mapping[str, Any]) -> None:
    row.rows += metadata.get("dagster/row_count", metadata.get("dagster/partition_row_count", 0))
    for name, key in {
        "tokens": "tokens", "usd": "usd", "new": "songs new", "changed": "songs changed",
        "unchanged": "songs unchanged",
    }.items():  # fmt: skip
        if key in metadata:
            setattr(row, name, (getattr(row, name) or 0) + metadata[key])
