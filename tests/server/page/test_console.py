"""The console in a browser: what it shows of a server's metrics, and when it shows it."""

from __future__ import annotations

from dataclasses import fields

from support.fake_metrics import ROWS, serving_fake
from vqserve_server.metrics.families import FAMILIES
from vqserve_server.usage.health import CodebookHealth, StageHealth

UNKNOWN, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def test_the_metrics_that_are_invented_here_exist(metrics):
    known = {family.full_name: set(family.labels) for family in FAMILIES.values()}
    for name, labels in metrics.samples:
        assert {label for label, _ in labels} <= known[f"vqserve_{name}"]
    for health in metrics.health:
        assert {field.name for field in fields(CodebookHealth)} - {"sampled_rows"} == health.keys()
        for stage in health["stages"]:
            assert {field.name for field in fields(StageHealth)} == stage.keys()


def test_it_shows_the_server_its_workers_and_its_codebooks(open_console):
    console = open_console()
    assert console.text("#state") == "Serving"
    assert console.text("#about") == "Version 0.9.0, up for 11 min"
    assert console.page.title().startswith("Serving · vqserve 127.0.0.1:")
    queues = ["256 of 1,024", "262 k of 1.05 M", "256 MiB of 1 GiB"]
    worker = ["Serving", "cpu", UNKNOWN, "128 MiB", "768 MiB", "2", "3", *queues]
    assert console.table("worker-rows") == [["0", *worker], ["1", *worker]]
    assert console.table("codebook-rows") == [
        ["faces", "vq", "1,024", "4", f"{'fa' * 32}\nCopy", "100 k", "75%", "0.210 bit", f"1.90 {TIMES}"],
        ["speech", "vq", "1,024", "4", f"{'5e' * 32}\nCopy", "100 k", "100%", "0.012 bit", f"1.02 {TIMES}"],
    ]
    assert "torch 2.13.0" in console.text("footer")
    assert console.complaints == []


def test_rates_are_what_was_added_between_two_scrapes(open_console, metrics):
    where = {"codebook": "faces", "operation": "encode"}
    metrics.add("requests_total", 1000, **where, status="OK")
    console = open_console()
    assert console.text("#tile-requests .value") == UNKNOWN
    metrics.add("requests_total", 100, **where, status="OK")
    metrics.add("requests_total", 6, **where, status="INVALID_ARGUMENT")
    metrics.add("tokens_total", 2_500_000, **where)
    metrics.add("device_busy_seconds_total", 1.5, worker="0", device="cpu")
    metrics.add("device_busy_seconds_total", 0.5, worker="1", device="cpu")
    console.poll()
    assert console.text("#tile-requests .figure") == "53\nper second"
    assert console.text("#tile-tokens .figure") == "1.25 M\nper second"
    assert console.text("#tile-busy .figure") == "50%\nof the time"
    assert console.text("#tile-failed .figure") == "3\nper second"
    [row] = console.table("traffic-rows")
    assert row[:4] == ["faces", "encode", "53", "1.25 M"]
    # Ten seconds later nothing of it is left.
    console.poll(6)
    assert console.text("#tile-requests .value") == "0"


def test_quantiles_lie_within_their_buckets(open_console, metrics):
    where = {"codebook": "faces", "operation": "encode"}
    metrics.add("requests_total", 1, **where, status="OK")
    for name in ("request_seconds", "queue_seconds", "compute_seconds"):
        metrics.observe(name, 0.004, **where)
    metrics.observe("batch_rows", 100, ROWS, **where)
    console = open_console()
    # 98 of 100 between 0.0025 and 0.005 s, two between 0.25 and 0.5 s.
    metrics.observe("request_seconds", 0.004, count=98, **where)
    metrics.observe("request_seconds", 0.4, count=2, **where)
    metrics.observe("batch_rows", 2048, ROWS, count=3, **where)
    console.poll()
    [row] = console.table("traffic-rows")
    assert row[4:6] == ["3.78 ms", "375 ms"]
    assert row[11] == "2,048"
    assert console.text("#tile-p99 .value") == "375 ms"
    label = console.page.get_attribute("#distributions svg", "aria-label")
    assert label == "Requests of the last 10 seconds by their time: up to 5 ms: 98; up to 500 ms: 2"


