"""What the daemon is told to serve: files, folders of them, names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vqserve_server.codebook_path import SUFFIX
from vqserve_server.errors import StartError

DEMO_NAME = "demo"
DEMO_PATH = Path(__file__).parent / "assets" / "demo.safetensors"
_NAME = re.compile(r"[\w.+-]{1,128}")


def find_codebooks(sources: Sequence[str]) -> dict[str, Path]:
    """Return the codebook files to serve by name, in the order given; a folder's in name order.

    Args:
        sources: paths of files or folders, or NAME=FILE; none: the demo codebook.

    Raises:
        StartError: nothing is there, a folder cannot be read, or two have one name.
    """
    found: dict[str, Path] = {}
    for name, path in _named_paths(sources):
        if not _NAME.fullmatch(name):
            raise StartError(f"{name!r} is no name for a codebook: use letters, digits and . _ + - (NAME=PATH)")
        if name in found:
            raise StartError(f"two codebooks are named {name!r}: {found[name]} and {path}; name one (NAME=PATH)")
        found[name] = path
    return found


def _named_paths(sources: Sequence[str]) -> list[tuple[str, Path]]:
    if not sources:
        return [(DEMO_NAME, DEMO_PATH)]
    pairs = []
    for source in sources:
        name, equals, path_text = source.partition("=")
        if not equals or Path(source).exists():
            name, path_text = "", source
        path = Path(path_text)
        if not path.exists():
            raise StartError(f"no such file or folder: {path}")
        if not path.is_dir():
            pairs.append((name or path.stem, path))
            continue
        if name:
            raise StartError(f"{path} is a folder: a name goes with a file")
        files = _codebook_files(path)
        if not files:
            raise StartError(f"no *{SUFFIX} file in {path}")
        pairs += [(file.stem, file) for file in files]
    return pairs


def _codebook_files(folder: Path) -> list[Path]:
    # Not glob, to which a folder that may not be read is an empty one: a mounted folder often belongs to somebody else.
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except PermissionError as error:
        hint = f"{error.strerror}; let it (chmod a+rX), or serve as another user"
        raise StartError(f"user {os.geteuid()} cannot read the folder {folder}: {hint}") from None
