"""Holds the checkpoints of support/foreign against their formulas, on many latents: the second table of README.md.

    PYTHONPATH=tests:tests/golden .venv/bin/python tests/golden/check_formulas.py --rows 100000 [CASE ...]

The formulas are float64's throughout. Ours round residuals, projections and cosine's rows to float32, so that a token
may differ where two codes are as near as that can tell; `libraries/near_ties.py` judges each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from libraries.near_ties import largest_share
from support.foreign import CASES, RNG, Case, write
from vqserve_server.codebooks import load_codebook
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools import cli

# A formula builds a matrix of latents by codes, and of latents by codes by channels.
_AT_A_TIME = 4096


def main() -> int:
    """Print a row for each case; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="functions in support/foreign; none: all")
    parser.add_argument("--rows", type=int, default=10_000, help="latents (%(default)s)")
    args = parser.parse_args()
    print("| Checkpoint | Kind | Tokens x indices | Differing | Largest gap / bound | Decoded |")
    print("|---|---|---|---|---|---|")
    for name in args.cases or CASES:
        RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {_compare(CASES[name](), Path(folder), args.rows)} |", flush=True)
    return 0


def _compare(made: Case, folder: Path, count: int) -> str:
    source, out = write(folder, made), folder / "out.safetensors"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["import", *([str(source)] if source else []), "-o", str(out), *made.flags]) == 0
    rows = RNG.standard_normal((count, made.channels)).astype(np.float32)
    found = [made.oracle(part.astype(np.float64)) for part in np.split(rows, range(_AT_A_TIME, count, _AT_A_TIME))]
    theirs = np.concatenate([indices for indices, _ in found])
    decoded = np.concatenate([values for _, values in found])
    with Tokenizer.load(out, device="cpu") as tokenizer:
        ours = tokenizer.encode(rows).astype(np.int64).reshape(count, -1)
        # Where a token differs, so does what it decodes to: the formula's indices are decoded.
        again = tokenizer.decode(theirs)
        kind = tokenizer.info.kind
    theirs = theirs.reshape(count, -1)
    differing = np.flatnonzero((ours != theirs).any(axis=1))
    share = 0.0
    if len(differing):
        quantizer = load_codebook(out).quantizer
        share = largest_share(quantizer, torch.from_numpy(rows[differing]), ours[differing], theirs[differing])
    difference = np.abs(again - decoded).max() / np.abs(decoded).max()
    return f"{kind} | {count} x {ours.shape[1]} | {len(differing)} | {share:.2g} | {difference:.1e}"


if __name__ == "__main__":
    sys.exit(main())