def test_a_server_that_was_started_again_counts_from_zero(open_console, metrics):
    where = {"codebook": "faces", "operation": "encode", "status": "OK"}
    metrics.add("requests_total", 5000, **where)
    console = open_console()
    console.poll()
    metrics.set("start_time_seconds", 1_700_000_702)
    metrics.set("requests_total", 10, **where)
    console.poll()
    assert console.text("#tile-requests .value") == UNKNOWN
    metrics.add("requests_total", 8, **where)
    console.poll()
    assert console.text("#tile-requests .value") == "4"


def test_one_worker_of_two_serves(open_console, metrics):
    console = open_console()
    metrics.set("serving", 0, worker="1")
    console.poll()
    assert console.text("#state") == "Serving with 1 of 2 workers"
    assert [row[1] for row in console.table("worker-rows")] == ["Serving", "Not serving"]
    metrics.set("serving", 0, worker="0")
    console.poll()
    assert console.text("#state") == "Not serving"


def test_refusals_errors_and_certificates(open_console, metrics):
    console = open_console()
    assert console.page.is_visible("#no-failures")
    metrics.add("requests_total", 3, codebook="", operation="encode", status="NOT_FOUND")
    metrics.add("refused_total", 7, reason="queue_rows")
    metrics.add("expired_total", 2, where="queue")
    metrics.add("worker_restarts_total", 1)
    metrics.set("certificate_expiry_timestamp_seconds", 1_700_000_700 + 86400 * 2, file="server.pem")
    console.poll()
    assert console.table("failure-rows") == [
        ["Request failed", "NOT_FOUND", "3", "3"],
        ["Refused", "queue_rows", "7", "7"],
        ["Expired", "queue", "2", "2"],
        ["Worker started again", "", "1", "1"],
    ]
    assert not console.page.is_visible("#no-failures")
    assert console.text("#certificates") == "server.pem: valid until 2023-11-16, 1 d 23 h left"
    assert console.text("#traffic-rows th") == "none (not found)"


def test_usage_of_every_code_and_stage(open_console):
    console = open_console()
    pictures = console.page.locator(".stage svg[role=img]")
    labels = [picture.get_attribute("aria-label") for picture in pictures.all()]
    assert labels[:3] == [
        "Live usage of faces: 75%, 48 codes of 64 used, 16 not used, perplexity 38.4",
        "Usage of faces in the file's statistics: 64 of 64 squares used",
        "Change of the usage of faces: 16 squares no longer used, 0 more than twice as often, drift 0.210 bit",
    ]
    assert len(labels) == 9
    crosses = console.page.get_attribute("#usage-faces .stage svg path.u0", "d")
    assert crosses.count("M") == 16
    assert console.page.locator("#usage-speech h4").all_inner_texts() == ["Stage 1 of 2", "Stage 2 of 2"]


def test_a_file_without_statistics(open_console, metrics):
    [faces, *_] = metrics.health
    faces["stages"][0].update(reference=None, drift_bits=None)
    faces.update(error_ratio=None)
    console = open_console()
    stage = console.page.locator("#usage-faces .stage")
    assert stage.locator("svg:visible").count() == 1
    assert "vqserved inspect --save-stats" in stage.inner_text()
    assert console.table("codebook-rows")[0][7:] == [UNKNOWN, UNKNOWN]


def test_a_codebook_of_which_nothing_was_sampled(open_console, metrics):
    metrics.health[0]["stages"] = [metrics.stage([0.0] * 64, None, sampled_rows=0, perplexity=0)]
    metrics.health[0].update(error=None, error_ratio=None)
    console = open_console()
    assert console.table("codebook-rows")[0][5:] == ["0", UNKNOWN, UNKNOWN, UNKNOWN]
    label = console.page.get_attribute("#usage-faces .stage svg", "aria-label")
    assert label == "Live usage of faces: no rows sampled yet"
    assert console.complaints == []


def test_a_server_that_samples_nothing(open_console, metrics):
    metrics.failing["/codebooks.json"] = 404
    console = open_console()
    assert console.text("#usage-hint") == "The server samples no traffic."
    assert [row[0] for row in console.table("codebook-rows")] == ["faces", "speech"]
    assert console.text("#state") == "Serving"


