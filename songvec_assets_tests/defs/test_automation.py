"""What runs by itself, over a real instance; what a run may be told; and what people are told of failures."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import dagster as dg
import pytest

from songvec_assets.cli.run import run_job
from songvec_assets.definitions import defs
from songvec_assets.defs.automation import post_alert
from songvec_assets.defs.resources import FireworksResource, PostgresResource, RunResource, StorageResource
from songvec_assets.errors import AlertError
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import execute, free_port
from songvec_assets_tests.defs.test_jobs import ASSETS, FIRST
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow


def look(instance: dg.DagsterInstance, cursor: str | None) -> dg.SensorResult | dg.SkipReason:
    """One tick of the sensor on the source; its events are recorded."""
    run = RunResource(postgres=PostgresResource(), fireworks=FireworksResource(), storage=StorageResource())
    with dg.build_sensor_context(
        instance=instance, repository_def=defs.get_repository_def(), cursor=cursor, resources={"run": run}
    ) as context:
        result = defs.resolve_sensor_def("songs_source")(context)
    for event in getattr(result, "asset_events", None) or []:
        instance.report_runless_asset_event(event)
    return result


def materialize(instance: dg.DagsterInstance, asset: str, partition: str | None = None) -> None:
    """Run one asset with its checks."""
    everything = [*(defs.assets or []), *(defs.asset_checks or [])]
    selection = dg.AssetSelection.assets(asset)
    result = dg.materialize(
        everything, selection=selection, partition_key=partition, instance=instance, resources=defs.resources
    )
    assert result.success


class TestConditions:
    # what dagster says of itself
    @pytest.mark.filterwarnings(
        "ignore::dagster.BetaWarning", "ignore:InitResourceContext.dagster_run:DeprecationWarning"
    )
    def test_what_a_failed_run_completed_is_loaded(
        self, instance: dg.DagsterInstance, database: Database, tmp_path: Path
    ) -> None:
        execute(database.adbc_uri, "INSERT INTO songs VALUES (60000, 'New', 'Ann', 'la')")
        tick = dg.evaluate_automation_conditions(defs=defs, instance=instance)
        materialize(instance, "songs_parquet")
        tick = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=tick.cursor)
        folder = tmp_path / "store" / "embeddings" / "fireworks--qwen3-embedding-8b-64" / "000050000-000100000"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(b"not a file of ours" * 100)
        failed = run_job(defs.resolve_job_def("embed"))
        assert [keys for keys in failed.incomplete.values() if keys] == [["000050000-000100000"]]
        tick = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=tick.cursor)
        assert tick.get_num_requested(dg.AssetKey("song_embeddings_table")) == 1

    @pytest.mark.filterwarnings(
        "ignore::dagster.BetaWarning", "ignore:InitResourceContext.dagster_run:DeprecationWarning"
    )
    def test_a_change_of_the_songs_goes_through_the_graph_and_then_there_is_peace(
        self, instance: dg.DagsterInstance, database: Database
    ) -> None:
        cursor = None

        def requested() -> dict[str, list[str | None]]:
            nonlocal cursor
            tick = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=cursor)
            cursor = tick.cursor
            found = {asset: tick.get_requested_partitions(dg.AssetKey(asset)) for asset in ASSETS}
            return {asset: sorted(keys, key=str) for asset, keys in found.items() if keys}

        assert requested() == {"songs_parquet": [None]}, "switched on, it looks once"
        materialize(instance, "songs_parquet")
        assert requested() == {"embedding_cache": [FIRST]}, "only ranges that lack something"
        materialize(instance, "embedding_cache", FIRST)
        assert requested() == {"song_embeddings_table": [None]}
        materialize(instance, "song_embeddings_table")
        assert requested() == {"ivfflat_index": [None]}
        materialize(instance, "ivfflat_index")
        assert requested() == {}
        seen = look(instance, None)
        assert isinstance(seen, dg.SensorResult)
        assert requested() == {"songs_parquet": [None]}
        materialize(instance, "songs_parquet")
        assert requested() == {}, "nothing changed"
        assert isinstance(look(instance, seen.cursor), dg.SkipReason)
        execute(database.adbc_uri, "ALTER TABLE songs ADD COLUMN plays integer; UPDATE songs SET plays = 1")
        assert isinstance(look(instance, seen.cursor), dg.SkipReason), "no text of a song changed"
        execute(database.adbc_uri, "INSERT INTO songs VALUES (60000, 'New', 'Ann', 'la')")
        look(instance, seen.cursor)
        assert requested() == {"songs_parquet": [None]}
        materialize(instance, "songs_parquet")
        assert requested() == {"embedding_cache": ["000050000-000100000"]}

    @pytest.mark.filterwarnings(
        "ignore::dagster.BetaWarning", "ignore:InitResourceContext.dagster_run:DeprecationWarning"
    )
    def test_a_change_seen_before_the_first_look_is_not_lost(self, instance: dg.DagsterInstance) -> None:
        look(instance, None)
        tick = dg.evaluate_automation_conditions(defs=defs, instance=instance)
        assert tick.get_requested_partitions(dg.AssetKey("songs_parquet")) == {None}

    def test_all_that_spends_money_starts_stopped(self) -> None:
        sensors = {sensor.name: sensor.default_status for sensor in defs.sensors or []}
        assert sensors == {
            "automation": dg.DefaultSensorStatus.STOPPED,
            "songs_source": dg.DefaultSensorStatus.STOPPED,
            "failed_runs": dg.DefaultSensorStatus.RUNNING,
        }
        assert {each.name: each.default_status for each in defs.schedules or []} == {
            "nightly": dg.DefaultScheduleStatus.STOPPED
        }

    def test_a_night_runs_the_whole_graph_over_what_holds_songs(
        self, instance: dg.DagsterInstance, provider: Provider
    ) -> None:
        schedule = defs.resolve_schedule_def("nightly")
        (request,) = schedule.evaluate_tick(dg.build_schedule_context(instance=instance)).run_requests or []
        assert schedule.job_name == "refresh"
        job = defs.resolve_job_def("refresh")
        assert job.execute_in_process(instance=instance, run_config=request.run_config, tags=request.tags).success
        assert instance.get_materialized_partitions(dg.AssetKey("embedding_cache")) == {FIRST}
        assert len(provider.texts()) == 3


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[str], list[int]]]:
    """A server that takes messages: its address, what it was sent, and the statuses that it answers with."""
    told: list[str] = []
    statuses = [200]

    class Taker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["text"])
            self.send_response(statuses[-1])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Taker)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook/secret", told, statuses
    server.shutdown()
    thread.join()
    server.server_close()


class TestAlerts:
    def test_a_failed_run_is_told_with_its_cause_and_what_to_do(
        self, instance: dg.DagsterInstance, webhook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url, told, _ = webhook
        monkeypatch.setenv("FIREWORKS_API_KEY", "wrong")
        job = defs.resolve_job_def("refresh")
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        assert not result.success
        sensor = defs.resolve_sensor_def("failed_runs")

        def tick() -> dg.SkipReason | None:
            context = dg.build_run_status_sensor_context(
                "failed_runs", result.get_run_failure_event(), instance, result.dagster_run
            ).for_run_failure()
            return sensor(context)

        assert isinstance(tick(), dg.SkipReason)
        assert told == []
        monkeypatch.setenv("SONGVEC_WEBHOOK_URL", url)
        tick()
        (words,) = told
        for expected in (
            result.run_id[:8],
            "refresh",
            "embedding_cache: ",
            "401",
            "is not paid for again",
            "Re-execute",
        ):
            assert expected in words

    def test_a_webhook_that_takes_nothing_is_an_error_that_hides_its_address(self, webhook) -> None:
        url, _, statuses = webhook
        statuses.append(500)
        with pytest.raises(AlertError, match="answered 500") as refused:
            post_alert(url, "words")
        with pytest.raises(AlertError, match="could not be reached") as unreachable:
            post_alert(f"http://127.0.0.1:{free_port()}/hook/secret", "words")
        with pytest.raises(AlertError, match="could not be reached"):
            post_alert("no address", "words")
        assert "secret" not in str(refused.value) + str(unreachable.value)
