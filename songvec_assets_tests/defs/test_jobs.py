"""The jobs, run over a real instance: their options, re-executions, and what they leave unchanged."""

import logging
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cli.run import run_job
from songvec_assets.definitions import defs
from songvec_assets.defs.reports import report_export
from songvec_assets.defs.resources import FireworksResource, PostgresResource, RunResource, StorageResource
from songvec_assets.postgres.engine import Database
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets.vectors.swap import WantedTable, bring_table_up_to_date
from songvec_assets.vectors.table import TableSpec, VectorTable
from songvec_assets_tests.administration import execute
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.vectors.conftest import SPEC, put, source_of
from songvec_assets_tests.vectors.conftest import TILING as SMALL_TILING

pytestmark = pytest.mark.slow


FIRST = "000000000-000050000"


ASSETS = ("songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index")


@pytest.mark.usefixtures("instance")
class TestRuns:
    def test_options_of_a_run_reach_all_of_its_steps(self, provider: Provider) -> None:
        job = defs.resolve_job_def("refresh")
        failed = run_job(job, resources={"run": {"max_usd": 0.0}})
        assert "the budget of $0.0000 would be exceeded" in failed.failures[0]
        failed = run_job(job, resources={"run": {"max_usd_a_month": 0.0}})
        assert "SONGVEC_MAX_USD_A_MONTH" in failed.failures[0]
        elsewhere = run_job(job, resources={"run": {"ranges": "000050000-000100000"}})
        assert "fill the cache first" in elsewhere.failures[0], "no range of it holds songs"
        assert provider.texts() == {}
        assert run_job(job, resources={"run": {"ranges": f"{FIRST}...{FIRST}"}}).failures == []
        assert len(provider.texts()) == 3
        span = SongIdRange.from_key(FIRST), SongIdRange.from_key("000050000-000100000")
        both = run_job(job, span, resources={"run": {"ranges": FIRST}})
        assert "launched for partitions" in both.failures[0], "the others would show as done"

    def test_an_export_that_policies_may_have_cut_short_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        run = RunResource(postgres=PostgresResource(), fireworks=FireworksResource(), storage=StorageResource())
        pipeline = run.open()
        plain = report_export(pipeline.export(), pipeline, logging.getLogger("export"))
        assert (caplog.text, "row security" in (plain.metadata or {})) == ("", False)
        pipeline.source = replace(pipeline.source, row_security=True)
        result = report_export(pipeline.export(), pipeline, logging.getLogger("export"))
        assert "policies may hide songs" in caplog.text
        assert "policies may hide songs" in str((result.metadata or {})["row security"])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"ranges": "000000000"}, "expected a range key like"),
            ({"ranges": "000050000-000100000...000000000-000050000"}, "no ranges of this graph in their order"),
            ({"max_usd": -1.0}, "SONGVEC_MAX_USD: expected a number greater than or equal to 0"),
            ({"concurrency": 0}, "SONGVEC_CONCURRENCY: expected a number greater than or equal to 1"),
            ({"target_recall": 1.5}, "SONGVEC_TARGET_RECALL: expected a number less than or equal to 1"),
        ],
    )
    def test_a_bad_option_is_refused_by_name_before_anything_is_done(
        self, provider: Provider, options: dict[str, object], words: str
    ) -> None:
        result = run_job(defs.resolve_job_def("refresh"), resources={"run": options})
        assert words in result.failures[0]
        assert provider.ledger()["requests"] == 0

    def test_a_re_execution_embeds_nothing_anew_a_second_time(
        self, instance: dg.DagsterInstance, provider: Provider
    ) -> None:
        job = defs.resolve_job_def("refresh")
        assert job.execute_in_process(instance=instance).success
        config = {"resources": {"run": {"config": {"reembed": True}}}}
        first = job.execute_in_process(instance=instance, run_config=config)
        assert {count for text, count in provider.texts().items() if text != "probe"} == {2}
        with dg.DagsterInstance.local_temp(instance.root_directory) as same:
            options = dg.ReexecutionOptions(parent_run_id=first.run_id)
            again = dg.execute_job(dg.reconstructable(_refresh), same, run_config=config, reexecution_options=options)
        assert again.success
        assert {count for text, count in provider.texts().items() if text != "probe"} == {2}

    def test_a_dry_run_prices_and_touches_nothing(
        self, instance: dg.DagsterInstance, provider: Provider, tmp_path: Path
    ) -> None:
        assert run_job(defs.resolve_job_def("embed"), resources={"run": {"max_usd": 0.0}}).failures
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
        requests = provider.ledger()["requests"]
        result = defs.resolve_job_def("dry_run").execute_in_process(instance=instance)
        words = [entry.user_message for entry in instance.all_logs(result.run_id)]
        assert any("embed: 2 texts, about" in each for each in words), words
        assert any("load: nothing is cached yet" in each for each in words)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()} == files
        assert provider.ledger()["requests"] == requests

    def test_unchanged_content_keeps_its_data_version(self, instance: dg.DagsterInstance, database: Database) -> None:
        job = defs.resolve_job_def("refresh")

        def versions() -> dict[str, str | None]:
            span = {"dagster/asset_partition_range_start": FIRST, "dagster/asset_partition_range_end": FIRST}
            assert job.execute_in_process(instance=instance, tags=span).success
            found = {}
            for asset in ASSETS:
                event = instance.get_latest_materialization_event(dg.AssetKey(asset))
                found[asset] = (event.asset_materialization.tags or {})["dagster/data_version"]
            return found

        first = versions()
        assert versions() == first
        execute(database.adbc_uri, "UPDATE songs SET lyrics = 'other' WHERE id = 1")
        changed = versions()
        assert {asset for asset in ASSETS if changed[asset] != first[asset]} >= set(ASSETS) - {"ivfflat_index"}


def _refresh() -> dg.JobDefinition:
    return defs.resolve_job_def("refresh")


def test_the_rollback_job_lets_the_table_before_serve_again(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = ModelCache(LocalStorage(tmp_path / "embeddings"), SPEC.model, SPEC.dimensions)
    put(cache, range(30))
    for spec in (SPEC, TableSpec(SPEC.model, SPEC.dimensions, "halfvec")):
        bring_table_up_to_date(database, source_of(cache, SMALL_TILING), WantedTable(spec, may_swap=True))
    monkeypatch.setenv("POSTGRES_URL", database.url)
    monkeypatch.setenv("FIREWORKS_API_KEY", "never-used")
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_job_def("rollback")
        assert job.execute_in_process(instance=instance).success
        assert VectorTable(database).spec == SPEC
        failed = job.execute_in_process(instance=instance, raise_on_error=False)
    (failure,) = [event for event in failed.all_events if event.is_step_failure]
    assert "there is no table song_embeddings_old" in str(failure.step_failure_data.user_failure_data)
