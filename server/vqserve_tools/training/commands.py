"""`vqserved train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve.layout import Layout
from vqserve_tools.flags import add_flags, from_flags
from vqserve_tools.output import add_output
from vqserve_tools.training.options import TrainingOptions

if TYPE_CHECKING:
    from vqserve_tools.training.job import TrainedFile

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_train_parser(subparsers: Subparsers) -> None:
    """Add the parser of `train`; its default `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "train",
        description="Train a codebook on latents. The same latents, options and seed give the same file.",
    )
    parser.add_argument(
        "latents", type=Path, metavar="LATENTS", help=".npy of 2 to 5 axes, float16, float32 or float64"
    )
    add_output(parser)
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="show no progress (default: a bar on a terminal, otherwise a line every ten seconds)",
    )
    parser.add_argument(
        "--layout",
        choices=[str(layout) for layout in Layout],
        help="position of the channels in LATENTS (default: the second of 4 or 5 axes, the last of 2 or 3)",
    )
    add_flags(parser, TrainingOptions)
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train, write the codebook file and print its quality; return the exit status.

    Raises:
        InvalidArgument: the latents or options cannot be used.
        OSError: a file cannot be read or written.
    """
    options = from_flags(TrainingOptions, args)
    from vqserve_tools.training.job import train_file  # noqa: PLC0415 - brings torch

    made = train_file(args.latents, args.out, options, layout=args.layout, force=args.force, progress=not args.quiet)
    sys.stdout.write(_story(made, options, args.out))
    return 0


def _story(made: TrainedFile, options: TrainingOptions, out: Path) -> str:
    trained, quality = made.trained, made.trained.quality
    lines = (
        f"trained {options.kind}, {options.num_codes} codes of {trained.quantizer.code_dim}: "
        f"{trained.plan.steps} steps of {trained.plan.batch_size} rows, {trained.codes_reseeded} codes reseeded",
        f"mean squared error {quality.mean_squared_error:.6g}",
        f"perplexity {quality.perplexity:.1f}",
        f"used codes {quality.used_codes} of {options.num_codes}",
        f"wrote {out}, digest {made.digest}",
    )
    return "".join(f"{line}\n" for line in lines)
