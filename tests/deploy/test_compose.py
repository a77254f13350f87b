"""examples/deploy/compose.yaml: its settings are the server's, and it gives the container no more than it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from vqserve_server.config import ServeConfig

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
DOCKERFILE = (Path(__file__).parents[2] / "Dockerfile").read_text()


@pytest.fixture
def service():
    [(name, service)] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items()
    assert name == service["image"] == "vqserve"
    return service


def test_the_server_understands_its_settings(service, settings):
    sources, config = settings(service["command"])
    assert service["volumes"] == [f"./books:{sources[0]}:ro"]
    assert config.rpc.host == "0.0.0.0"  # noqa: S104
    assert service["ports"] == [f"127.0.0.1:{config.rpc.port}:{config.rpc.port}"]
    assert int(service["stop_grace_period"].removesuffix("s")) > ServeConfig.drain_seconds


def test_the_container_can_write_to_tmp_alone(service):
    assert service["read_only"] is True
    [tmpfs] = service["tmpfs"]
    assert tmpfs.startswith("/tmp:")  # noqa: S108
    assert ":/tmp:" in re.search(r"^.*>> /etc/passwd$", DOCKERFILE, re.MULTILINE)[0]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_health_check_is_the_image_s(service):
    check = service["healthcheck"]
    written = re.search(r"^HEALTHCHECK (.*) CMD (.*)$", DOCKERFILE, re.MULTILINE)
    flags = dict(flag.removeprefix("--").split("=") for flag in written[1].split())
    assert check["test"] == ["CMD", *json.loads(written[2])]
    names = {"start_period": "start-period", "retries": "retries", "interval": "interval", "timeout": "timeout"}
    assert {name: str(check[name]) for name in names} == {name: flags[flag] for name, flag in names.items()}
