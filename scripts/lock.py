"""Remakes the lower parts of constraints.txt: the newest releases that fit together, as pip resolves them.

The upper part is written by hand and applies while the rest is resolved. Resolving installs nothing. The image installs
what the daemon and the build of the wheel need, so these have parts of their own (scripts/image_requirements.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from image_requirements import BUILD, DEVELOPMENT, RUNTIME, runtime_requirements
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

_ROOT = Path(__file__).resolve().parents[1]
_LOCK = _ROOT / "constraints.txt"
# Torch's CUDA wheels name their own; its CPU wheels have none.
_OF_TORCH = ("cuda-", "nvidia-")


def main() -> int:
    """Resolve and write; return the exit code."""
    kept = _LOCK.read_text().partition(RUNTIME)[0]
    pyproject = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "kept.txt"
        constraints.write_text(kept)
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "-c", str(constraints), *_requirements(pyproject)]
        if subprocess.run(command, check=False).returncode:  # noqa: S603
            return 1
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    by_hand = {canonicalize_name(line.partition("==")[0]) for line in kept.splitlines() if "==" in line}
    # Without the local part of the version: one lock for torch's CPU and CUDA wheels, and for rebuilt wheels.
    pins = {canonicalize_name(package["name"]): package["version"].partition("+")[0] for package in packages}
    requires = {canonicalize_name(package["name"]): package.get("requires_dist", []) for package in packages}
    runtime = closure(runtime_requirements(pyproject), requires)
    build = closure(pyproject["build-system"]["requires"], requires) - runtime
    text = kept
    for rule, names in ((RUNTIME, runtime), (BUILD, build), (DEVELOPMENT, pins.keys() - runtime - build)):
        listed = sorted(name for name in names - by_hand if not name.startswith(_OF_TORCH))
        text += "".join([f"{rule}\n", *(f"{name}=={pins[name]}\n" for name in listed)])
    _LOCK.write_text(text)
    return 0


def closure(requirements: Iterable[str], requires: Mapping[NormalizedName, Iterable[str]]) -> set[NormalizedName]:
    """Return the canonical names of all packages that requirements need here, directly or not.

    Args:
        requirements: as in pyproject.toml.
        requires: what each package requires, by its canonical name.
    """
    found: set[NormalizedName] = set()
    seen: set[tuple[NormalizedName, str]] = set()
    # With the extra for which a requirement is read: "" for none.
    waiting = [(line, "") for line in requirements]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(needed, wanted) for needed in requires[name]]
    return found


def _requirements(pyproject: dict[str, Any]) -> list[str]:
    """Return what the project, its extras and its build require, without the project itself."""
    project = pyproject["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), pyproject["build-system"]["requires"]]
    return [line for lines in lists for line in lines if not line.startswith(f"{project['name']}[")]


if __name__ == "__main__":
    sys.exit(main())
