"""A core function as a step: its errors, what it leaves incomplete, and who shares a budget."""

from typing import Any

import dagster as dg
import pytest

from songvec_assets.defs import steps
from songvec_assets.defs.steps import CONTINUE, Incomplete, failing_clearly, finding_incomplete, listener, run_step
from songvec_assets.errors import DamagedCacheError, ProviderError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.progress import Progress


@pytest.fixture
def heard() -> Any:
    """What the steps of this test emit."""
    items: list[object] = []
    token = listener.set(items.append)
    yield items
    listener.reset(token)


def test_an_error_of_ours_fails_the_step_with_its_words_and_code_and_is_not_retried(heard: list[object]) -> None:
    with pytest.raises(dg.Failure) as failed, failing_clearly():
        raise ProviderError("the key is wrong", "provider.key-refused")
    assert failed.value.description == "the key is wrong [provider.key-refused]"
    assert not failed.value.allow_retries
    assert heard == []
    with pytest.raises(ZeroDivisionError), failing_clearly():
        1 / 0  # noqa: B018 - an error that is not ours


def test_what_the_steps_after_it_can_do_without_is_told_to_who_listens(pipeline: Pipeline, heard: list[object]) -> None:
    with pytest.raises(dg.Failure) as failed, finding_incomplete("load", pipeline):
        raise DamagedCacheError("range a is damaged")
    assert str(failed.value.description).endswith(CONTINUE)
    assert heard == [Incomplete({"range a is damaged [cache.damaged]": []})]
    with pytest.raises(dg.Failure) as failed, finding_incomplete("load", pipeline):
        raise StoreError("another database's")
    assert not str(failed.value.description).endswith(CONTINUE)
    assert len(heard) == 1


def test_runs_of_a_backfill_share_a_budget_and_re_executions_a_request_to_re_embed() -> None:
    alone = dg.DagsterRun("refresh", run_id="a")
    again = dg.DagsterRun("refresh", run_id="b", root_run_id="a", parent_run_id="a")
    backfill = dg.DagsterRun("refresh", run_id="c", tags={"dagster/backfill": "x"})
    retried = dg.DagsterRun("refresh", run_id="d", tags={"dagster/backfill": "y", "dagster/root_backfill_id": "x"})
    assert [steps.budget_of(each) for each in (alone, again, backfill, retried)] == ["a", "b", "x", "y"]
    assert [steps.reembed_request_of(each) for each in (alone, again, backfill, retried)] == ["a", "a", "x", "x"]


def test_a_step_emits_its_progress_and_its_report_and_returns_what_that_becomes(
    pipeline: Pipeline, heard: list[object]
) -> None:
    progress, kept = Progress("embed songs", 1, 2, "songs"), list[object]()

    def work(emit: steps.Emit) -> str:
        emit(progress)
        emit("a range")
        return "report"

    context = dg.build_asset_context()
    assert run_step(context, pipeline, work, str.upper, kept.append) == "REPORT"
    assert heard == [progress, "a range", "report"]
    assert kept == ["a range", "report"], "progress is for the log"


def test_an_interrupt_cancels_the_work_and_says_how_to_go_on(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    def report(_: object) -> None:
        raise KeyboardInterrupt

    def work(emit: steps.Emit) -> None:
        emit("begun")
        while not pipeline.stop.is_set():
            pass

    with pytest.raises(KeyboardInterrupt):
        run_step(dg.build_asset_context(), pipeline, work, lambda _: None, report)
    assert "Interrupted. What was done is kept in" in capfd.readouterr().err
