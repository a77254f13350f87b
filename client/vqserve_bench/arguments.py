"""The options of `vqserve bench`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vqserve.dtypes import LATENT_NAMES
from vqserve_bench.load import DEFAULT_MAX_OUTSTANDING, ClosedLoop, Load, OpenLoop
from vqserve_bench.schedule import Schedule
from vqserve_bench.workload import Grid, Workload
from vqserve_client.arguments import add_codebook, add_message_limit, add_progress, integer

_CONCURRENCIES = (1, 8, 32)
_GRID = (1, 32, 32)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of `vqserve bench`."""
    add_codebook(command)
    what = command.add_argument_group("requests")
    what.add_argument("--method", choices=("encode", "decode"), default="encode", help="method to measure (encode)")
    what.add_argument(
        "--grid",
        type=_grid,
        action="append",
        metavar="BxHxW",
        help="shape of the indices of a request, batch axis first (1x32x32); if repeated, each is sent equally often",
    )
    what.add_argument("--dtype", choices=LATENT_NAMES, default="float32", help="of the latents (float32)")
    what.add_argument(
        "--data", type=Path, metavar="FILE.npy", help="latents to encode, or indices to decode (default: random)"
    )
    what.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of data, order and arrivals (0)")

    how = command.add_argument_group("how it is sent")
    load = how.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=integer(1),
        nargs="+",
        metavar="N",
        help="requests in flight at any time; several numbers: one after the other "
        f"({' '.join(map(str, _CONCURRENCIES))})",
    )
    load.add_argument(
        "--rate",
        type=_number(0, above=True),
        nargs="+",
        metavar="R",
        help="requests per second, at random times, whether or not earlier ones are answered",
    )
    how.add_argument(
        "--max-outstanding",
        type=integer(1),
        default=DEFAULT_MAX_OUTSTANDING,
        metavar="N",
        help=f"requests that --rate may have in flight; more are dropped ({DEFAULT_MAX_OUTSTANDING})",
    )
    how.add_argument(
        "--streams", type=integer(0), default=0, metavar="N", help="over N streams (0: each request is a call)"
    )
    how.add_argument("--connections", type=integer(1), default=1, metavar="N", help="of each process (1)")
    how.add_argument("--processes", type=integer(1), default=1, metavar="N", help="that send (1)")
    add_message_limit(how)

    long = command.add_argument_group("how long")
    plan = Schedule()
    long.add_argument(
        "--warmup",
        type=_number(0),
        default=plan.warmup_s,
        metavar="SECONDS",
        help=f"before it ({plan.warmup_s:g})",
    )
    long.add_argument(
        "--window",
        type=_number(0, above=True),
        default=plan.window_s,
        metavar="SECONDS",
        help=f"of one window; the last three are reported, when they agree ({plan.window_s:g})",
    )
    long.add_argument(
        "--max-windows",
        type=integer(1),
        default=plan.max_windows,
        metavar="N",
        help=f"windows after which it ends even if they do not agree ({plan.max_windows})",
    )
    long.add_argument(
        "--stability",
        type=_number(0, above=True),
        default=plan.stability * 100,
        metavar="PERCENT",
        help=f"windows agree within this of their mean, in requests/s and latency ({plan.stability * 100:g})",
    )

    out = command.add_argument_group("output besides the table")
    out.add_argument("--json", type=Path, metavar="FILE", help="all results as JSON")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture; needs matplotlib")
    out.add_argument("--force", action="store_true", help="replace these files if they exist")
    add_progress(command, "each window")


def schedule(args: argparse.Namespace) -> Schedule:
    """Return how long each load is measured."""
    return Schedule(
        warmup_s=args.warmup, window_s=args.window, max_windows=args.max_windows, stability=args.stability / 100
    )


def loads(args: argparse.Namespace) -> tuple[Load, ...]:
    """Return the loads to measure, in order."""
    if args.rate is not None:
        return tuple(OpenLoop(rate, args.max_outstanding) for rate in args.rate)
    return tuple(ClosedLoop(concurrency) for concurrency in args.concurrency or _CONCURRENCIES)


def workload(args: argparse.Namespace) -> Workload:
    """Return the requests to send."""
    return Workload(
        method=args.method,
        grids=tuple(args.grid or [_GRID]),
        dtype=args.dtype,
        layout=args.layout,
        data=args.data,
        seed=args.seed,
    )


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return the options of the command, as JSON values."""
    return {
        "method": args.method,
        "grids": [list(grid) for grid in args.grid or [_GRID]],
        "dtype": args.dtype,
        "layout": args.layout,
        "data": None if args.data is None else args.data.name,
        "seed": args.seed,
        "streams": args.streams,
        "connections": args.connections,
        "processes": args.processes,
        "timeout_s": args.timeout,
        "max_message_bytes": args.max_message_bytes,
        **asdict(schedule(args)),
    }


def _grid(text: str) -> Grid:
    if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be 1 to 4 lengths, the batch first, such as 1x32x32, not {text!r}")
    return tuple(int(length) for length in text.split("x"))


def _number(least: float, *, above: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > least if above else value >= least)):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {least:g}, not {text!r}")
        return value

    return parse
