"""`make sbom`: valid CycloneDX, with the packages of the daemon and no tool."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import sbom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

import vqserve

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    target = tmp_path_factory.mktemp("sbom") / "new" / "sbom.json"
    assert sbom.main(target) == 0
    return target.read_text()


@pytest.fixture
def bill(text):
    return json.loads(text)


def test_it_is_valid(text):
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"purl"', '"pearl"')) is not None


def test_it_describes_this_release(bill):
    component = bill["metadata"]["component"]
    assert (component["name"], component["version"]) == ("vqserve", vqserve.__version__)
    assert component["licenses"][0]["license"]["id"] == "Apache-2.0"


def test_it_lists_the_pinned_packages_of_the_daemon(bill):
    listed = {canonicalize_name(one["name"]): one["version"].partition("+")[0] for one in bill["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    assert {canonicalize_name(re.match(r"[\w-]+", line)[0]) for line in direct} <= listed.keys()
    assert not {"pytest", "ruff", "mkdocs", "cyclonedx-bom"} & listed.keys()
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pins.get(name, version) for name, version in listed.items()} == listed
    assert all(one["purl"].startswith("pkg:pypi/") for one in bill["components"])


def test_it_says_what_needs_what(bill):
    needs = {one["ref"]: one.get("dependsOn", []) for one in bill["dependencies"]}
    names = {one["bom-ref"]: canonicalize_name(one["name"]) for one in bill["components"]}
    direct = {names[ref] for ref in needs[bill["metadata"]["component"]["bom-ref"]]}
    assert {"grpcio", "numpy", "torch"} <= direct
    torch = next(ref for ref, name in names.items() if name == "torch")
    assert "sympy" in {names[ref] for ref in needs[torch]}


def test_it_has_no_path_of_this_machine_and_no_time(text, tmp_path):
    assert str(ROOT) not in text
    assert "file:" not in text
    assert sbom.main(tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_text() == text
