"""What the UI shows of table and index: numbers, tables, and charts that are drawn only if their data changed."""

import subprocess
import sys
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl
import pytest

from songvec_assets.defs.charts import draw_coverage, draw_if_changed, draw_map, draw_recall, show_chart
from songvec_assets.defs.reports import describe_preview
from songvec_assets.search.nearest import Hit
from songvec_assets.search.preview import Neighborhood, Preview, SongMap
from songvec_assets.songs.ranges import MAX_SONG_ID, SongIdRange
from songvec_assets.vectors.index.recall import RecallReport
from songvec_assets_tests.defs.figures import POINTS, RECALL, open_picture


def test_what_draws_is_loaded_as_soon_as_there_is_work_and_not_without() -> None:
    code = """
import sys, threading
from songvec_assets.defs.charts import importing_ahead
from songvec_assets.progress import Progress
for total in (0, 7, 7):
    importing_ahead(print)(Progress("load rows", 0, total))
    [thread.join() for thread in threading.enumerate() if thread is not threading.main_thread()]
    print("matplotlib.figure" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line in ("True", "False")] == ["False", "True", "True"]
    assert done.stdout.count("load rows") == 3, "it is passed on"


class TestPicture:
    def test_it_is_a_png_that_is_wide_enough_to_read(self) -> None:
        picture = open_picture(draw_recall(RECALL))
        assert picture.width >= 700
        assert picture.height >= 400

    def test_target_and_chosen_point_are_marked_where_they_are(self) -> None:
        def rows_of_red(report: RecallReport) -> list[int]:
            picture = open_picture(draw_recall(report))
            pixels = np.asarray(picture)[:, 95].astype(int)  # left of all points, where only the line is
            return np.flatnonzero(pixels[:, 0] > pixels[:, 1] + 60).tolist()

        high, low = rows_of_red(RECALL), rows_of_red(replace(RECALL, target=0.6))
        assert high
        assert low
        assert min(high) < min(low), "a higher target is a higher line"

    @pytest.mark.parametrize("n_points", [1, 2])
    def test_few_points_are_enough(self, n_points: int) -> None:
        report = replace(RECALL, points=POINTS[:n_points], probes=POINTS[n_points - 1].probes)
        open_picture(draw_recall(report))

    def test_in_metadata_it_is_the_picture_itself(self) -> None:
        shown = show_chart(b"any bytes", "recall")
        assert isinstance(shown, dg.MarkdownMetadataValue)
        assert shown.md_str == "![recall](data:image/png;base64,YW55IGJ5dGVz)"


def share_of(png: bytes, colour: tuple[int, int, int]) -> float:
    """The share of a picture's pixels that have a colour."""
    return float((np.asarray(open_picture(png)) == colour).all(axis=2).mean())


def make_coverage(*ranges: tuple[SongIdRange, int, int]) -> pl.DataFrame:
    """The inventory's frame of ranges with n songs loaded and n missing."""
    rows = [(each.key, n_loaded, 0, 0, n_missing) for each, n_loaded, n_missing in ranges]
    return pl.DataFrame(rows, ["key", "loaded", "cached", "rejected", "missing"], orient="row")


class TestCoverage:
    LOADED, MISSING = (0x1F, 0x3A, 0x5F), (0xD1, 0x49, 0x5B)

    def test_what_is_missing_is_red_and_as_much_as_it_is(self) -> None:
        ranges = [SongIdRange(start, start + 100) for start in range(0, 1000, 100)]
        full = make_coverage(*((each, 100, 0) for each in ranges))
        half = make_coverage(*((each, 50, 50) for each in ranges))
        assert share_of(draw_coverage(full), self.MISSING) < 0.005
        assert share_of(draw_coverage(half), self.MISSING) > 0.15
        assert share_of(draw_coverage(full), self.LOADED) > 1.8 * share_of(draw_coverage(half), self.LOADED)

    def test_the_tail_is_as_wide_as_the_others(self) -> None:
        tail = SongIdRange(100, MAX_SONG_ID + 1)
        picture = draw_coverage(make_coverage((SongIdRange(0, 100), 100, 0), (tail, 0, 100)))
        assert share_of(picture, self.MISSING) == pytest.approx(share_of(picture, self.LOADED), rel=0.1)


class TestMap:
    MAP = SongMap(
        np.random.default_rng(0).random((60, 2), np.float32), np.arange(60) % 3, [["A"], ["B"], ["C"]], 0.5, 99
    )

    def test_each_cluster_has_its_colour(self) -> None:
        png = np.asarray(open_picture(draw_map(self.MAP))).reshape(-1, 3).astype(int)
        reddish = (png[:, 0] > png[:, 1] + 60).mean()
        one = replace(self.MAP, clusters=np.zeros(60, int), titles=[["A"]])
        alone = np.asarray(open_picture(draw_map(one))).reshape(-1, 3).astype(int)
        assert reddish > 0.001 > (alone[:, 0] > alone[:, 1] + 60).mean()

    @pytest.mark.parametrize(
        "titles", [["祖母の味噌汁", "Plain"], ["祖母の味噌汁"], [], ["$x_1$ and $", "B"], ["long " * 30]]
    )
    def test_any_title_can_be_drawn(self, titles: list[str]) -> None:
        open_picture(draw_map(replace(self.MAP, titles=[titles, ["B"], ["C"]])))

    def test_neighbors_are_a_table_with_the_song_first(self) -> None:
        near = [Hit(2, "Hill", "Ben", None, 0.987)]
        shown = describe_preview(Preview(self.MAP, [Neighborhood("Sea", "Ann", near)]))
        table = shown["songs and their nearest"]
        assert [column.name for column in table.schema.columns] == ["song", "nearest 1", "nearest 2", "nearest 3"]
        assert table.records[0].data["nearest 1"] == "Hill — Ben (0.99)"


class TestDrawing:
    def materialize(self, instance: dg.DagsterInstance, digest: str, draw) -> dict:
        """One step of an asset with a chart; its metadata."""

        @dg.asset
        def charted(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult(metadata=draw_if_changed(context, ("map", "table"), digest, draw))

        assert dg.materialize([charted], instance=instance).success
        event = instance.get_latest_materialization_event(dg.AssetKey("charted"))
        return {name: value.value for name, value in event.asset_materialization.metadata.items()}

    def test_a_chart_is_drawn_only_if_its_data_changed(self) -> None:
        drawn = []

        def draw() -> dict:
            drawn.append(len(drawn))
            return {"map": show_chart(bytes(drawn), "map"), "table": len(drawn)}

        with dg.DagsterInstance.ephemeral() as instance:
            first = self.materialize(instance, "a", draw)
            again = self.materialize(instance, "a", draw)
            assert (again, len(drawn)) == (first, 1), "what was drawn is shown again"
            other = self.materialize(instance, "b", draw)
            assert (other["map"] != first["map"], other["table"], len(drawn)) == (True, 2, 2)

    def test_a_chart_that_fails_is_a_warning_and_is_tried_again(self, capfd: pytest.CaptureFixture[str]) -> None:
        def draw() -> dict:
            raise ValueError("no font")

        with dg.DagsterInstance.ephemeral() as instance:
            assert self.materialize(instance, "a", draw) == {}
            assert "Could not render a chart; the step itself succeeded" in capfd.readouterr().err
            assert "map" in self.materialize(instance, "a", lambda: {"map": "drawn"})
