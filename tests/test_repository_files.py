"""The files that GitHub, pre-commit and editors read: they parse, and what they run is what `make check` and CI run."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml

from vqserve import __version__

ROOT = Path(__file__).parents[1]
FORMS = ("bug", "feature")


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def recipe(target):
    """Return the commands of a Makefile target."""
    [body] = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return body


def test_the_workflow_runs_what_ci_runs():
    workflow = read(".github/workflows/ci.yml")
    # YAML reads the key `on` as true.
    assert workflow[True].keys() == {"push", "pull_request"}
    [job] = workflow["jobs"].values()
    checkout, python, run = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert python["uses"].startswith("actions/setup-python@")
    assert python["with"]["python-version"] == "3.11"
    assert run == {"run": ".ci/run"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_hooks_run_the_tools_of_make_check():
    [repository] = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/")
        assert tool.replace(".venv/bin/", "$(BIN)/") in recipe("check")


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in form["body"])


def test_issue_chooser_and_dependabot():
    [contact] = read(".github/ISSUE_TEMPLATE/config.yml")["contact_links"]
    assert contact["url"] in (ROOT / "SECURITY.md").read_text()
    settings = read(".github/dependabot.yml")
    assert settings["version"] == 2
    assert {update["package-ecosystem"] for update in settings["updates"]} == {"github-actions", "docker"}


def test_the_citation_names_this_version():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__


def test_the_editor_knows_the_line_length():
    settings = configparser.ConfigParser()
    settings.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    assert f"line-length = {settings['*']['max_line_length']}\n" in (ROOT / "pyproject.toml").read_text()


def test_the_changelog_has_the_form_that_it_describes():
    sections = re.split(r"^## (.+)\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    titles = sections[::2]
    releases = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - \d{4}-\d\d-\d\d", title) for title in titles[1:]]
    assert titles[0] == "Unreleased"
    assert all(releases), titles
    versions = [tuple(map(int, release.groups())) for release in releases if release]
    assert versions == sorted(set(versions), reverse=True)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for body in sections[1::2]:
        groups = re.findall(r"^### (.+)$", body, re.MULTILINE)
        assert groups == [group for group in order if group in groups]
