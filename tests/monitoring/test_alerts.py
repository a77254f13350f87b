"""The alert rules on invented series, as promtool computes them: each fires on its own fault, none without one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from vqserve_server.metrics.families import FAMILIES

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
RULES = {rule["alert"]: rule for rule in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]}
ENDS_AT = "90m"

# A quarter of an hour each of 15 s; `a+bxn` is promtool's: a, then n steps of b.
HEALTHY = {
    'up{job="vqserve"}': "1x400",
    'vqserve_workers{job="vqserve"}': "2x400",
    'vqserve_workers_ready{job="vqserve"}': "2x400",
    'vqserve_serving{job="vqserve",worker="0"}': "1x400",
    'vqserve_worker_restarts_total{job="vqserve"}': "3x400",
    'vqserve_refused_total{job="vqserve",reason="rows"}': "0+1x400",
    'vqserve_expired_total{job="vqserve",where="queue"}': "0+1x400",
    'vqserve_requests_total{job="vqserve",status="OK",codebook="a",operation="encode"}': "0+1000x400",
    'vqserve_requests_total{job="vqserve",status="INVALID_ARGUMENT",codebook="a",operation="encode"}': "0+100x400",
    'vqserve_requests_total{job="vqserve",status="INTERNAL",codebook="a",operation="encode"}': "0+0x400",
    'vqserve_request_seconds_bucket{job="vqserve",codebook="a",operation="encode",le="0.5"}': "0+1000x400",
    'vqserve_request_seconds_bucket{job="vqserve",codebook="a",operation="encode",le="2.5"}': "0+1000x400",
    'vqserve_request_seconds_bucket{job="vqserve",codebook="a",operation="encode",le="+Inf"}': "0+1000x400",
    'vqserve_queue_requests{job="vqserve",worker="0"}': "700x400",
    'vqserve_queue_requests_limit{job="vqserve",worker="0"}': "1000x400",
    'vqserve_queue_rows{job="vqserve",worker="0"}': "700x400",
    'vqserve_queue_rows_limit{job="vqserve",worker="0"}': "1000x400",
    'vqserve_queue_bytes{job="vqserve",worker="0"}': "700x400",
    'vqserve_queue_bytes_limit{job="vqserve",worker="0"}': "1000x400",
    # promtool's time begins at zero.
    'vqserve_certificate_expiry_timestamp_seconds{job="vqserve",file="server.pem"}': f"{30 * 86400}x400",
    'vqserve_reloads_total{job="vqserve",result="ok"}': "0+1x400",
    'vqserve_reloads_total{job="vqserve",result="rejected"}': "2x400",
    'vqserve_codebook_drift_bits{job="vqserve",codebook="a",stage="0"}': "0.02x400",
    'vqserve_codebook_error_ratio{job="vqserve",codebook="a"}': "1.1x400",
    'vqserve_codebook_used_ratio{job="vqserve",codebook="a",stage="0"}': "0.9x400",
    'vqserve_codebook_dead_codes{job="vqserve",codebook="a",stage="0"}': "100x400",
    # Few rows were sampled of this one.
    'vqserve_codebook_used_ratio{job="vqserve",codebook="new",stage="0"}': "0.1x400",
    'vqserve_codebook_dead_codes{job="vqserve",codebook="new",stage="0"}': "900x400",
    'vqserve_codebook_window_rows{job="vqserve",codebook="a",stage="0"}': "20000x400",
    'vqserve_codebook_window_rows{job="vqserve",codebook="new",stage="0"}': "7000x400",
}
ILL = {
    "VqserveDown": {'up{job="vqserve"}': "0x400"},
    "VqserveNoWorker": {'vqserve_workers_ready{job="vqserve"}': "0x400"},
    "VqserveNotServing": {'vqserve_serving{job="vqserve",worker="0"}': "0x400"},
    "VqserveWorkerRestarts": {'vqserve_worker_restarts_total{job="vqserve"}': "0x340 1x60"},
    "VqserveRefusals": {'vqserve_refused_total{job="vqserve",reason="rows"}': "0+20x400"},
    "VqserveExpired": {'vqserve_expired_total{job="vqserve",where="queue"}': "0+20x400"},
    "VqserveErrors": {
        'vqserve_requests_total{job="vqserve",status="INTERNAL",codebook="a",operation="encode"}': "0+2x400"
    },
    "VqserveLatency": {
        'vqserve_request_seconds_bucket{job="vqserve",codebook="a",operation="encode",le="0.5"}': "0+900x400"
    },
    "VqserveQueueNearLimit": {'vqserve_queue_bytes{job="vqserve",worker="0"}': "900x400"},
    "VqserveCertificateExpires": {
        'vqserve_certificate_expiry_timestamp_seconds{job="vqserve",file="server.pem"}': f"{10 * 86400}x400"
    },
    "VqserveReloadFailed": {'vqserve_reloads_total{job="vqserve",result="rejected"}': "2x340 3x60"},
    "VqserveCodebookDrift": {'vqserve_codebook_drift_bits{job="vqserve",codebook="a",stage="0"}': "0.2x400"},
    "VqserveCodebookError": {'vqserve_codebook_error_ratio{job="vqserve",codebook="a"}': "2x400"},
    "VqserveDeadCodes": {
        'vqserve_codebook_used_ratio{job="vqserve",codebook="a",stage="0"}': "0.3x400",
        'vqserve_codebook_dead_codes{job="vqserve",codebook="a",stage="0"}': "700x400",
    },
}


def promtool(*arguments: object) -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("there is no promtool on this machine (Debian's package prometheus)")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_valid():
    assert "14 rules found" in promtool("check", "config", MONITORING / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", MONITORING / "alerts.yml")


def test_the_series_here_are_of_metrics_that_exist():
    known = {f"{family.full_name}{end}" for family in FAMILIES.values() for end in ("", "_bucket")}
    assert {name.partition("{")[0] for name in HEALTHY} - known == {"up"}


def test_every_alert_is_tested():
    assert RULES.keys() == ILL.keys()


@pytest.mark.parametrize("alert", [None, *ILL])
def test_an_alert_fires_on_its_own_fault_only(alert, tmp_path):
    series = {**HEALTHY, **ILL.get(alert, {})}
    firing = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": ENDS_AT,
        "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
    }
    test = {
        "rule_files": [str(MONITORING / "alerts.yml")],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [firing],
            }
        ],
    }
    # JSON is YAML.
    (tmp_path / "test.yml").write_text(json.dumps(test))
    promtool("test", "rules", tmp_path / "test.yml")


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_says_what_is_wrong_and_what_to_do(alert):
    rule = RULES[alert]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert {"summary", "description"} == rule["annotations"].keys()
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert f"`{alert}`" in page
