"""A golden, imported by our command line, beside what its library made of the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from libraries.golden import Golden
from libraries.near_ties import largest_share
from vqserve_server.codebooks import load_codebook
from vqserve_server.quantizers.tensors import to_rows
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools import cli


@dataclass(frozen=True)
class Comparison:
    """What differed.

    Attributes:
        kind: of the codebook file.
        tokens: how many there were.
        differing: tokens with an index that is not the library's; each was shown to be a near-tie.
        largest_share: the largest gap between our code and theirs, as a share of what float32's rounding explains.
        decoded: the largest difference between decoded latents of the library's indices, as a share of the largest
            decoded value.
    """

    kind: str
    tokens: int
    differing: int
    largest_share: float
    decoded: float


def import_golden(golden: Golden, folder: Path) -> Path:
    """Write the checkpoint, run `vqserved import` on it, and return the codebook file's path."""
    out = folder / "codebook.safetensors"
    status = cli.main(["import", str(golden.write_checkpoint(folder)), "-o", str(out), *golden.flags])
    assert status == 0, f"vqserved import {' '.join(golden.flags)} failed"
    return out


def compare(golden: Golden, path: Path) -> Comparison:
    """Compare a codebook file with the library.

    Raises:
        NoNearTie: an index differs, and not for float32's sake.
    """
    quantizer = load_codebook(path).quantizer
    tokenizer = Tokenizer.load(path, device="cpu")
    ours = tokenizer.encode(golden.latents)
    assert ours.shape == golden.indices.shape
    rows = to_rows(torch.from_numpy(golden.latents), quantizer.layout)
    our, their = (_per_token(indices, quantizer.num_quantizers, quantizer.layout) for indices in (ours, golden.indices))
    differing = np.flatnonzero((our != their).any(1))
    share = largest_share(quantizer, rows[differing], our[differing], their[differing]) if len(differing) else 0.0
    decoded = tokenizer.decode(golden.indices)
    assert decoded.shape == golden.decoded.shape
    difference = float(np.abs(decoded - golden.decoded).max() / np.abs(golden.decoded).max())
    return Comparison(tokenizer.info.kind, len(rows), len(differing), share, difference)


def _per_token(indices: np.ndarray, stages: int, layout: str | None) -> np.ndarray:
    wide = torch.from_numpy(indices.astype(np.int64))
    return (to_rows(wide, layout) if stages > 1 else wide.reshape(-1, 1)).numpy()
