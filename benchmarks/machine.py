"""The name of the machine, which the files of results have."""

from __future__ import annotations

import argparse
import os
import platform


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the argument `--machine`."""
    name = f"{platform.machine()}-{os.cpu_count()}cores"
    parser.add_argument("--machine", default=name, help="name for the results")
