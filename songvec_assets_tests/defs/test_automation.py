"""What runs by itself, over a real instance; what a run may be told; and what people are told of failures."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
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
from songvec_assets.songs.source import SourceNames, find_source
from songvec_assets.songs.watch import Digest, SourceLook, SourceState, look_at_source, measure_source
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
        shards = tmp_path / "store" / "embeddings" / "fireworks--qwen3-embedding-8b-64"
        (shards / "000050000-000100000").mkdir(parents=True)
        (shards / "000050000-000100000" / "manifest.json").write_bytes(b"not a file of ours" * 100)
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


SONGS = "(id integer PRIMARY KEY, name text, artist text, lyrics text, plays integer DEFAULT 0, at timestamptz)"


ROWS = "(1, 'Sea', 'Ann', 'waves'), (2, 'Hill', 'Ben', 'stones')"


QUIET = "rows were written, but no song's text or id changed"


class TestSource:
    @pytest.mark.parametrize("kind", ["table", "partitioned", "inherited", "view"])
    def test_any_change_of_a_text_or_an_id_is_seen(self, database: Database, kind: str) -> None:
        names = self.create(database, kind)
        cursor, quiet = self.look(database, names, None)
        assert quiet is None, "the first look reports"
        for statement in (
            "UPDATE songs SET lyrics = 'other words' WHERE id = 1",
            "UPDATE songs SET lyrics = '' WHERE id = 1",
            "UPDATE songs SET lyrics = NULL WHERE id = 1",
            "UPDATE songs SET name = 'Se', artist = 'aAnn' WHERE id = 1",
            "UPDATE songs SET lyrics = CASE id WHEN 1 THEN 'stones' END, name = 'same', artist = 'same'",
            "UPDATE songs SET lyrics = CASE id WHEN 2 THEN 'stones' END",
            "UPDATE songs SET id = CASE id WHEN 1 THEN 0 ELSE 2 END",
            "INSERT INTO songs VALUES (3, 'New', 'Ann', 'la')",
            "DELETE FROM songs WHERE id = 0",
            "TRUNCATE songs",
        ):
            cursor, quiet = self.look(database, names, cursor)
            assert quiet in {"nothing changed", QUIET}, statement
            execute(database.adbc_uri, statement)
            cursor, quiet = self.look(database, names, cursor)
            assert quiet is None, statement

    @pytest.mark.parametrize("updated_at", [None, "at"])
    @pytest.mark.parametrize("kind", ["table", "partitioned"])
    def test_writes_that_change_no_text_start_nothing(
        self, database: Database, kind: str, updated_at: str | None
    ) -> None:
        names = replace(self.create(database, kind), updated_at_column=updated_at)
        cursor, _ = self.look(database, names, None)
        for statement, expected in (
            ("UPDATE songs SET plays = plays + 1", QUIET),
            ("UPDATE songs SET plays = plays + 1, at = now()", QUIET),
            ("UPDATE songs SET lyrics = lyrics", QUIET),
            ("DELETE FROM songs WHERE id = 2; INSERT INTO songs VALUES (2, 'Hill', 'Ben', 'stones')", QUIET),
            ("ALTER TABLE songs ADD COLUMN more text DEFAULT 'x'", "nothing changed"),
        ):
            execute(database.adbc_uri, statement)
            cursor, quiet = self.look(database, names, cursor)
            assert quiet == expected, statement
            assert self.look(database, names, cursor) == (cursor, "nothing changed")
        execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id = 1")
        assert self.look(database, names, cursor)[1] is None

    def test_a_materialized_view_is_seen_when_it_is_refreshed(self, database: Database) -> None:
        self.create(database, "table")
        execute(database.adbc_uri, "CREATE MATERIALIZED VIEW seen AS SELECT * FROM songs")
        names = SourceNames("seen", song_id_column="id")
        cursor, _ = self.look(database, names, None)
        execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id = 1")
        cursor, quiet = self.look(database, names, cursor)
        assert quiet is not None
        execute(database.adbc_uri, "REFRESH MATERIALIZED VIEW seen")
        assert self.look(database, names, cursor)[1] is None

    def test_counters_that_begin_at_zero_again_are_looked_into(self, database: Database) -> None:
        names = self.create(database, "table")
        cursor, _ = self.look(database, names, None)
        execute(database.adbc_uri, "SELECT pg_stat_reset()")
        cursor, quiet = self.look(database, names, cursor)
        assert quiet == QUIET
        execute(database.adbc_uri, "UPDATE songs SET lyrics = 'new' WHERE id = 1")
        assert self.look(database, names, cursor)[1] is None

    @pytest.mark.parametrize("cursor", ["", "[2, 2, null, 7]", "{}", "null", '{"source": 1}', "no json"])
    def test_a_cursor_of_another_version_is_taken_for_none(self, database: Database, cursor: str) -> None:
        names = self.create(database, "table")
        now, quiet = self.look(database, names, cursor)
        assert quiet is None
        assert self.look(database, names, now)[1] == "nothing changed"
        assert self.look(database, replace(names, lyrics_column="artist"), now)[1] is None, "other columns"

    def test_a_digest_takes_a_twentieth_of_the_time_at_most(self) -> None:
        state = SourceState(2, 2, None, "3", 7)
        look = SourceLook("s", state, Digest("a", at=1_000.0, took_s=3.0), is_current=True)
        assert not look.wants_digest(state, now=9_999.0), "nothing was written"
        written, more = replace(state, n_writes=8), SourceState(3, 3, None, "6", 9)
        assert [look.wants_digest(written, now) for now in (1_059.0, 1_060.0, 900.0)] == [False, True, True]
        view = replace(look, state=replace(state, n_writes=None))
        assert [view.wants_digest(view.state, now) for now in (1_059.0, 1_060.0)] == [False, True]
        waiting, quiet = look.judge(written, None)
        assert (waiting, "compared later" in (quiet or "")) == (look, True), "it is not forgotten"
        grown, quiet = look.judge(more, None)
        assert (quiet, grown.is_current) == (None, False), "songs that came are reported at once"
        assert grown.wants_digest(more, now=1_060.0)
        assert grown.judge(more, Digest("b", 1_060.0, 3.0))[1] == "nothing changed", "since those were reported"
        assert grown.judge(replace(more, n_writes=10), Digest("b", 1_060.0, 3.0))[1] is None

    def test_a_view_and_a_column_of_times_are_looked_at_as_they_can_be(self, database: Database) -> None:
        execute(
            database.adbc_uri,
            """CREATE TABLE "T%" (id integer PRIMARY KEY, name text, artist text, lyrics text, "at" timestamptz);
            INSERT INTO "T%" VALUES (1, 'n', 'a', 'l', '2026-01-02 03:04:05+00');
            CREATE VIEW seen AS SELECT * FROM "T%" """,
        )
        table = find_source(database, SourceNames("T%", updated_at_column="at"))
        state = measure_source(database, table)
        assert (state.n_songs, state.highest_id, state.newest is not None) == (1, 1, True)
        assert self.look(database, SourceNames("T%"), None)[1] is None
        view = find_source(database, SourceNames("seen", song_id_column="id"))
        assert measure_source(database, view).n_writes is None

    @pytest.fixture(autouse=True)
    def _without_rest(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        """Looks in tests follow each other at once."""
        if "database" in request.fixturenames:
            monkeypatch.setattr("songvec_assets.songs.watch._DIGEST_REST", 0)

    @staticmethod
    def create(database: Database, kind: str) -> SourceNames:
        """Two songs in a source of some kind; statements on `songs` change what it shows."""
        statements = {
            "table": f"CREATE TABLE songs {SONGS}",
            "partitioned": f"CREATE TABLE songs {SONGS} PARTITION BY RANGE (id); "
            "CREATE TABLE songs_a PARTITION OF songs FOR VALUES FROM (0) TO (2); "
            "CREATE TABLE songs_b PARTITION OF songs FOR VALUES FROM (2) TO (100)",
            "inherited": f"CREATE TABLE songs {SONGS}; CREATE TABLE others () INHERITS (songs)",
            "view": f"CREATE TABLE songs {SONGS}; CREATE VIEW seen AS SELECT * FROM songs",
        }
        execute(database.adbc_uri, statements[kind])
        execute(database.adbc_uri, f"INSERT INTO {'others' if kind == 'inherited' else 'songs'} VALUES {ROWS}")
        return SourceNames("seen", song_id_column="id") if kind == "view" else SourceNames()

    @staticmethod
    def look(database: Database, names: SourceNames, cursor: str | None) -> tuple[str, str | None]:
        """The server counts what a session wrote when that ends."""
        execute(database.adbc_uri, "SELECT pg_stat_force_next_flush()")
        look, quiet = look_at_source(database, find_source(database, names), cursor)
        return look.dump(), quiet


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
