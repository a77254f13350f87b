"""`vqserved train`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vqserve.layout import Layout
from vqserve_data import SOURCES_HELP
from vqserve_tools.flags import add_flags, from_flags
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.output import add_output, png_path
from vqserve_tools.training.options import TrainingOptions

if TYPE_CHECKING:
    from vqserve_tools.training.job import TrainedFile

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_train_parser(subparsers: Subparsers) -> None:
    """Add the parser of `train`; its default `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "train",
        description="Train a codebook on latents. The same latents, options and seed give the same file. One .npy file "
        "is read as it is; of a data set a uniform random sample of rows is taken.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help=f"{SOURCES_HELP}, with latents of 2 to 5 axes of float16, bfloat16, float32 or float64",
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
        help="position of the channels in the latents (default: the second of 4 or 5 axes, the last of 2 or 3)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="share of the latents that is only measured, not trained on; 0: none (default: 0.05 of a data set, none "
        "of one .npy file)",
    )
    parser.add_argument(
        "--plot", type=png_path, metavar="FILE.png", help="draw error and perplexity over the steps into this file"
    )
    add_flags(parser, SourceOptions)
    add_flags(parser, TrainingOptions)
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train, write the codebook file and print its quality; return the exit status.

    Raises:
        InvalidArgument: the latents or options cannot be used.
        OSError: a file cannot be read or written.
    """
    options, reading = from_flags(TrainingOptions, args), from_flags(SourceOptions, args)
    from vqserve_tools.training.job import train_file  # noqa: PLC0415 - brings torch

    made = train_file(
        args.sources,
        args.out,
        options,
        layout=args.layout,
        reading=reading,
        held_out=args.held_out,
        plot=args.plot,
        force=args.force,
        progress=not args.quiet,
    )
    sys.stdout.write("".join(f"{line}\n" for line in _story(made, options)))
    sys.stdout.write(f"wrote {args.out}, digest {made.digest}\n")
    return 0


def _story(made: TrainedFile, options: TrainingOptions) -> list[str]:
    trained, quality, new = made.trained, made.trained.quality, made.trained.held_out
    lines = [
        f"trained {options.kind}, {options.num_codes} codes of {trained.quantizer.code_dim}: "
        f"{trained.plan.steps} steps of {trained.plan.batch_size} rows, {trained.codes_reseeded} codes reseeded"
    ]
    size = made.rows.describe().data_set
    if size is not None:
        rows = f"a sample of {len(made.rows)} of {size.tokens} rows" if size.is_sampled else f"all {size.tokens} rows"
        lines.append(f"read {size.text}, {rows}")
    error = f"mean squared error {quality.mean_squared_error:.6g}"
    perplexity = f"perplexity {quality.perplexity:.1f}"
    used = f"used codes {quality.used_codes} of {options.num_codes}"
    if new is None or made.split is None:
        return [*lines, error, perplexity, used]
    parts = made.split
    whole = "" if parts.unit == "rows" else f", {parts.held_out_units} of {parts.units} {parts.unit}"
    lines.append(f"trained on {len(parts.training)} rows, held out {len(parts.held_out)}{whole}")
    gap = new.mean_squared_error / quality.mean_squared_error - 1 if quality.mean_squared_error else 0.0
    return [
        *lines,
        f"{error}, held out {new.mean_squared_error:.6g} ({gap:+.1%})",
        f"{perplexity}, held out {new.perplexity:.1f}",
        f"{used}, held out {new.used_codes}",
    ]
