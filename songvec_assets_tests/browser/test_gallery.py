"""The pictures of the documentation, taken anew: `SONGVEC_SCREENSHOTS=docs/images pytest …/test_gallery.py`.

Without that variable nothing is taken or written. Vectors are the offline embedder's: words, not noise.
"""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from PIL import Image
from playwright.sync_api import FloatRect, expect

from songvec_assets.settings import OFFLINE_MODEL
from songvec_assets_tests.browser.pages import VIEW, DagsterUI
from songvec_assets_tests.browser.stage import open_tab, running_project, serving_samples

FOLDER = os.environ.get("SONGVEC_SCREENSHOTS")
MAX_BYTES = 200_000
N_COLOURS = 128
SETTINGS = {
    "SONGVEC_RANGE_SIZE": "1000",
    "SONGVEC_SONG_ID_STOP": "13000",
    "SONGVEC_EMBEDDING_MODEL": OFFLINE_MODEL,
    "SONGVEC_EMBEDDING_DIMENSIONS": "256",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not FOLDER, reason="SONGVEC_SCREENSHOTS names no folder for pictures"),
]


@pytest.fixture(scope="module")
def ui() -> Iterator[DagsterUI]:
    """A project after its first run, over 12,176 songs in 13 ranges."""
    with running_project(SETTINGS, n_generated=12_000) as (project, address, _), open_tab(address) as ui:
        code, output = project.run("songvec", "run")
        assert code == 0, output
        yield ui


def keep(ui: DagsterUI, name: str, clip: FloatRect | None = None) -> None:
    """Write what the tab shows, in few colours."""
    ui.page.mouse.move(0, 0)
    # spinners, fading dialogs and pictures that are still being decoded
    ui.page.wait_for_load_state("networkidle")
    shown = Image.open(io.BytesIO(ui.page.screenshot(clip=clip, animations="disabled")))
    path = Path(str(FOLDER)) / f"{name}.png"
    shown.convert("RGB").quantize(N_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES


@pytest.fixture
def wide(ui: DagsterUI) -> Iterator[None]:
    """A tab in which the whole graph is seen."""
    ui.page.set_viewport_size({"width": 2000, "height": 700})
    yield
    ui.page.set_viewport_size(VIEW)


def test_search(server_url: str, tmp_path: Path) -> None:
    # before `ui` is open: Playwright runs once per process
    with serving_samples(server_url, tmp_path) as address, open_tab(address) as ui:
        ui.page.set_viewport_size({"width": 820, "height": 640})
        ui.page.goto("/?q=leaving+home+to+begin+a+new+life+overseas&mode=hybrid")
        ui.see(re.compile("^10 songs for"))
        keep(ui, "search")


@pytest.mark.usefixtures("wide")
def test_asset_graph(ui: DagsterUI) -> None:
    graph = ui.open_graph()
    expect(graph).to_have_count(5)
    ui.see("8 / 8 Passed")
    boxes = [node.bounding_box() for node in graph.all()]
    first, *_, last = sorted((box for box in boxes if box), key=lambda box: box["x"])
    width, height = last["x"] + last["width"] - first["x"], first["height"]
    keep(ui, "asset_graph", {"x": first["x"] - 16, "y": first["y"] - 16, "width": width + 32, "height": height + 32})


def test_ranges(ui: DagsterUI) -> None:
    ui.open_asset("embedding_cache", "partitions")
    ui.see("Materialized (13)")
    ui.see("000003000-000004000").click()
    ui.see("songs embedded")
    keep(ui, "ranges")


@pytest.mark.parametrize(
    ("asset", "metadata", "name"),
    [
        ("ivfflat_index", "recall against latency", "recall"),
        ("ivfflat_index", "map of the songs", "map"),
        ("song_embeddings_table", "coverage by range", "coverage"),
    ],
)
def test_dialogs(ui: DagsterUI, asset: str, metadata: str, name: str) -> None:
    expect(ui.open_picture(asset, metadata)).to_be_visible()
    keep(ui, name, ui.page.get_by_role("dialog").bounding_box())


def test_launchpad(ui: DagsterUI) -> None:
    ui.open_launchpad("refresh")
    ui.type_config("resources:", "  run:", "    config:", "      max_usd: 50", "      ranges: 000003000-000004000")
    ui.see("No errors")
    ui.see("export_mode")
    expect(ui.page.get_by_role("button", name="Launch Run")).to_be_enabled()
    keep(ui, "launchpad")


def test_run(ui: DagsterUI) -> None:
    ui.launch("refresh", "resources:", "  run:", "    config:", "      reembed: true")
    ui.filter_log("left")
    ui.see(re.compile(r"^embed songs: ([6-9]|1\d),"))
    keep(ui, "run")
    ui.see("Success")


def test_automation(ui: DagsterUI) -> None:
    ui.switch_on("automation", "songs_source")
    keep(ui, "automation", {"x": 0, "y": 0, "width": VIEW["width"], "height": 420})
