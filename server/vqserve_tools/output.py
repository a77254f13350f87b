"""The option of the tools that names the codebook file to write."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqserve_server.codebook_files import IMPORTED, NAME, SUFFIX


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the codebook file to write."""
    parser.add_argument(
        "-o",
        "--out",
        type=_new_codebook_path,
        required=True,
        metavar="OUT.safetensors",
        help="the codebook file to write; its name must end so",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")


def _new_codebook_path(text: str) -> Path:
    """Return the path of a codebook file to be written, for argparse.

    A name that cannot be served is rejected, not corrected: the user will look for the file under that name.

    Raises:
        argparse.ArgumentTypeError: it does not end in .safetensors, or its stem is no name for a codebook.
    """
    path = Path(text)
    if path.suffix != SUFFIX:
        better = f"{path.stem if path.suffix.lower() in IMPORTED else path.name}{SUFFIX}"
        raise argparse.ArgumentTypeError(
            f"{path.name!r} must end in {SUFFIX}, or a served folder leaves it out: name it {better!r}"
        )
    if not NAME.fullmatch(path.stem):
        raise argparse.ArgumentTypeError(
            f"{path.name!r} cannot be served under its name: use letters, digits and . _ + -"
        )
    return path
