"""`vqserved import`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve.codebook_info import of_stages
from vqserve.errors import ForeignCheckpointError
from vqserve.text import printable
from vqserve_server.codebooks.file import save_state
from vqserve_server.quantizers.declared import USED
from vqserve_tools.flags import add_flags, from_flags
from vqserve_tools.importing.families.name_lists import modules_of
from vqserve_tools.importing.families.names import is_part, is_running
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import weights_of
from vqserve_tools.importing.importer import Import, arrays_of, import_checkpoint
from vqserve_tools.importing.verify import verify_files
from vqserve_tools.output import add_output, check_output

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# If more names than this were left, they are listed by module.
_MAX_LINES = 20


def add_import_parser(subparsers: Subparsers) -> None:
    """Add the parser of `import`; its default `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "import",
        description="Make a codebook file from a foreign checkpoint or an array of codes; nothing in it is run.",
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SRC",
        help=".npy, .npz, .safetensors, a torch file, an index of several, or a folder with the weights of one model; "
        "not needed for --kind fsq, residual_fsq and lfq",
    )
    add_output(parser, required=False)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be taken and left, as a table, and write nothing"
    )
    add_flags(parser, Options)
    parser.add_argument(
        "--verify",
        type=Path,
        nargs=2,
        metavar=("LATENTS.npy", "INDICES.npy"),
        help="latents, and their indices from the model's own code: compared before OUT is written",
    )
    parser.set_defaults(run=run_import, explain=_spaced_levels, wrong_usage=parser.error)


def run_import(args: argparse.Namespace) -> int:
    """Write the codebook file of a foreign checkpoint and list what was taken; return the exit status.

    Raises:
        InvalidOption: OUT cannot be written or would replace a file.
        CodebookError: the checkpoint cannot be imported, or does not give the expected indices.
        OSError: the file cannot be written.
    """
    if args.dry_run:
        _dry_run(args)
        return 0
    if args.out is None:
        wrong_usage: Callable[[str], None] = args.wrong_usage
        wrong_usage("the following arguments are required: -o/--out")
    output: Path = args.out
    files = [] if args.source is None else weights_of(args.source).files.values()
    check_output(output, force=args.force, sources=(*files, *(args.verify or ())))
    options = from_flags(Options, args)
    result = import_checkpoint(args.source, options)
    verified = None if args.verify is None else verify_files(result.quantizer, *args.verify)
    digest = save_state(result.state, output, provenance=result.provenance)
    lines = [_found(result)]
    lines += [f"took  {name}  {what}" for name, what in result.taken.items()]
    lines += [f"left  {what}" for what in _left(result)]
    lines += _notes(result)
    if verified is not None:
        lines.append(f"verified  {verified}")
    lines.append(f"wrote {output}: {_made(result)}, digest {digest}")
    _print(lines)
    return 0


def _dry_run(args: argparse.Namespace) -> None:
    """Print every array of the file and what an import would do with it.

    Raises:
        ForeignCheckpointError: the import would fail; the arrays are printed before if the file can be read.
    """
    try:
        result = import_checkpoint(args.source, from_flags(Options, args))
    except ForeignCheckpointError:
        if args.source is not None:
            arrays = arrays_of(args.source)
            _print(_table([(name, *what.split(" "), _guess(name)) for name, what in arrays.items()]))
        raise
    rows = [
        (name, *what.split(" "), f"taken: {_role(name)}" if name in result.taken else f"left: {_guess(name)}")
        for name, what in result.arrays.items()
    ]
    lines = [_found(result), *_table(rows), *_notes(result)]
    if args.verify is not None:
        lines.append(f"verified  {verify_files(result.quantizer, *args.verify)}")
    _print([*lines, f"would make  {_made(result)}; nothing was written"])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [("key", "shape", "dtype", "for"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _role(name: str) -> str:
    """Return what a taken array is for, by its name."""
    if any(map(is_part, name.split("."))):
        return "part of the quantizer"
    return "running average" if is_running(name) else "codes"


def _guess(name: str) -> str:
    """Return what another array is for, as far as its name says."""
    return "running average, moment or counter" if is_running(name) else "-"


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))


def _spaced_levels(args: argparse.Namespace, words: Sequence[str]) -> str | None:
    if args.levels and all(word.isdecimal() for word in words):
        source = [str(args.source)] if str(args.source).isdecimal() else []
        return f"--levels is one argument, with commas: --levels {','.join([*map(str, args.levels), *source, *words])}"
    return None


def _found(result: Import) -> str:
    return f"found  {result.family}{f' under {result.place}' if result.place else ''}"


def _made(result: Import) -> str:
    made = result.quantizer
    codes = (
        of_stages(made.num_quantizers, made.num_codes, made.stage_vocab_sizes) if made.has_stages else made.num_codes
    )
    return f"{made.kind}, {codes} codes"


def _notes(result: Import) -> list[str]:
    lines = [f"note  {note}" for note in result.notes]
    arguments = result.state.arguments
    if arguments.get("layout") is not None:
        lines.append(f"note  latents of 3 to 5 axes are {arguments['layout']} where a call does not say")
    if USED in result.state.tensors:
        lines.append(f"note  unknown_index is {arguments['unknown_index']!r}")
    return lines


def _left(result: Import) -> list[str]:
    """Return a line for every array that was left; if there are many, for every module beside the quantizer."""
    outside = result.place.removesuffix(".").rpartition(".")[0]
    modules = modules_of(result.left, f"{outside}." if outside else "", _MAX_LINES)
    lines = [f"{name}  ({len(inner)} arrays)" if len(inner) > 1 else name for name, inner in modules.items()]
    return lines if len(lines) <= _MAX_LINES else [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more"]
