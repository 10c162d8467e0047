"""A person's week with the UI, in order: first run, a look at it, a failure, an interrupt, and then no clicks at all.

Each step is asserted on what the page shows and on the truth behind it: rows of the database, the provider's ledger.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright.sync_api import expect

from songvec_assets.samples import read_sample_songs
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.browser.pages import DagsterUI
from songvec_assets_tests.browser.stage import open_tab, running_project
from songvec_assets_tests.cli.test_commands import Project, provider_settings
from songvec_assets_tests.provider import Provider, running_provider

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

N_SAMPLES = read_sample_songs().height
ASSETS = ("songs", "songs_parquet", "embedding_cache", "song_embeddings_table", "ivfflat_index")
CHANGE = "UPDATE songs SET lyrics = '{words} ' || id WHERE id >= {first} AND id < {stop} RETURNING id"
SETTINGS = {
    "SONGVEC_RANGE_SIZE": "50",
    "SONGVEC_SONG_ID_STOP": "500",
    "SONGVEC_EMBEDDING_DIMENSIONS": "64",
    "SONGVEC_PATIENCE_S": "4",
}


@dataclass(frozen=True)
class Scene:
    """A project whose `dagster dev` runs and is seen in a tab, its database, and the provider that it pays."""

    project: Project
    provider: Provider
    ui: DagsterUI
    database_url: str

    def ask(self, statement: str) -> list[tuple]:
        """Rows of the database."""
        return execute(self.database_url, statement)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Sample songs in four ranges of 50 song_ids, seven empty ranges; nothing materialized."""
    with running_provider() as provider:
        settings = provider_settings(provider) | SETTINGS
        with running_project(settings) as (project, address, database_url), open_tab(address) as ui:
            yield Scene(project, provider, ui, database_url)


def billed(scene: Scene) -> dict[str, int]:
    """How often each text was billed since the ledger's last reset; without the probe of a new model's size."""
    return {text: count for text, count in scene.provider.texts().items() if text != "probe"}


def change_songs(scene: Scene, words: str, first: int, stop: int) -> int:
    """Other lyrics for a range of songs, and a new page in the provider's ledger; how many songs."""
    scene.provider.reset_ledger()
    return len(scene.ask(CHANGE.format(words=words, first=first, stop=stop)))


def test_the_graph_shows_all_five_assets(scene: Scene) -> None:
    expect(scene.ui.open_graph()).to_have_count(len(ASSETS))
    for asset in ASSETS:
        scene.ui.see(asset)


def test_materialize_all_fills_range_by_range_and_all_checks_pass(scene: Scene) -> None:
    scene.provider.control(latency_s=1.0)
    scene.ui.materialize_all()
    scene.ui.open_asset("embedding_cache", "partitions")
    scene.ui.see("Missing (11)")
    scene.ui.see(re.compile(r"^Materialized \([1-9]\)$"))
    scene.ui.see("Materialized (11)")
    scene.provider.control()
    scene.ui.page.goto("/runs")
    scene.ui.see("Success")
    for asset, n_checks in {"song_embeddings_table": 8, "ivfflat_index": 4}.items():
        scene.ui.open_asset(asset, "checks")
        scene.ui.see(f"Checks ({n_checks})")
        expect(scene.ui.page.get_by_text("Succeeded", exact=True)).to_have_count(n_checks)
    assert scene.ask("SELECT count(*) FROM song_embeddings") == [(N_SAMPLES,)]
    assert scene.ask("SELECT indisvalid FROM pg_index WHERE indexrelid = 'embeddings_ivfflat_idx'::regclass") == [
        (True,)
    ]
    assert (len(billed(scene)), {*billed(scene).values()}) == (N_SAMPLES, {1})


@pytest.mark.parametrize(
    ("asset", "name"),
    [
        ("song_embeddings_table", "coverage by range"),
        ("ivfflat_index", "recall against latency"),
        ("ivfflat_index", "map of the songs"),
    ],
)
def test_pictures_open(scene: Scene, asset: str, name: str) -> None:
    picture = scene.ui.open_picture(asset, name)
    expect(picture).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    wait_until(lambda: picture.evaluate("image => image.naturalWidth") > 0)
    assert picture.get_attribute("alt")


def test_the_launchpad_explains_its_options_and_refuses_wrong_ones(scene: Scene) -> None:
    requests = scene.provider.ledger()["requests"]
    scene.ui.open_launchpad("refresh")
    scene.ui.type_config("resources:", "  run:", "    config:", "      ")
    for option in (
        "max_usd", "max_usd_a_month", "ranges", "export_mode", "reembed", "rebuild_index", "concurrency",
        "target_recall", "swap",
    ):  # fmt: skip
        scene.ui.see(option)
    scene.ui.see(re.compile("Budget of a run in dollars, over all its processes"))
    scene.ui.type_config("resources:", "  run:", "    config:", "      export_mode: some")
    scene.ui.see(re.compile(r"export_mode not in enum type Literal\['all', 'append'\] got some"))
    scene.ui.type_config("resources:", "  run:", "    config:", "      export_mode: append")
    scene.ui.see("No errors")
    assert scene.provider.ledger()["requests"] == requests


def test_a_failed_range_says_why_and_is_all_that_a_retry_sends(scene: Scene) -> None:
    n_changed = change_songs(scene, "sung again", 50, 100)
    scene.provider.control(statuses=[{"status": 500}])
    scene.ui.launch("refresh")
    scene.ui.see("Failure")
    scene.ui.see(re.compile("1 of 4 ranges are not complete: .*The rest is done and kept"))
    assert billed(scene) == {}
    scene.provider.control()
    scene.ui.execute_again_from_failure()
    scene.ui.see("Success")
    assert (len(billed(scene)), {*billed(scene).values()}) == (n_changed, {1})
    assert all("sung again" in text for text in billed(scene))


def test_a_terminated_run_is_resumed_and_nothing_is_billed_twice(scene: Scene) -> None:
    n_changed = change_songs(scene, "sung slowly", 0, 500)
    scene.provider.control(latency_s=1.5)
    scene.ui.launch("refresh")
    wait_until(lambda: scene.provider.ledger()["texts_billed"] >= 9)
    scene.ui.terminate()
    scene.ui.see("Canceled")
    scene.ui.filter_log("Interrupted")
    scene.ui.see(re.compile("^Interrupted. What was done is kept in"))
    before = len(billed(scene))
    assert 9 <= before < n_changed
    scene.provider.control()
    scene.ui.execute_again_from_failure()
    scene.ui.see("Success")
    assert (len(billed(scene)), {*billed(scene).values()}) == (n_changed, {1})


def test_switched_on_automation_brings_new_songs_into_the_search(scene: Scene) -> None:
    scene.provider.reset_ledger()
    scene.ui.switch_on("automation", "songs_source")
    new = "Balloon over Gasworks Lane", "The Late Arrivals"
    scene.ask(f"INSERT INTO songs (name, artist, lyrics) VALUES ('{new[0]}', '{new[1]}', 'up, up') RETURNING id")
    text = f"{new[0]} by {new[1]}\nup, up"
    found = "SELECT count(*) FROM song_embeddings JOIN songs ON id = song_id WHERE artist = 'The Late Arrivals'"
    wait_until(lambda: scene.ask(found) == [(1,)], seconds=360)
    assert billed(scene) == {text: 1}
    code, output = scene.project.run("songvec", "search", text, "-n", "1")
    assert (code, new[0] in output) == (0, True), output
