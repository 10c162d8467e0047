"""A job run in this process: what its steps emit is kept as objects, and steps after an incomplete one go on."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from songvec_assets.cache.plan import FillReport
from songvec_assets.cli.run import RunResult, run_and_print, run_job
from songvec_assets.definitions import defs
from songvec_assets.defs.steps import Incomplete
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.progress import Progress
from songvec_assets.settings import Settings
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets_tests.conftest import environment_of
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow


@pytest.fixture
def pipeline(
    database: Database,
    provider: Provider,
    songs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Pipeline:
    """Two songs, and the environment of somebody who has a database and a key."""
    songs((1, "Sea", "Ann", "waves"), (2, "Hill", "Ben", "stones"))
    for name, value in {**environment_of(database, provider, tmp_path), "DAGSTER_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    return Pipeline(Settings())


def test_reasons_of_several_steps_are_merged() -> None:
    result = RunResult([Incomplete({"down": ["a"]}), "something else", Incomplete({"down": ["b"], "refused": []})])
    assert result.incomplete == {"down": ["a", "b"], "refused": []}
    assert (result.of(FillReport), result.of(str)) == ([], ["something else"])


def test_a_run_keeps_the_reports_of_its_steps_and_their_times(pipeline: Pipeline) -> None:
    shown: list[Progress] = []
    result = run_job(defs.resolve_job_def("refresh"), show=shown.append)
    assert (result.failures, result.incomplete) == ([], {})
    assert [report.n_embedded for report in result.of(FillReport)] == [2]
    assert len(result.of(IndexReport)) == 1
    assert {"songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index"} <= {*result.seconds}
    assert any(each.step == "embed songs" for each in shown)
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
    assert (run.job_name, run.remote_job_origin is not None) == ("refresh", True)


def test_a_summary_is_printed_and_a_failure_ends_the_command(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run_and_print("refresh", pipeline)
    assert "embedding_cache" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run_and_print("refresh", pipeline, resources={"run": {"ranges": "nonsense"}})
    assert ended.value.code == 1
    assert "expected a range key like" in " ".join(capsys.readouterr().err.split())