def test_codebooks_come_and_go(open_console, metrics):
    console = open_console()
    metrics.health.pop(0)
    # What is no longer served has the value 0.
    metrics.set("codebook_info", 0, codebook="faces", digest="fa" * 32, kind="vq", num_codes="1024", code_dim="4")
    metrics.codebook("added", metrics.stage([0.5, 0.5]))
    metrics.set("codebook_info", 1, codebook="added", digest="ad" * 32, kind="vq", num_codes="2", code_dim="4")
    console.poll()
    assert [row[0] for row in console.table("codebook-rows")] == ["added", "speech"]
    assert console.page.locator("#usage h3").all_inner_texts() == ["added", "speech"]


def test_a_server_that_does_not_answer_and_answers_again(open_console, metrics, chromium):
    with serving_fake(metrics) as url:
        console = open_console()
        console.page.goto(url)
        console.until(lambda: console.text("#updated"))
    shown = console.text("#updated").removeprefix("Updated ")
    console.page.clock.run_for(2000)
    console.until(lambda: console.text("#state") == "No answer")
    alert = console.text("[role=alert]")
    assert alert.startswith("The server does not answer.")
    assert shown in alert
    assert console.page.title().startswith("No answer")
    # What was known is still shown.
    assert len(console.table("worker-rows")) == 2
    with serving_fake(metrics, int(url.rstrip("/").rpartition(":")[2])):
        console.page.clock.run_for(2000)
        console.until(lambda: console.text("#state") == "Serving")
        assert console.text("[role=alert]") == ""


def test_an_answer_that_is_none(open_console, metrics):
    console = open_console()
    metrics.failing["/metrics"] = 503
    console.page.clock.run_for(2000)
    console.until(lambda: "answers with the status 503" in console.text("[role=alert]"))
    metrics.failing = {"/codebooks.json": 500}
    console.page.clock.run_for(2000)
    console.until(lambda: "codebooks.json answers with the status 500" in console.text("[role=alert]"))
    metrics.failing = {}
    console.page.clock.run_for(2000)
    console.until(lambda: console.text("[role=alert]") == "")


def test_a_hidden_page_does_not_ask(open_console, metrics):
    console = open_console()
    console.page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => window.isHidden ?? false, configurable: true})"
    )
    become = "hidden => { window.isHidden = hidden; document.dispatchEvent(new Event('visibilitychange')); }"
    console.page.evaluate(become, True)
    asked = len(metrics.requests)
    console.page.clock.run_for(60_000)
    assert len(metrics.requests) == asked
    console.page.evaluate(become, False)
    console.until(lambda: len(metrics.requests) >= asked + 2)


def test_updates_can_be_paused(open_console, metrics):
    console = open_console()
    console.page.click("#pause")
    assert console.page.get_attribute("#pause", "aria-pressed") == "true"
    asked = len(metrics.requests)
    console.page.clock.run_for(60_000)
    assert len(metrics.requests) == asked
    console.page.click("#pause")
    console.until(lambda: len(metrics.requests) >= asked + 2)


def test_it_asks_once_at_a_time(open_console, metrics):
    console = open_console()
    metrics.gate.clear()
    asked = len(metrics.requests)
    console.page.clock.run_for(2000)
    console.until(lambda: len(metrics.requests) > asked)
    for _ in range(6):
        console.page.click("#pause")
    shown = console.text("#updated")
    metrics.gate.set()
    console.until(lambda: console.text("#updated") != shown)
    assert len(metrics.requests) == asked + 2


def test_after_a_long_pause_rates_begin_again(open_console, metrics):
    where = {"codebook": "faces", "operation": "encode", "status": "OK"}
    metrics.add("requests_total", 1, **where)
    console = open_console()
    console.page.click("#pause")
    console.page.clock.run_for(600_000)
    metrics.add("requests_total", 60_000, **where)
    shown = console.text("#updated")
    console.page.click("#pause")
    console.until(lambda: console.text("#updated") != shown)
    assert console.text("#tile-requests .value") == UNKNOWN


def test_a_digest_is_copied(open_console):
    console = open_console(permissions=["clipboard-read", "clipboard-write"])
    console.page.get_by_role("button", name="Copy the digest of speech").click()
    console.until(lambda: console.text("#said") == "The digest of speech is copied.")
    assert console.page.evaluate("navigator.clipboard.readText()") == "5e" * 32


def test_a_digest_is_selected_where_there_is_no_clipboard(open_console):
    console = open_console()
    console.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    console.page.get_by_role("button", name="Copy the digest of speech").click()
    console.until(lambda: console.text("#said") == "The digest of speech is selected.")
    assert console.page.evaluate("String(getSelection())") == "5e" * 32
