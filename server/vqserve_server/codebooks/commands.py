"""`vqserved import`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve_server.codebook_path import new_codebook_path
from vqserve_server.codebooks.arguments import check_unknown_index
from vqserve_server.codebooks.codebook_file import check_folder, save_codebook
from vqserve_server.codebooks.importer import METRICS, Import, import_checkpoint
from vqserve_server.codebooks.printable import printable
from vqserve_server.errors import ForeignCheckpointError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_import_parser(subparsers: Subparsers) -> None:
    """Register `import`; its parser's `run` takes the arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "import",
        help="make a codebook file from a foreign checkpoint or a bare array",
        description="Make a codebook file from a foreign checkpoint or a bare array, without running anything in it.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help=".npy, .npz, .safetensors or a torch file")
    parser.add_argument(
        "-o",
        "--output",
        type=new_codebook_path,
        required=True,
        metavar="OUT.safetensors",
        help="the codebook file to write; its name must end so",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--key", help="name of the array that is the codebook, (K, D)")
    where.add_argument("--prefix", help="where the quantizer's state dict is in the checkpoint, as regularization.")
    parser.add_argument(
        "--metric", choices=METRICS, help="how the codebook is searched, where the checkpoint cannot say so"
    )
    parser.add_argument(
        "--unknown-index",
        type=_unknown_index,
        default="random",
        metavar="random|extra|N",
        help="what a code outside the checkpoint's remap is reported as (default: random)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """Write the codebook file of a foreign checkpoint and say what was taken; return the exit status.

    Raises:
        CodebookError: the checkpoint cannot be imported.
        OSError: the file cannot be written.
    """
    output: Path = args.output
    if not output.parent.is_dir():
        raise ForeignCheckpointError(f"there is no folder {output.parent}: make it first")
    if output.exists() and not args.force:
        raise ForeignCheckpointError(f"{output.name} is there already: pass --force to replace it")
    check_folder(output)
    try:
        result = import_checkpoint(
            args.source, key=args.key, prefix=args.prefix, metric=args.metric, unknown_index=args.unknown_index
        )
    except ForeignCheckpointError as error:
        # Names in a stranger's file are text of any kind.
        raise ForeignCheckpointError(printable(str(error))) from error
    digest = save_codebook(result.quantizer, output, provenance=result.provenance)
    sys.stdout.write(_story(result, output, digest))
    return 0


def _story(result: Import, output: Path, digest: str) -> str:
    lines = [f"took  {name}  {what}" for name, what in result.taken.items()]
    shown = result.left[:_MAX_LEFT]
    lines += [f"left  {name}" for name in shown]
    if len(result.left) > len(shown):
        lines.append(f"left  and {len(result.left) - len(shown)} more")
    lines += [f"note  {note}" for note in result.notes]
    defaults = ", ".join(f"{name}={result.arguments[name]!r}" for name in result.assumed)
    lines.append(f"note  the checkpoint does not hold {defaults}: defaults, which encode and decode do not read")
    lines.append(f"note  unknown_index is {result.arguments['unknown_index']!r}{_unknown_story(result)}")
    lines.append(f"wrote {output.name}: {result.kind}, {result.quantizer.num_codes} codes, digest {digest}")
    return "".join(f"{printable(line)}\n" for line in lines)


_MAX_LEFT = 20


def _unknown_story(result: Import) -> str:
    return "" if getattr(result.quantizer, "used", None) is not None else ", which nothing uses without a remap"


def _unknown_index(text: str) -> str | int:
    try:
        value = text if text in {"random", "extra"} else int(text)
        check_unknown_index(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither random, extra nor an integer in [0, 2^32)") from None
    return value
