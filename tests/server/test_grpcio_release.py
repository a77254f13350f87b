"""The range of grpcio releases that are tested: one range everywhere, and a warning outside of it."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import tomllib
from pathlib import Path

import pytest

from vqserve_server import app, supervisor
from vqserve_server.config import ServeConfig
from vqserve_server.errors import StartError
from vqserve_server.grpcio_release import BELOW, OLDEST, is_tested

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("1.72.1", False),
        (OLDEST, True),
        ("1.85.1", True),
        ("1.85.12", True),
        ("1.86.0rc1", False),
        ("1.86.0", False),
        ("2.0.0", False),
        ("unknown", False),
    ],
)
def test_range(release, expected):
    assert is_tested(release) is expected


def test_pyproject_has_the_same_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    of_grpc = [one for one in requirements if one.startswith("grpcio")]
    assert of_grpc == [
        f"{name}>={OLDEST},<{BELOW}" for name in ("grpcio", "grpcio-health-checking", "grpcio-reflection")
    ]


def test_make_test_grpcio_runs_on_both_ends():
    makefile = (ROOT / "Makefile").read_text()
    ends = dict(re.findall(r"^GRPCIO_(OLDEST|NEWEST) := (\S+)$", makefile, re.MULTILINE))
    assert ends["OLDEST"] == OLDEST
    assert is_tested(ends["NEWEST"])


def test_the_constraints_are_tested():
    [pin] = re.findall(r"^grpcio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert is_tested(pin)


@pytest.mark.parametrize("run", [app.run, supervisor.run])
@pytest.mark.parametrize("release", ["1.99.0", "1.85.1"])
def test_an_untested_release_is_logged_once_at_start(run, release, monkeypatch, caplog):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release if name == "grpcio" else installed(name))
    monkeypatch.setattr("vqserve_server.event_log.set_up", lambda level, **more: None)
    with caplog.at_level(logging.WARNING), pytest.raises(StartError):
        run(["/nothing/here.safetensors"], ServeConfig())
    lines = [record.getMessage() for record in caplog.records if "grpcio" in record.getMessage()]
    if is_tested(release):
        assert lines == []
    else:
        [line] = lines
        for word in (release, OLDEST, BELOW):
            assert word in line
        assert {record.levelname for record in caplog.records} == {"WARNING"}
