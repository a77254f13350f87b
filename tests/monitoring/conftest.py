"""A real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.certificates import free_port
from support.waiting import eventually

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
Labels = dict[str, str]


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus with the example's rules, and how to ask it."""

    url: str

    def query(self, expression: str) -> list[tuple[Labels, float]]:
        """Evaluate an expression now."""
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}") as answer:  # noqa: S310
                data = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{expression}: {error.read().decode()}")
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def value(self, expression: str) -> float:
        """Evaluate an expression that has one sample, or none: that is 0."""
        samples = self.query(expression)
        assert len(samples) <= 1, samples
        return samples[0][1] if samples else 0.0

    def scrapes(self) -> float:
        """Return how many scrapes there were, of which the last one may be missing."""
        return self.value('max(count_over_time(up{job="vqserve"}[1h]))')

    def next_scrape(self) -> None:
        """Wait for a scrape that began after this call: the second one from now."""
        before = self.scrapes()
        eventually(lambda: self.scrapes() >= before + 2)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[int], Prometheus]]:
    """Start one that scrapes a metrics port of this machine: prometheus(9464) -> Prometheus."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no prometheus on this machine (Debian's package prometheus)")
    processes = []

    def start(metrics_port: int) -> Prometheus:
        config: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        [job] = config["scrape_configs"]
        [targets] = job["static_configs"]
        assert targets == {"targets": ["127.0.0.1:9464"]}
        targets["targets"] = [f"127.0.0.1:{metrics_port}"]
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
        # JSON is YAML.
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        address = f"127.0.0.1:{free_port()}"
        command = [program, "--config.file", tmp_path / "prometheus.yml", "--storage.tsdb.path", tmp_path / "data"]
        processes.append(
            subprocess.Popen(
                [*map(str, command), f"--web.listen-address={address}", "--log.level=warn"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        made = Prometheus(f"http://{address}")
        eventually(lambda: _is_ready(made))
        eventually(lambda: made.value('up{job="vqserve"}') == 1)
        return made

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _is_ready(prometheus: Prometheus) -> bool:
    try:
        with urllib.request.urlopen(f"{prometheus.url}/-/ready"):  # noqa: S310
            return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def rules() -> dict[str, dict[str, Any]]:
    """The alert rules by name."""
    [group] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    """The dashboard."""
    return dict(json.loads((MONITORING / "dashboard.json").read_text()))
