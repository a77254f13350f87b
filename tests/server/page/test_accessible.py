"""The console with a keyboard, a screen reader, on narrow screens and in the dark.

axe-core checks names, roles, headings, landmarks, tables and the contrast of text in each state of the page; what it
cannot know, such as where the focus goes, is checked here.
"""

from __future__ import annotations

import pytest

axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")

# The rules of WCAG 2.2 at levels A and AA, and what axe-core holds for good practice.
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
# The name of what has the focus.
FOCUSED = """() => {
  const focused = document.activeElement;
  if (focused === document.body) return null;
  const label = document.getElementById(focused.getAttribute("aria-labelledby"));
  return focused.getAttribute("aria-label") ?? (label ?? focused).innerText;
}"""
# Notes the live regions whose text changes.
LISTEN = """() => {
  window.spoken = [];
  for (const region of document.querySelectorAll("[role=status], [role=alert], [aria-live]"))
    new MutationObserver(() => spoken.push(region.id))
      .observe(region, {subtree: true, childList: true, characterData: true});
}"""
MOVES = "[...document.querySelectorAll('*')].some(e => getComputedStyle(e).transitionDuration !== '0s')"


def violations(page):
    """Return what axe-core finds wrong: the rules and the elements."""
    # axe-core waits for timers, which stand still.
    page.clock.resume()
    found = axe_playwright.Axe().run(page, options=RULES).response
    assert len(found["passes"]) > 20
    return [(each["id"], [node["target"] for node in each["nodes"]]) for each in found["violations"]]


def busy(metrics):
    """Add to the metrics what fills every part of the page."""
    for operation in ("encode", "decode"):
        where = {"codebook": "faces", "operation": operation}
        metrics.add("requests_total", 1000, **where, status="OK")
        for name in ("request_seconds", "queue_seconds", "compute_seconds", "batch_rows", "batch_requests"):
            metrics.observe(name, 0.004, count=10, **where)
    metrics.add("requests_total", 5, codebook="faces", operation="encode", status="INVALID_ARGUMENT")
    metrics.add("refused_total", 5, reason="queue_rows")
    metrics.set("queue_rows", 2**20, worker="0")
    metrics.set("serving", 0, worker="1")
    metrics.set("certificate_expiry_timestamp_seconds", 1_700_000_700, file="server.pem")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_core_finds_nothing(open_console, metrics, scheme, width):
    busy(metrics)
    console = open_console(color_scheme=scheme, viewport={"width": width, "height": 800})
    busy(metrics)
    console.poll()
    console.page.click("#usage-faces summary")
    assert violations(console.page) == []
    metrics.failing["/metrics"] = 503
    console.until(lambda: console.text("[role=alert]"))
    assert violations(console.page) == []


def test_axe_core_sees_what_is_wrong(open_console):
    console = open_console()
    console.page.evaluate("document.querySelector('.squares').removeAttribute('aria-label')")
    console.page.evaluate("document.getElementById('host').style.color = '#ccc'")
    found = dict(violations(console.page))
    assert found.keys() >= {"svg-img-alt"}
    assert found["color-contrast"] == [["#host"]]


def test_landmarks_and_headings(open_console):
    page = open_console().page
    assert page.get_by_role("banner").count() == page.get_by_role("main").count() == 1
    assert page.get_by_role("navigation", name="Sections").count() == page.get_by_role("contentinfo").count() == 1
    assert page.get_by_role("heading", level=1).inner_text().startswith("vqserve")
    sections = ["Overview", "Traffic", "Codebooks", "Usage of the codes", "Workers", "Refusals and errors"]
    assert page.get_by_role("heading", level=2).all_inner_texts() == sections
    for name in sections:
        assert page.get_by_role("region", name=name, exact=True).count() == 1
    for link in page.get_by_role("navigation").get_by_role("link").all():
        assert page.locator(link.get_attribute("href")).count() == 1


def test_every_table_has_a_caption_and_headed_rows(open_console):
    page = open_console().page
    assert page.get_by_role("table", name="Worker processes and their queues").count() == 1
    for table in page.locator("table").all():
        assert table.locator("caption").count() == 1
        rows = table.locator("tbody tr").count()
        assert table.locator("tbody tr:has(th[scope=row])").count() == rows
        assert table.locator("thead th:not([scope])").count() == 0


