"""Pages of the documentation: their examples, and running them as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from vqserve_client.cli import main as vqserve
from vqserve_tools.cli import main as vqserved

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(page):
    return FENCED.sub("", page.read_text())


def examples(page, language):
    return [body for tag, body in FENCED.findall((ROOT / page).read_text()) if tag == language]


COMMANDS = {"vqserve": vqserve, "vqserved": vqserved}


def commands(page):
    """Return the lines of a page's shell examples that run `vqserve` or `vqserved`, as lists of words."""
    lines = [line for tag in ("", "sh") for body in examples(page, tag) for line in body.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] in COMMANDS]


def run(source, target=""):
    """Run an example against a server and return its names."""
    names = {"__name__": "example"}
    exec(source.replace("localhost:50051", target), names)  # noqa: S102
    return names


# What these pages do before, or without, the shell of this test: install, start Python, and go into a container.
NOT_RUN = ("git clone ", "python3 -m venv ", "pip install ", "make ", "docker ", ". ")


def follow(page, vqserved, folder, run_python, target=""):
    """Run a page's examples in their order, as printed, in an empty folder, with real servers of their own.

    Args:
        page: its path in the repository.
        vqserved: the fixture that starts a server.
        folder: the folder in which the reader is.
        run_python: called for each Python example, with its source and the address of the server.
        target: address of the server that runs before the page starts one.
    """
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    for language, body in FENCED.findall((ROOT / page).read_text()):
        if language == "python":
            run_python(body, target)
        elif language == "sh":
            lines = [line for line in body.splitlines() if not line.startswith(NOT_RUN)]
            served = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("vqserved serve")]
            # A short training: what it learns is not tested here.
            script = "\n".join(line for line in lines if not line.startswith("vqserved serve"))
            script = script.replace("vqserved train", "vqserved train --steps=1")
            environ = {**os.environ, "PATH": path, "VQSERVE_TARGET": target}
            subprocess.run(["sh", "-e", "-c", script], cwd=folder, env=environ, check=True)
            for sources in served:
                target = vqserved(*(folder / source for source in sources), "--device", "cpu").target
