"""Names come from files that strangers made: on the page they are text, whatever is in them."""

from __future__ import annotations

import pytest

NAMES = [
    "<img src=x onerror=document.title='run'>",
    "<script>document.title='run'</script>",
    "</caption></table><h1>another page</h1>",
    "javascript:document.title='run'",
    "\"><svg onload=document.title='run'>",
    'quote " backslash \\ and { label="x" } 1',
    "line\nbreak",
    "\u202eright to left\u202c",
    "__proto__",
    "constructor",
    "usage-faces #?&%00",
    "名前 🙂",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_text(open_console, metrics, name):
    metrics.health.clear()
    metrics.samples = {key: value for key, value in metrics.samples.items() if key[0] != "codebook_info"}
    metrics.codebook(name, metrics.stage([0.5, 0.5], [0.5, 0.5]))
    metrics.set("codebook_info", 1, codebook=name, digest=name, kind=name, num_codes=name, code_dim=name)
    metrics.set("certificate_expiry_timestamp_seconds", 1_800_000_000, file=name)
    metrics.set("serving", 1, worker=name)
    where = {"codebook": name, "operation": name}
    metrics.add("requests_total", 1, **where, status=name)
    metrics.add("refused_total", 1, reason=name)
    console = open_console()
    console.poll()
    page = console.page
    assert page.text_content("#codebook-rows th") == page.text_content("#usage-list h3") == name
    assert page.text_content("#traffic-rows th") == name
    assert page.text_content("#failure-rows tr:nth-child(2) td") == name
    assert page.get_attribute("#usage-list svg", "aria-label").startswith(f"Live usage of {name}: ")
    assert page.title().startswith("Serving")
    assert page.locator("h1").count() == 1
    assert page.locator("img").count() == 1
    # The link from the table leads to the pictures.
    page.click("#codebook-rows a")
    assert page.evaluate("document.querySelector(':target').className") == "codebook"
    assert console.complaints == []


def test_html_that_a_script_would_write_is_refused(open_console):
    """Should a later change write a text as HTML, the browser refuses it: so the tests above would fail."""
    page = open_console().page
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.getElementById('host').innerHTML = '<b>x</b>'")
