"""`vqserved import`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve.codebook_info import of_stages
from vqserve.text import printable
from vqserve_server.codebooks.file import save_state
from vqserve_server.codebooks.state import USED
from vqserve_tools.flags import add_flags, from_flags
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import weights_of
from vqserve_tools.importing.importer import Import, import_checkpoint
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
        "not needed for --kind fsq and --kind lfq",
    )
    add_output(parser)
    add_flags(parser, Options)
    parser.add_argument(
        "--verify",
        type=Path,
        nargs=2,
        metavar=("LATENTS.npy", "INDICES.npy"),
        help="latents, and their indices from the model's own code: compared before OUT is written",
    )
    parser.set_defaults(run=run_import, explain=_spaced_levels)


def run_import(args: argparse.Namespace) -> int:
    """Write the codebook file of a foreign checkpoint and list what was taken; return the exit status.

    Raises:
        InvalidOption: OUT cannot be written or would replace a file.
        CodebookError: the checkpoint cannot be imported, or does not give the expected indices.
        OSError: the file cannot be written.
    """
    output: Path = args.out
    files = [] if args.source is None else weights_of(args.source).files.values()
    check_output(output, force=args.force, sources=(*files, *(args.verify or ())))
    options = from_flags(Options, args)
    result = import_checkpoint(args.source, options)
    verified = None if args.verify is None else verify_files(result.quantizer, *args.verify)
    digest = save_state(result.state, output, provenance=result.provenance)
    lines = _story(result)
    if verified is not None:
        lines.append(f"verified  {verified}")
    made = result.quantizer
    codes = (
        of_stages(made.num_quantizers, made.num_codes, made.stage_vocab_sizes) if made.has_stages else made.num_codes
    )
    lines.append(f"wrote {output}: {made.kind}, {codes} codes, digest {digest}")
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
    return 0


def _spaced_levels(args: argparse.Namespace, words: Sequence[str]) -> str | None:
    if args.levels and all(word.isdecimal() for word in words):
        source = [str(args.source)] if str(args.source).isdecimal() else []
        return f"--levels is one argument, with commas: --levels {','.join([*map(str, args.levels), *source, *words])}"
    return None


def _story(result: Import) -> list[str]:
    where = f" under {result.place}" if result.place else ""
    lines = [f"found  {result.family}{where}"]
    lines += [f"took  {name}  {what}" for name, what in result.taken.items()]
    lines += [f"left  {what}" for what in _left(result)]
    lines += [f"note  {note}" for note in result.notes]
    arguments = result.state.arguments
    if arguments.get("layout") is not None:
        lines.append(f"note  latents of 3 to 5 axes are {arguments['layout']} where a call does not say")
    if USED in result.state.tensors:
        lines.append(f"note  unknown_index is {arguments['unknown_index']!r}")
    return lines


def _left(result: Import) -> list[str]:
    """Return a line for every array that was left; if there are many, for every module beside the quantizer."""
    if len(result.left) <= _MAX_LINES:
        return list(result.left)
    outside = result.place.removesuffix(".").rpartition(".")[0]
    modules = _by_module(result.left, f"{outside}." if outside else "")
    lines = [f"{name}  ({count} arrays)" if count > 1 else name for name, count in modules.items()]
    return lines if len(lines) <= _MAX_LINES else [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more"]


def _by_module(names: Sequence[str], outside: str) -> dict[str, int]:
    counts: dict[str, list[str]] = {}
    for name in names:
        shared = outside if name.startswith(outside) else ""
        module, dot, _ = name.removeprefix(shared).partition(".")
        counts.setdefault(f"{shared}{module}{'.*' if dot else ''}", []).append(name)
    return {module if len(inner) > 1 else inner[0]: len(inner) for module, inner in counts.items()}
