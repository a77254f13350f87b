"""The files of examples/deploy: they parse, and their flags and variables exist."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest
import yaml

from vqserve_server.config import ServeConfig
from vqserve_tools.cli import main

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
DRAIN_S = ServeConfig.drain_seconds


@pytest.fixture
def settings(monkeypatch):
    """Return what `vqserved` with these words would serve, and the settings."""

    def read(words):
        seen = {}
        monkeypatch.setattr("vqserve_server.app.run", lambda sources, config, *, worker: seen.update(vars()) or 0)
        assert main(words) == 0
        return seen["sources"], seen["config"]

    return read


def test_compose(settings):
    [(name, service)] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items()
    assert name == service["image"] == "vqserve"
    sources, config = settings(service["command"])
    assert service["volumes"] == [f"./books:{sources[0]}:ro"]
    assert config.rpc.host == "0.0.0.0"  # noqa: S104
    assert service["ports"] == [f"127.0.0.1:{config.rpc.port}:{config.rpc.port}"]
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S


def test_kubernetes(settings):
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == pod["metadata"]["labels"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > DRAIN_S
    assert pod["spec"]["enableServiceLinks"] is False
    [container] = pod["spec"]["containers"]
    sources, config = settings(container["args"])
    assert config.rpc.host == "0.0.0.0"  # noqa: S104
    [port] = container["ports"]
    assert port["containerPort"] == config.rpc.port
    assert [one["targetPort"] for one in service["spec"]["ports"]] == [port["name"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": config.rpc.port}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert [mounts["codebooks"]] == sources


def test_systemd(settings):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "vqserve.service")
    assert unit.sections() == ["Unit", "Service", "Install"]
    command, *words = shlex.split(unit["Service"]["ExecStart"])
    assert command.endswith("/bin/vqserved")
    assert settings(words)[0] == ["/srv/codebooks"]
    assert unit["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(unit["Service"]["TimeoutStopSec"]) > DRAIN_S
