"""Which module may use which: the contracts of pyproject.toml, which docs/architecture.md describes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = {
    contract["name"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
LAYERS = [module for layer in CONTRACTS["the server is built in layers"]["layers"] for module in layer.split(" | ")]
BROKEN = """
[importlinter]
root_package = vqserve_server
include_external_packages = True

[importlinter:contract:1]
name = gRPC is where it should be
type = forbidden
source_modules = vqserve_server.rpc
forbidden_modules = grpc
"""


def lint(*arguments):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_contracts_are_kept():
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in done.stdout


def test_a_broken_contract_is_found(tmp_path):
    config = tmp_path / "importlinter.ini"
    config.write_text(BROKEN)
    done = lint("--config", str(config))
    assert done.returncode == 1
    assert "gRPC is where it should be BROKEN" in done.stdout


def test_every_module_of_the_server_is_in_a_layer():
    server = ROOT / "server/vqserve_server"
    modules = {path.stem for path in server.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(LAYERS) == sorted(modules - {"__init__", "__main__"})


def test_the_contract_about_grpc_lists_all_layers_below_rpc():
    below = LAYERS[LAYERS.index("rpc") + 1 :]
    listed = CONTRACTS["the layers below rpc do not import grpc"]["source_modules"]
    assert sorted(listed) == sorted(f"vqserve_server.{layer}" for layer in below)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_architecture_page_has_the_layer(layer):
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    named = {name.strip("`/") for row in rows for name in row.split(", ")}
    assert layer in named
