"""The backends by name, and the choice among them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vqserve_server.errors import InvalidOption
from vqserve_server.search import native, triton
from vqserve_server.search.denormals import kept
from vqserve_server.search.searcher import MergedSearcher, Objective, Searcher, first_of_equals
from vqserve_server.search.tiled import TiledSearcher


def available(device: torch.device | str) -> tuple[str, ...]:
    """Return the names of the backends that run on this device, the preferred one first."""
    device = torch.device(device)
    names = ["torch", "reference"]
    if triton.is_available(device):
        names.insert(0 if device.type == "cuda" else 2, "triton")
    if device.type == "cpu" and native.levels():
        names.insert(0, "native")
    return tuple(names)


@kept()
def prepare(
    codes: Tensor,
    *,
    objective: Objective = Objective.L2,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Searcher:
    """Prepare a codebook for search on the device that it is on.

    Args:
        codes: (K, D) float32 or float64, finite. Later changes of it may or may not be seen: prepare again.
        objective: what the winning code is best at.
        bias: (K,) of the codes' dtype, added to the scores of DOT; None: zero.
        backend: one of `available(codes.device)`, or "auto".

    Raises:
        InvalidOption: for a backend that does not run on this device, or cannot take this codebook.
    """
    names = available(codes.device)
    if backend not in ("auto", *names):
        raise InvalidOption(
            f"no search backend {backend!r} on {codes.device.type}: choose one of {', '.join(('auto', *names))}"
        )
    able = [name for name in names if _fits(name, codes, bias, objective)]
    if backend not in ("auto", *able):
        raise InvalidOption(f"search backend {backend!r} can't take this codebook: choose one of {', '.join(able)}")
    chosen = able[0] if backend == "auto" else backend
    kept = first_of_equals(codes, bias)
    if kept is None:
        return _build(chosen, codes, bias, objective)
    return MergedSearcher(_build(chosen, codes[kept], None if bias is None else bias[kept], objective), kept)


def _fits(backend: str, codes: Tensor, bias: Tensor | None, objective: Objective) -> bool:
    if backend == "native":
        return native.fits(codes, bias, objective)
    return backend != "triton" or triton.fits(codes)


def _build(backend: str, codes: Tensor, bias: Tensor | None, objective: Objective) -> Searcher:
    reference = functools.partial(TiledSearcher, codes, bias, objective, dtype=torch.float64)
    tiled = functools.partial(TiledSearcher, codes, bias, objective, dtype=torch.float32, fallback=reference)
    match backend:
        case "native":
            return native.NativeSearcher(codes, bias, objective, fallback=reference)
        case "triton":
            return triton.FusedSearcher(codes, bias, objective, fallback=tiled)
        case "torch":
            return tiled()
        case _:
            return reference()
