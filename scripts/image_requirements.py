"""Writes what the stages of the Dockerfile install, with their own pins: a changed tool remakes none of them.

    python scripts/image_requirements.py DIR

DIR/runtime is for the daemon, DIR/build for the wheel, DIR/kernels for compiling the kernels of the GPU; all have a
requirements.txt and a constraints.txt. Needs
nothing but Python, and reads pyproject.toml and constraints.txt of the working folder.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

# The parts of constraints.txt begin with these lines (scripts/lock.py).
RUNTIME = "# Made by `make lock`, for the daemon:"
BUILD = "# Made by `make lock`, for building the wheel:"
# What compiles the kernels. The image does not have it, although torch's wheel for CUDA asks for it.
COMPILER = "triton"
DEVELOPMENT = "# Made by `make lock`, for development alone:"


def main(folder: Path) -> None:
    """Write the files."""
    pyproject = tomllib.loads(Path("pyproject.toml").read_text())
    runtime, others = Path("constraints.txt").read_text().split(f"{BUILD}\n")
    build = others.partition(DEVELOPMENT)[0]
    _write(folder / "runtime", runtime_requirements(pyproject), runtime)
    development = pyproject["project"]["optional-dependencies"]["dev"]
    _write(folder / "kernels", [line for line in development if line.startswith(f"{COMPILER}>")], runtime)
    _write(folder / "build", pyproject["build-system"]["requires"], runtime + build)


def runtime_requirements(pyproject: dict[str, Any]) -> list[str]:
    """Return what `vqserve[server]` requires, from the parsed pyproject.toml."""
    project = pyproject["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["server"]]


def _write(folder: Path, requirements: list[str], constraints: str) -> None:
    folder.mkdir(parents=True)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements))
    (folder / "constraints.txt").write_text(constraints)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
