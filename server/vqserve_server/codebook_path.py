"""What codebook files are called, and their codebooks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from vqserve.codebook_info import VERSION_MARK

SUFFIX = ".safetensors"
# Of what codebooks are imported from; people put it beside codebooks in the belief that it is served.
IMPORTED = frozenset({".npy", ".npz", ".pt", ".pth", ".ckpt", ".bin", ".th"})
# What a codebook can be called, and so the stem of its file.
NAME = re.compile(r"[\w+-][\w.+-]{0,127}")


def version_order(name: str) -> tuple[str, int]:
    """Return by what names are sorted: versions as numbers, after a name without one."""
    base, _, version = name.partition(VERSION_MARK)
    return base, int(version or 0)


def latest(names: Iterable[str]) -> dict[str, str]:
    """Return what each name without a version stands for: "book" for "book@3", if 3 is the greatest of its versions."""
    return {version_order(name)[0]: name for name in sorted(names, key=version_order)}


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

    Refused, not mended, where it cannot be served: whoever named the file will look for it under that name.

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
