"""The files that a tool writes: their options on the command line, and whether they may be written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from vqserve.errors import InvalidOption
from vqserve_server.codebook_files import IMPORTED, NAME, SUFFIX


def add_output(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that name the codebook file to write.

    Args:
        parser: parser of the command.
        required: whether argparse rejects a command line without the name.
    """
    parser.add_argument(
        "-o",
        "--out",
        type=_new_codebook_path,
        required=required,
        metavar="OUT.safetensors",
        help="codebook file to write; the name must end in .safetensors",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def check_output(path: Path, *, force: bool, sources: Iterable[Path | None] = ()) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Args:
        path: file to write.
        force: whether an existing file may be replaced.
        sources: files that the tool reads; None is skipped.

    Raises:
        InvalidOption: `path` is a folder, its folder does not exist, it is one of the sources, or it exists and `force`
            is false.
        PermissionError: this user cannot write into the folder.
    """
    if not path.parent.is_dir():
        raise InvalidOption(f"there is no folder {path.parent}: make it first")
    if path.is_dir():
        raise InvalidOption(f"{path} is a folder: name a file in it")
    # There may be a million sources.
    for source in sources if path.exists() else ():
        if source is not None and source.exists() and path.samefile(source):
            raise InvalidOption(f"{path} is what is read: name another file to write")
    if path.exists() and not force:
        raise InvalidOption(f"{path} is there already: pass --force to replace it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        hint = "let it, or name another folder or user"
        raise PermissionError(f"user {os.geteuid()} cannot write into the folder {path.parent}: {hint}")


def check_plot(path: Path, *, force: bool, sources: Iterable[Path | None] = ()) -> None:
    """Check, before the work, that a plot can be drawn and written.

    Args:
        path: PNG file to write.
        force: whether an existing file may be replaced.
        sources: files that the tool reads.

    Raises:
        InvalidOption: the file exists or is a source, its folder does not exist, or matplotlib is missing.
        PermissionError: this user cannot write into the folder.
    """
    check_output(path, force=force, sources=sources)
    try:
        import matplotlib.figure  # noqa: F401, PLC0415
    except ImportError:
        raise InvalidOption(f"{path.name} cannot be drawn without matplotlib: pip install 'vqserve[plot]'") from None


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


def png_path(text: str) -> Path:
    """Return the path of a picture to be written, for argparse.

    Raises:
        argparse.ArgumentTypeError: it does not end in .png.
    """
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"{path.name!r} must end in .png")
    return path
