"""`vqserved train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve.layout import Layout
from vqserve_server.codebook_path import add_output
from vqserve_tools.training.options import DEFAULT_STEPS, INITIALISATIONS, KINDS, TrainingOptions

if TYPE_CHECKING:
    from vqserve_tools.training.job import TrainedFile

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_train_parser(subparsers: Subparsers) -> None:
    """Register `train`; its parser's `run` takes the arguments and returns the exit status."""
    defaults = TrainingOptions()
    parser = subparsers.add_parser(
        "train",
        help="train a codebook on latents",
        description="Train a codebook on latents. The same latents, options and seed give the same file.",
    )
    parser.add_argument(
        "latents", type=Path, metavar="LATENTS", help=".npy of 2 to 5 axes, float16, float32 or float64"
    )
    add_output(parser)
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="show no progress (else a bar on a terminal, and elsewhere a line every ten seconds)",
    )
    parser.add_argument(
        "--layout",
        choices=[str(layout) for layout in Layout],
        help="where the channels of LATENTS are (default: second axis of 4 and 5, last of 2 and 3)",
    )
    parser.add_argument("--kind", choices=KINDS, default=defaults.kind, help="running averages, or gradient descent")
    parser.add_argument("--num-codes", type=int, default=defaults.num_codes, metavar="K", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, metavar="ROWS", help="rows a step (default: 4 K, at least 8192)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help=f"how many batches (default: {DEFAULT_STEPS})")
    length.add_argument("--epochs", type=float, metavar="N", help="how many passes over LATENTS, instead")
    parser.add_argument(
        "--init", choices=INITIALISATIONS, default=defaults.initialisation, help="where codes start (%(default)s)"
    )
    parser.add_argument(
        "--reseed-every",
        type=int,
        metavar="STEPS",
        help="steps between two moves of dead codes; 0: none (default: when a code had 32 chances, at least 20)",
    )
    parser.add_argument(
        "--lr", type=float, metavar="STEP", help="Adam's, for vq (default: a fifth of a typical first error)"
    )
    parser.add_argument("--decay", type=float, default=defaults.decay, help="of the averages, for ema (%(default)s)")
    parser.add_argument("--beta", type=float, default=defaults.beta, help="commitment weight to keep (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of every random choice (%(default)s)")
    parser.add_argument("--device", default=defaults.device, metavar="auto|cpu|cuda[:N]", help="where to compute")
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train, write the codebook file and say how good it is; return the exit status.

    Raises:
        InvalidRequest: the latents or options cannot be used.
        OSError: a file cannot be read or written.
    """
    options = _options(args)
    from vqserve_tools.training.job import train_file  # noqa: PLC0415 - brings torch

    made = train_file(args.latents, args.out, options, layout=args.layout, force=args.force, progress=not args.quiet)
    sys.stdout.write(_story(made, options, args.out))
    return 0


def _options(args: argparse.Namespace) -> TrainingOptions:
    return TrainingOptions(
        kind=args.kind,
        num_codes=args.num_codes,
        batch_size=args.batch_size,
        steps=args.steps,
        epochs=args.epochs,
        initialisation=args.init,
        reseed_every=args.reseed_every,
        seed=args.seed,
        lr=args.lr,
        decay=args.decay,
        beta=args.beta,
        device=args.device,
    )


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
