"""A headless Chromium, and the console of a server whose metrics a test invents."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from support.fake_metrics import FakeMetrics, serving_fake

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# As root it has no sandbox; the others keep it from looking for hosts outside.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
)
# Far more than anything takes on a machine that has other work.
LONGEST_MS = 120_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser. It runs an event loop in this thread, so it ends with the module."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=LONGEST_MS)
        yield browser
        browser.close()


@dataclass
class Console:
    """A page that shows invented metrics. Its clock stands still until `poll`."""

    page: Any
    metrics: FakeMetrics
    url: str
    # What the browser complained about: errors of scripts, violations of the policy.
    complaints: list[str] = field(default_factory=list)

    def poll(self, times: int = 1) -> None:
        """Let two seconds pass, and wait until the next answer is shown."""
        for _ in range(times):
            shown = self.text("#updated")
            self.page.clock.run_for(2000)
            self.until(lambda: self.text("#updated") != shown)  # noqa: B023

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until something is true, while the browser's events are handled."""
        for _ in range(6000):
            if condition():
                return
            self.page.wait_for_timeout(10)
        pytest.fail("still not true after a minute")

    def text(self, selector: str) -> str:
        """Return the text that is shown."""
        return self.page.inner_text(selector)

    def table(self, body: str) -> list[list[str]]:
        """Return the texts of a table's rows."""
        return self.page.eval_on_selector_all(
            f"#{body} > tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )


@pytest.fixture
def metrics() -> FakeMetrics:
    """Two workers with the codebooks "faces" and "speech", each used in part."""
    made = FakeMetrics()
    made.serve_two_workers({"faces": "fa" * 32, "speech": "5e" * 32})
    quarter_dead = [0.0 if i % 4 == 3 else 1 / 48 for i in range(64)]
    equal = [1 / 64] * 64
    made.codebook("faces", made.stage(quarter_dead, equal, drift_bits=0.21), digest="fa" * 32, error_ratio=1.9)
    made.codebook("speech", made.stage(equal, equal), made.stage(equal, equal), digest="5e" * 32)
    return made


@pytest.fixture
def console_of() -> Callable[..., Console]:
    """Return a console in a page of the browser, of whatever server; its clock runs."""

    def make(page: Any, metrics: FakeMetrics, url: str) -> Console:
        console = Console(page, metrics, url)
        page.set_default_timeout(LONGEST_MS)
        page.on("console", lambda message: console.complaints.append(message.text))
        page.on("pageerror", lambda error: console.complaints.append(str(error)))
        return console

    return make


@pytest.fixture
def open_console(
    chromium: Any, metrics: FakeMetrics, console_of: Callable[..., Console]
) -> Iterator[Callable[..., Console]]:
    """Open the console, with options of a browser's context: open_console(color_scheme="dark") -> Console."""
    contexts = []
    with serving_fake(metrics) as url:

        def start(**options: Any) -> Console:
            context = chromium.new_context(**options)
            contexts.append(context)
            page = context.new_page()
            console = console_of(page, metrics, url)
            page.clock.install(time=1_700_000_600)
            page.clock.pause_at(1_700_000_700)
            page.goto(url)
            console.until(lambda: console.text("#updated"))
            return console

        yield start
        for context in contexts:
            context.close()
