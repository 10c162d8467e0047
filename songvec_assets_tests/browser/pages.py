"""What a person does in Dagster's UI, by the words that stand on it. No assertions of what a story expects."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

TIMEOUT_S = 120
VIEW = {"width": 1400, "height": 900}
# nothing but what a test asks for, and no packet beyond loopback
SWITCHES = [
    *"--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split(),
    *"--disable-component-update --disable-sync".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

expect.set_options(timeout=TIMEOUT_S * 1000)


@contextmanager
def running_chromium(executable: str) -> Iterator[Browser]:
    """A headless browser of the distribution."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=SWITCHES)
        try:
            yield browser
        finally:
            browser.close()


class DagsterUI:
    """One tab.

    Args:
        browser: which to open it in.
        address: where `dagster dev` listens.
    """

    def __init__(self, browser: Browser, address: str) -> None:
        self.page: Page = browser.new_page(base_url=address, viewport=VIEW)
        self.page.set_default_timeout(TIMEOUT_S * 1000)
        # the first visitor of an instance is asked to join a community
        skip = self.page.get_by_role("button", name="Skip", exact=True)
        self.page.add_locator_handler(skip, lambda button: button.click())

    def see(self, words: str | re.Pattern[str]) -> Locator:
        """Wait until words stand on the page."""
        found = self.page.get_by_text(words, exact=isinstance(words, str)).first
        expect(found).to_be_visible()
        return found

    def press(self, name: str | re.Pattern[str], within: Locator | None = None) -> None:
        """Press the button of that name; before it an icon may have one."""
        words = re.compile(rf"(^|\s){re.escape(name)}$") if isinstance(name, str) else name
        (within or self.page).get_by_role("button", name=words).click()

    def open_graph(self) -> Locator:
        """Lineage: the nodes of the asset graph."""
        self.page.goto("/asset-groups")
        return self.page.locator("foreignObject")

    def open_asset(self, asset: str, view: str = "overview") -> None:
        """A view of an asset: overview, partitions, events, checks."""
        self.page.goto(f"/assets/{asset}?view={view}")

    def materialize_all(self) -> None:
        """The graph's button, with all partitions."""
        self.open_graph()
        self.press(re.compile("Materialize all"))
        self.press("All")
        self.press("Launch backfill")
        self.see(re.compile("^Created backfill"))

    def open_picture(self, asset: str, name: str) -> Locator:
        """A picture in the metadata of an asset's last materialization."""
        self.open_asset(asset)
        row = self.page.get_by_role("row").filter(has=self.page.get_by_text(name, exact=True))
        row.get_by_text("[Show Markdown]").click()
        return self.page.get_by_role("dialog").get_by_role("img").last

    def open_launchpad(self, job: str) -> None:
        """A job's launchpad."""
        self.page.goto(f"/locations/songvec_assets/jobs/{job}/playground")
        self.see("No errors")

    def type_config(self, *lines: str) -> None:
        """Replace the run config."""
        self.page.locator(".CodeMirror").first.click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text("\n".join(lines))

    def launch(self, job: str, *config: str) -> None:
        """A run of a job over all its ranges; ends on the run's page."""
        self.open_launchpad(job)
        # the launchpad remembers what was typed before
        self.type_config(*(config or ["{}"]))
        self.press("Launch Run")
        self.press("Confirm")
        self.page.wait_for_url("**/runs/*")

    def filter_log(self, words: str) -> None:
        """Show only the run's events with one of these words."""
        self.page.get_by_placeholder("Filter…").fill(words)

    def terminate(self) -> None:
        """End the run that is shown."""
        self.press("Terminate")
        self.press(re.compile("^Terminate "), within=self.page.get_by_role("dialog"))

    def execute_again_from_failure(self) -> None:
        """Run anew what the run that is shown did not do; ends on the new run's page."""
        before = self.page.url
        self.page.get_by_role("button", name="arrow_drop_down", exact=True).click()
        self.page.get_by_role("menuitem").filter(has_text=re.compile("From failure$")).click()
        self.page.wait_for_url(lambda url: "/runs/" in url and url != before)

    def switch_on(self, *names: str) -> None:
        """Switches of the Automation page."""
        self.page.goto("/automation")
        for name in names:
            row = self.page.locator("[data-index]").filter(has=self.page.get_by_text(name, exact=True))
            # what a person sees is the label of a hidden checkbox; the row has another one, which selects it
            switch = row.locator("label[class*=Switch]")
            switch.click()
            expect(switch.get_by_role("checkbox")).to_be_checked()
