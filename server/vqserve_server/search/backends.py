"""The backends by name, and the choice among them."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve_server.errors import InvalidOption
from vqserve_server.search.duplicates import MergedSearcher, first_of_equals
from vqserve_server.search.reference import ReferenceSearcher
from vqserve_server.search.searcher import Objective, Searcher

_BACKENDS = {"reference": ReferenceSearcher}


def available(device: torch.device | str) -> tuple[str, ...]:
    """Return the names of the backends that run on this device."""
    torch.device(device)
    return tuple(_BACKENDS)


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
        InvalidOption: for a backend that does not run on this device.
    """
    if backend == "auto":
        backend = "reference"
    if backend not in available(codes.device):
        names = ", ".join(("auto", *available(codes.device)))
        raise InvalidOption(f"no search backend {backend!r} on {codes.device.type}: choose one of {names}")
    kept = first_of_equals(codes, bias)
    if kept is None:
        return _BACKENDS[backend](codes, bias, objective)
    distinct = _BACKENDS[backend](codes[kept], None if bias is None else bias[kept], objective)
    return MergedSearcher(distinct, kept)
