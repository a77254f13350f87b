"""Runs inside the libraries' environment: makes one golden. `make_foreign.py` calls it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

from libraries.draw import Draw
from libraries.golden import Golden


def installed(package: str) -> str:
    """Return a package's name and version."""
    return f"{package} {importlib.metadata.version(package)}"


def module_alone(name: str) -> ModuleType:
    """Import a library's module without running the packages around it, which need what is not installed."""
    package = ""
    for part in name.split(".")[:-1]:
        package = f"{package}.{part}".removeprefix(".")
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"{package} is not installed", name=package)
            bare = ModuleType(package)
            bare.__path__ = list(spec.submodule_search_locations)
            sys.modules[package] = bare
    return importlib.import_module(name)


def pretend(*packages: str) -> None:
    """Let packages be imported that are not installed and that a quantizer does not use."""
    for package in packages:
        sys.modules.setdefault(package, MagicMock(__spec__=None))


def fill(module: nn.Module, draw: Draw, **values: Tensor) -> None:
    """Set parameters and buffers by name (dots may be two underscores); layers that are not named are drawn.

    Every name must be there and every shape must fit, so that a library's change is noticed.
    """
    state = module.state_dict()
    given = {name.replace("__", "."): value for name, value in values.items()}
    for name, tensor in state.items():
        if name in given:
            value = given.pop(name)
            if value.shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(value.shape)}")
            tensor.copy_(value)
        elif name.endswith((".weight_v", ".weight", ".original1")) and tensor.ndim > 1:
            tensor.copy_(draw.normal(*tensor.shape) / tensor[0].numel() ** 0.5)
        elif name.endswith(".bias"):
            tensor.copy_(0.1 * draw.normal(*tensor.shape))
        elif name.endswith((".weight_g", ".original0")):
            tensor.copy_(draw.positive(*tensor.shape))
    if given:
        raise ValueError(f"there is no {', '.join(given)} among {', '.join(state)}")
    module.eval()


def named(module: nn.Module, prefix: str = "", only: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """Return a state dict as arrays, under a prefix; of the entries whose own name begins so."""
    return {f"{prefix}{name}": array(value) for name, value in module.state_dict().items() if name.startswith(only)}


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as numpy, contiguous."""
    return tensor.detach().contiguous().numpy()


def golden(package: str, module_state: Mapping[str, np.ndarray], *tensors: Tensor, **options: Any) -> Golden:
    """Return a golden of latents, indices and decoded latents.

    Args:
        package: the library's name on the package index.
        module_state: the checkpoint.
        *tensors: latents, indices, decoded.
        **options: further fields of `Golden`.
    """
    latents, indices, decoded = (array(tensor) for tensor in tensors)
    smallest = np.min_scalar_type(int(indices.max()))
    return Golden(
        library=installed(package),
        state=module_state,
        latents=latents,
        indices=indices.astype(smallest),
        decoded=decoded,
        **options,
    )


def main() -> None:
    """Make one golden."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="of this package, as from_diffusers")
    parser.add_argument("family", help="the function in it")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--full-size", action="store_true")
    args = parser.parse_args()
    draw = Draw(args.family, args.rows, full_size=args.full_size)
    with torch.no_grad():
        made = getattr(importlib.import_module(f"libraries.{args.module}"), args.family)(draw)
    made.save(args.output, compressed=not args.full_size)


if __name__ == "__main__":
    main()
