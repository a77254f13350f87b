"""`vqserved inspect`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve.errors import InvalidOption, of_file
from vqserve.layout import Layout
from vqserve_server.codebooks import load_codebook
from vqserve_tools.inspection.inspection import inspect
from vqserve_tools.inspection.plot import check_plot, draw
from vqserve_tools.inspection.text import as_text
from vqserve_tools.latent_file import LatentRows

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_inspect_parser(subparsers: Subparsers) -> None:
    """Add the parser of `inspect`; its default `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "inspect",
        description="Describe a codebook file: its kind and sizes, its codes and, with latents, its fit to them.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a codebook file")
    parser.add_argument(
        "--latents",
        type=Path,
        metavar="LATENTS.npy",
        help="latents to encode, 2 to 5 axes, float16, float32 or float64",
    )
    parser.add_argument(
        "--layout",
        choices=[str(layout) for layout in Layout],
        help="position of the channels in LATENTS (default: the layout of the codebook)",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object, with all texts in full length")
    parser.add_argument("--plot", type=_png_path, metavar="OUT.png", help="draw the figures into this file")
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Write the report of a codebook file to stdout, and the plot of --plot; return the exit status.

    Raises:
        CodebookError: the file is not a codebook file, or it cannot be served.
        InvalidArgument: the latents or options cannot be used.
        OSError: a file cannot be read or written.
    """
    if args.layout is not None and args.latents is None:
        raise InvalidOption("{option} says where the channels of LATENTS are: give --latents too", option="layout")
    if args.plot is not None:
        check_plot(args.plot, force=args.force, sources=(args.file, args.latents))
    codebook = load_codebook(args.file)
    latents = None
    if args.latents is not None:
        latents = LatentRows.open(args.latents, args.layout, default=codebook.quantizer.layout, keeps_float64=True)
    # Without a terminal, stderr has errors only, for programs that read it.
    with of_file(args.latents):
        inspection = inspect(codebook, latents, progress=sys.stderr.isatty())
    if args.plot is not None:
        draw(inspection, args.plot)
    columns = shutil.get_terminal_size(fallback=(120, 0)).columns
    whole = json.dumps(inspection.report.as_dict(), allow_nan=False)
    sys.stdout.write(f"{whole}\n" if args.json else as_text(inspection.report, columns))
    return 0


def _png_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"{path.name!r} must end in .png")
    return path