def test_every_picture_has_a_text(open_console):
    page = open_console().page
    for picture in page.locator("svg").all():
        if picture.get_attribute("aria-hidden") != "true":
            assert picture.get_attribute("role") == "img"
            assert len(picture.get_attribute("aria-label")) > 20


def test_the_keyboard_reaches_everything_in_order(open_console):
    console = open_console()
    page = console.page
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(FOCUSED)
        if name is None:
            break
        reached.append(name)
        # The focus is seen: its outline is there.
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == [
        "Skip to the content",
        "Pause updates",
        *("Overview", "Traffic", "Codebooks", "Usage", "Workers", "Refusals and errors"),
        "Requests of the last 10 seconds, by codebook and operation",
        "What is served, and how the sampled traffic uses it",
        *("faces", "Copy the digest of faces", "speech", "Copy the digest of speech"),
        *("faces", "In numbers", "speech", "In numbers", "In numbers"),
        "Worker processes and their queues",
        "/metrics",
    ]


def test_the_first_key_skips_to_the_content(open_console):
    page = open_console().page
    page.keyboard.press("Tab")
    assert page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def test_pictures_of_a_codebook_are_closed_and_opened_with_the_keyboard(open_console):
    page = open_console().page
    button = page.get_by_role("button", name="faces", exact=True)
    button.focus()
    assert (button.get_attribute("aria-expanded"), page.is_visible("#usage-faces .stage")) == ("true", True)
    page.keyboard.press("Enter")
    assert (button.get_attribute("aria-expanded"), page.is_visible("#usage-faces .stage")) == ("false", False)
    page.keyboard.press("Space")
    assert (button.get_attribute("aria-expanded"), page.is_visible("#usage-faces .stage")) == ("true", True)


def test_an_update_keeps_focus_and_selection(open_console, metrics):
    console = open_console()
    button = console.page.get_by_role("button", name="Copy the digest of speech")
    button.focus()
    console.page.evaluate("getSelection().selectAllChildren(document.querySelector('.digest'))")
    metrics.codebook("a", metrics.stage([0.5, 0.5]))
    metrics.set("codebook_info", 1, codebook="a", digest="aa" * 32, kind="vq", num_codes="2", code_dim="4")
    console.poll(3)
    assert button.evaluate("e => e === document.activeElement")
    assert console.page.evaluate("String(getSelection())") == "fa" * 32


def test_updates_are_not_spoken(open_console, metrics):
    """A live region speaks when its text changes: only the state and what a button did may be in one."""
    console = open_console()
    console.page.evaluate(LISTEN)
    busy(metrics)
    metrics.set("serving", 1, worker="1")
    console.poll(2)
    assert console.page.evaluate("spoken") == []
    metrics.set("serving", 0, worker="1")
    console.poll(2)
    assert set(console.page.evaluate("spoken")) == {"state"}


@pytest.mark.parametrize("width", [1920, 1024, 640, 320])
def test_nothing_is_wider_than_the_screen(open_console, metrics, width):
    busy(metrics)
    name = "a-codebook-with-" + "a-very-" * 30 + "long-name"
    metrics.codebook(name, metrics.stage([0.5, 0.5], [0.5, 0.5]))
    metrics.set("codebook_info", 1, codebook=name, digest="aa" * 32, kind="vq", num_codes="2", code_dim="4")
    page = open_console(viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_motion_only_where_it_is_wanted(open_console):
    scrolling = "getComputedStyle(document.documentElement).scrollBehavior"
    assert open_console(reduced_motion="reduce").page.evaluate(scrolling) == "auto"
    assert open_console(reduced_motion="no-preference").page.evaluate(scrolling) == "smooth"
    still = open_console().page
    assert still.evaluate("document.getAnimations().length") == 0
    assert still.evaluate(
        "[...document.querySelectorAll('*')].every(e => getComputedStyle(e).transitionDuration === '0s')"
    )


def test_pictures_that_are_closed_are_not_drawn(open_console, metrics):
    usage = [1 / 1024] * 1024
    for i in range(100):
        name = f"book-{i:03}"
        metrics.codebook(name, *[metrics.stage(usage, usage)] * 8)
        metrics.set("codebook_info", 1, codebook=name, digest="aa" * 32, kind="rvq", num_codes="1024", code_dim="4")
    console = open_console()
    console.poll()
    assert console.page.locator("#usage-list h3").count() == 102
    assert console.page.locator("#usage-list .stage").count() == 3 * 8
