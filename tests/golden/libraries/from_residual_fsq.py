"""Runs beside one version of vector-quantize-pytorch: what its ResidualFSQ and GroupedResidualFSQ make of latents."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vector_quantize_pytorch import GroupedResidualFSQ, ResidualFSQ

_X_CODEC_2 = {"levels": [4] * 8, "num_quantizers": 1, "dim": 24}
_STAGES = {"levels": [8, 5, 5, 3], "num_quantizers": 3, "dim": 12}
_BARE = {"levels": [5, 4, 8], "num_quantizers": 4, "dim": 3}
_GROUPED = {"levels": [5, 4, 3], "num_quantizers": 2, "dim": 12, "groups": 2}
_SYMMETRIC = {
    "atanh": {"preserve_symmetry": True},
    "soft_clamp": {"bound_hard_clamp": False},
}


def cases(bound: str) -> dict[str, dict[str, Any]]:
    """Return what to make by name: the library's arguments, for versions whose default is one of our bounds."""
    made = {"x_codec_2": _X_CODEC_2, "stages": _STAGES, "bare": _BARE, "grouped": _GROUPED}
    if bound in _SYMMETRIC:
        made["symmetric"] = {**_STAGES, **_SYMMETRIC[bound]}
    return made


def make(arguments: dict[str, Any], seed: str, rows: int) -> dict[str, np.ndarray]:
    """Return the state and what the library makes of latents; a token's indices are in our order."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    module: nn.Module = (GroupedResidualFSQ if "groups" in arguments else ResidualFSQ)(**arguments).eval()
    for name, tensor in module.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(0.1 * drawn if name.endswith("bias") else 1.5 * drawn / tensor.shape[-1] ** 0.5)
    latents = torch.randn(rows // 32, 32, arguments["dim"], generator=generator)
    indices: Tensor = module(latents)[1]
    decoded = module.get_output_from_indices(indices)
    if "groups" in arguments:
        indices = indices.permute(1, 2, 3, 0).flatten(2)
    arrays = {"latents": latents, "indices": indices.to(torch.int32), "decoded": decoded}
    return {name: tensor.numpy() for name, tensor in {**arrays, **_named(module)}.items()}


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {f"state.{name}": tensor for name, tensor in module.state_dict().items()}


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("bound", help="the version's default, as we call it")
    parser.add_argument("--rows", type=int, required=True, help="tokens of each case, a multiple of 32")
    args = parser.parse_args()
    version = importlib.metadata.version("vector-quantize-pytorch")
    made = cases(args.bound)
    meta = {"library": f"vector-quantize-pytorch {version}", "bound": args.bound, "cases": made}
    arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    with torch.no_grad():
        for case, arguments in made.items():
            for name, array in make(arguments, f"{version} {case}", args.rows).items():
                arrays[f"{case}.{name}"] = array
    np.savez_compressed(args.output, **arrays)


if __name__ == "__main__":
    main()
