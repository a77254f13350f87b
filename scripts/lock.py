"""Remakes the lower part of constraints.txt: the newest releases that fit together, as pip resolves them (`make lock`).

The upper part is written by hand and applies while the rest is resolved. Resolving installs nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_LOCK = _ROOT / "constraints.txt"
_RULE = "# Made by `make lock`:"
# Torch's CUDA wheels name their own; its CPU wheels have none.
_OF_TORCH = ("cuda-", "nvidia-")


def main() -> int:
    """Resolve and write; return the exit code."""
    kept = _LOCK.read_text().partition(_RULE)[0]
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "kept.txt"
        constraints.write_text(kept)
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "-c", str(constraints), *_requirements()]
        if subprocess.run(command, check=False).returncode:  # noqa: S603
            return 1
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    by_hand = {_normal(line.partition("==")[0]) for line in kept.splitlines() if "==" in line}
    # Without the local part of the version: one lock for torch's CPU and CUDA wheels, and for rebuilt wheels.
    pins = {_normal(package["name"]): package["version"].partition("+")[0] for package in packages}
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins.keys() - by_hand) if not name.startswith(_OF_TORCH)]
    _LOCK.write_text(f"{kept}{_RULE}\n{''.join(lines)}")
    return 0


def _requirements() -> list[str]:
    """Return what the project and its extras require, without the project itself."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [line for lines in lists for line in lines if not line.startswith(f"{project['name']}[")]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    sys.exit(main())
