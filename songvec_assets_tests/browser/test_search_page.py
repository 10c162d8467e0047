"""What a person does on the search page: by mouse, by keyboard, on a phone, in the dark, and with songs that attack it.

`SONGVEC_SCREENSHOTS=folder` keeps a picture of each view there.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright.sync_api import Browser, Page, expect

from songvec_assets.serve.guard import Limits
from songvec_assets.serve.searching import Searcher
from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.browser.pages import running_chromium
from songvec_assets_tests.browser.stage import ATTACKS, find_chromium, serving_samples
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.search.conftest import pipeline, songs_provider
from songvec_assets_tests.serve.conftest import running_server

__all__ = ["pipeline", "songs_provider"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VIEWS = {"laptop": {"width": 1280, "height": 800}, "phone": {"width": 360, "height": 740}}
TOKEN = "0123456789abcdef"
FOLDER = os.environ.get("SONGVEC_SCREENSHOTS")
CONTRAST = """
    (element) => {
        const parse = (color) => color.match(/[\\d.]+/g).map(Number);
        const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (element) => getComputedStyle(element).backgroundColor;
        let ground = element;
        while (ground.parentElement && parse(behind(ground))[3] === 0) ground = ground.parentElement;
        const pair = [getComputedStyle(element).color, behind(ground)];
        const [light, dark] = pair.map((color) => luminance(parse(color))).sort((a, b) => b - a);
        return (light + 0.05) / (dark + 0.05);
    }
"""
"""Of an element's text with what is behind it, as WCAG 2 has it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium(find_chromium()) as browser:
        yield browser


@pytest.fixture(scope="module")
def address(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_samples(server_url, tmp_path_factory.mktemp("samples")) as address:
        yield address


@contextmanager
def open_page(browser: Browser, address: str, view: str = "laptop", **options: Any) -> Iterator[Page]:
    """A tab in which nothing goes wrong: no script's error, nothing that the policy blocks, no dialog."""
    context = browser.new_context(base_url=address, viewport=VIEWS[view], **options)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message) or dialog.dismiss())
    # refusals of the server are shown on the page, and the browser notes them
    page.on(
        "console",
        lambda said: (
            troubles.append(said.text) if said.type in ("error", "warning") and "status of" not in said.text else None
        ),
    )
    page.set_default_timeout(20_000)
    try:
        yield page
        assert not troubles
    finally:
        context.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with open_page(browser, address) as page:
        page.goto("/")
        yield page


def search(page: Page, words: str) -> None:
    page.get_by_role("searchbox", name="What is the song about?").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()


def see_count(page: Page, words: str) -> None:
    expect(page.get_by_role("heading", level=2)).to_have_text(re.compile(words))


def test_words_find_songs_with_the_line_that_shows_why(page: Page) -> None:
    search(page, "leaving home to begin a new life overseas")
    see_count(page, r"^10 songs for “leaving home .*”, in \d+\.\d\d s$")
    hits = page.locator("#hits > li")
    expect(hits).to_have_count(10)
    first = hits.first
    expect(first.get_by_role("heading", level=3)).not_to_be_empty()
    expect(first.locator(".best")).not_to_be_empty()
    expect(first.locator(".near")).to_have_text(re.compile(r"^similarity 0\.\d\d$"))
    assert "q=leaving+home" in page.url
    first.get_by_text("Lyrics", exact=True).click()
    expect(first.locator(".lyrics")).to_contain_text(first.locator(".best").inner_text())
    page.get_by_role("button", name="Show more").click()
    expect(hits).to_have_count(20)


def test_a_song_leads_to_others_and_back(page: Page) -> None:
    search(page, "cycling")
    see_count(page, "for “cycling”")
    like = page.get_by_role("button", name=re.compile("^More like ")).first
    name = str(like.get_attribute("aria-label")).removeprefix("More like ")
    like.click()
    see_count(page, f"10 songs like “{re.escape(name)}”")
    assert name not in page.locator("#hits h3").all_inner_texts()
    page.go_back()
    see_count(page, "for “cycling”")
    expect(page.locator("#hits h3").first).to_have_text(name)
    page.reload()
    see_count(page, "for “cycling”")


def test_filters_hold_and_can_be_removed(page: Page) -> None:
    search(page, "sea")
    page.get_by_role("button", name="Add a filter").click()
    condition = page.get_by_role("list", name="Filters").get_by_role("listitem")
    condition.get_by_label("Column").select_option("year")
    condition.get_by_label("Condition").select_option("is one of")
    condition.get_by_label("Value").fill("1961, 1963")
    condition.get_by_label("Value").press("Enter")
    see_count(page, r"^[3-9] songs for “sea”")
    assert "where=" in page.url
    # an address is a search: filters, too
    page.reload()
    see_count(page, r"^[3-9] songs for “sea”")
    expect(page.get_by_label("Value")).to_have_value("1961, 1963")
    page.get_by_role("button", name="Remove").click()
    see_count(page, r"^10 songs for “sea”")
    page.get_by_role("button", name="Add a filter").click()
    page.get_by_label("Column").select_option("year")
    page.get_by_label("Value").fill("many")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("[search.invalid]")
    see_count(page, "^$")


