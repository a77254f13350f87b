"""What codebook files are called."""

from __future__ import annotations

import argparse
from pathlib import Path

SUFFIX = ".safetensors"


def new_codebook_path(text: str) -> Path:
    """Return the path of a codebook file to be written, for argparse.

    Refused, not mended, where the suffix is missing: whoever named the file will look for it under that name.

    Raises:
        argparse.ArgumentTypeError: it does not end in .safetensors.
    """
    path = Path(text)
    if path.suffix != SUFFIX:
        raise argparse.ArgumentTypeError(
            f"{path.name!r} must end in {SUFFIX}, or a served folder leaves it out: name it {path.name + SUFFIX!r}"
        )
    return path
