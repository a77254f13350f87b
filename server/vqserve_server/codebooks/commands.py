"""`vqserved inspect`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve_server.codebooks.codebook_file import load_codebook
from vqserve_server.codebooks.report import inspect

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_inspect_parser(subparsers: Subparsers) -> None:
    """Register `inspect`; its parser's `run` takes the arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "inspect", help="describe a codebook file", description="Describe a codebook file: what it is and how it looks."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a codebook file")
    parser.add_argument("--json", action="store_true", help="write one JSON object, with nothing cut")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Write the report of a codebook file to stdout; return the exit status.

    Raises:
        CodebookFileError: the file is no codebook.
    """
    report = inspect(load_codebook(args.file))
    columns = shutil.get_terminal_size(fallback=(120, 0)).columns
    sys.stdout.write(f"{json.dumps(report.as_dict())}\n" if args.json else report.as_text(columns))
    return 0