def test_all_of_it_goes_by_keyboard(page: Page) -> None:
    keyboard = page.keyboard
    keyboard.press("Tab")  # the page's name
    keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    keyboard.type("a storm at sea")
    keyboard.press("Enter")
    see_count(page, "for “a storm at sea”")
    expect(page.get_by_role("searchbox")).to_be_focused()
    keyboard.press("Tab")
    expect(page.get_by_role("button", name="Search", exact=True)).to_be_focused()
    keyboard.press("Tab")
    expect(page.get_by_role("radio", name="Both")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"
    keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Meaning", exact=True)).to_be_checked()
    page.wait_for_url("**mode=vector**")
    keyboard.press("Tab")
    expect(page.get_by_role("button", name="Add a filter")).to_be_focused()
    see_count(page, "^10 songs")
    keyboard.press("Tab")
    like = page.get_by_role("button", name=re.compile("^More like ")).first
    expect(like).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keyboard.press("Enter")
    see_count(page, "songs like")
    expect(page.get_by_role("heading", level=2)).to_be_focused()
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.press("Enter")
    expect(page.locator(".lyrics").first).to_be_visible()


@pytest.mark.parametrize(("song_id", "name", "artist", "lyrics"), ATTACKS)
def test_what_songs_hold_is_text(page: Page, song_id: int, name: str, artist: str, lyrics: str) -> None:
    page.goto(f"/?q={quote(name)}&mode=vector&where=%22id%22%20=%20{song_id}")
    expect(page.locator("#hits h3", has_text=name)).to_have_count(1)
    hit = page.locator("#hits > li", has=page.get_by_role("heading", name=name))
    expect(hit.locator(".artist")).to_have_text(artist)
    hit.get_by_text("Lyrics", exact=True).click()
    assert hit.locator(".lyrics").inner_text().strip() == lyrics
    assert page.locator("#hits :is(img, script, svg, b, a)").count() == 0
    hit.get_by_role("button", name=f"More like {name}").click()
    expect(page.get_by_role("heading", level=2)).to_contain_text(f"like “{name}”")
    page.goto("/?like=7&title=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&mode=%3Cb%3E")
    expect(page.get_by_role("heading", level=2)).to_contain_text("like “<img src=x onerror=alert(1)>”")


def test_the_policy_blocks_what_a_script_could_try(browser: Browser, address: str) -> None:
    context = browser.new_context(base_url=address)
    page = context.new_page()
    page.goto("/")
    blocked = page.evaluate("""
        async () => {
            const events = [];
            addEventListener("securitypolicyviolation", (event) => events.push(event.effectiveDirective));
            try { document.body.innerHTML = "<img src=x>"; } catch (error) { events.push(error.name); }
            document.body.append(Object.assign(document.createElement("style"), {textContent: "body { color: red }"}));
            await fetch("http://127.0.0.1:1/?stolen").catch(() => events.push("fetch"));
            await new Promise((done) => setTimeout(done, 200));
            return events;
        }
    """)
    assert {"TypeError", "style-src-elem", "connect-src", "fetch"} <= {*blocked}
    context.close()


def test_a_token_is_asked_for_once_and_is_in_no_address(browser: Browser, server_url: str, tmp_path: Path) -> None:
    with (
        serving_samples(server_url, tmp_path, Limits(token=TOKEN)) as address,
        open_page(browser, address) as page,
    ):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto("/?q=cycling")
        keep(page, "token")
        field = page.get_by_label("Token", exact=True)
        expect(field).to_be_focused()
        expect(page.get_by_role("search")).to_be_hidden()
        field.fill("0123456789abcdeX")
        field.press("Enter")
        expect(page.get_by_text("That token is not the server's")).to_be_visible()
        field.fill(TOKEN)
        field.press("Enter")
        see_count(page, "for “cycling”")
        expect(field).to_be_hidden()
        page.reload()
        see_count(page, "for “cycling”")
        assert not [url for url in asked if TOKEN in url]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        other = page.context.new_page()
        other.goto(f"{address}/")
        expect(other.get_by_label("Token", exact=True)).to_be_visible()


def test_what_is_typed_while_the_server_is_slow_is_kept(
    browser: Browser, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, look = threading.Event(), Searcher._look
    monkeypatch.setattr(Searcher, "_look", lambda self: end.wait(60) and look(self))
    with running_server(type(pipeline)(pipeline.settings)) as address, open_page(browser, address) as page:
        page.goto("/?q=song+7&mode=text&where=%22year%22%20=%201987")
        see_count(page, "^1 song for “song 7”")
        search(page, "song 8")
        see_count(page, "^No song for “song 8” meets")
        page.get_by_label("Value").fill("1988")
        end.set()
        expect(page.get_by_role("button", name="Add a filter")).to_be_visible()
        expect(page.get_by_role("searchbox")).to_have_value("song 8")
        expect(page.get_by_label("Column").get_by_role("option")).to_have_count(8)
        page.get_by_label("Value").press("Enter")
        see_count(page, "^1 song for “song 8”")


def test_a_failing_provider_and_a_server_that_ended_are_named(
    browser: Browser, pipeline: Any, songs_provider: Provider
) -> None:
    songs_provider.control(statuses=[{"status": 500}])
    try:
        with open_page(browser, "http://127.0.0.1") as page:
            with running_server(type(pipeline)(pipeline.settings)) as address:
                page.goto(address)
                search(page, "song 9")
                expect(page.locator("#notice")).to_contain_text("Only titles and artists were compared")
                expect(page.locator("#hits h3").first).to_have_text("Song 9")
                keep(page, "notice")
            page.on("console", lambda _: None)
            page.evaluate("window.stop()")
            search(page, "song 8")
            expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
            page.goto("about:blank")
    except AssertionError as error:
        # the browser notes that nobody answers: that is what was done here
        if "ERR_CONNECTION_REFUSED" not in str(error):
            raise
    finally:
        songs_provider.control()


def test_what_is_missing_is_said_before_a_search(browser: Browser, pipeline: Any) -> None:
    update = {"postgres_url": "postgresql://127.0.0.1:1/none"}
    nowhere = type(pipeline)(pipeline.settings.model_copy(update=update))
    with running_server(nowhere) as address, open_page(browser, address) as page:
        page.goto("/")
        expect(page.get_by_role("alert")).to_contain_text("[database.unavailable]")


def test_a_screen_reader_is_given_names_and_roles(page: Page) -> None:
    search(page, "a storm at sea")
    see_count(page, "^10 songs")
    page.get_by_role("button", name="Add a filter").click()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and "role" in node
    ]
    for expected in (
        ("main", ""), ("search", ""), ("searchbox", "What is the song about?"), ("button", "Search"),
        ("group", "Compare"), ("radio", "Meaning"), ("radio", "Title and artist"), ("radio", "Both"),
        ("combobox", "Column"), ("combobox", "Condition"), ("textbox", "Value"), ("button", "Remove"),
        ("button", "Show more"),
    ):  # fmt: skip
        assert expected in nodes, expected
    controls = {"button", "searchbox", "textbox", "radio", "combobox", "link", "list", "heading", "DisclosureTriangle"}
    assert not [role for role, name in nodes if role in controls - {"list"} and not name]
    assert sum(role == "button" and name.startswith("More like ") for role, name in nodes) == 10
    assert len({name for role, name in nodes if role == "button"}) == 10 + len(("Search", "Add", "Remove", "Show more"))
    live = {node["role"]["value"] for node in tree for each in node.get("properties", []) if each["name"] == "live"}
    assert live >= {"heading", "alert", "status"}
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_it_can_be_read_on_each_screen(browser: Browser, address: str, view: str, scheme: Any) -> None:
    phone = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if view == "phone" else {}
    with open_page(browser, address, view, color_scheme=scheme, **phone) as page:
        page.goto("/")
        keep(page, f"{view}-{scheme}-empty")
        search(page, "leaving home to begin a new life overseas")
        see_count(page, "^10 songs")
        page.get_by_role("button", name="Add a filter").click()
        page.get_by_label("Column").select_option("year")
        wait_until(lambda: page.evaluate("document.fonts.status") == "loaded")
        page.mouse.move(0, 0)
        keep(page, f"{view}-{scheme}")
        # nothing is cut off, or only to be reached sideways
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for selector in ("h1 a", "h2", "h3", ".artist", ".best", ".near", ".acts button", "summary", "button.main",
                         "#add", "legend", "fieldset span", ".filter label", "input", "select"):  # fmt: skip
            for element in page.locator(f"{selector}:visible").all()[:3]:
                assert element.evaluate(CONTRAST) >= 4.5, selector
        if view == "phone":
            for button in page.locator("button:visible, summary:visible").all():
                box = button.bounding_box()
                assert box and box["height"] >= 24, button.inner_text()


def keep(page: Page, name: str) -> None:
    if FOLDER:
        page.screenshot(path=Path(FOLDER) / f"search-{name}.png", animations="disabled")
