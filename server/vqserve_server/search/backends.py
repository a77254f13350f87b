"""The search backends by name, and the choice of one, for codebooks that are tensors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vqserve.errors import InvalidOption
from vqserve_server.device import AnyDevice
from vqserve_server.search import cuda, native
from vqserve_server.search.denormals import denormals_enabled
from vqserve_server.search.equals import first_of_equal_tensors
from vqserve_server.search.native.tensors import TensorSearcher
from vqserve_server.search.searcher import MergedSearcher, Objective, Searcher
from vqserve_server.search.tiled import TiledSearcher


def available(device: AnyDevice | str) -> tuple[str, ...]:
    """Return the names of the backends that run on this device, in order of preference."""
    device = torch.device(device)
    names = ["torch", "reference"]
    if cuda.is_available(device):
        names.insert(0 if device.type == "cuda" else 2, "triton")
    if device.type == "cpu" and native.levels():
        names.insert(0, "native")
    return tuple(names)


def why_slower(backend: str, device: AnyDevice) -> str | None:
    """Return why "auto" did not choose the fastest backend of a device for a codebook; None: it did.

    Args:
        backend: what it chose; "none" where nothing is searched.
        device: CPU or CUDA.
    """
    is_cuda = device.type == "cuda"
    if backend in ("none", "triton" if is_cuda else "native"):
        return None
    if is_cuda:
        reason = cuda.why_unavailable(torch.device(device))
        return reason or "triton searches float32 codebooks of less than 2^31 numbers only"
    return native.why_unusable() or "the compiled search takes float32 codebooks of at most 1024 dimensions only"


@denormals_enabled()
def prepare(
    codes: Tensor,
    *,
    objective: Objective = Objective.L2,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Searcher:
    """Prepare a codebook for search on the device that holds it.

    Args:
        codes: (K, D) float32 or float64, finite. A searcher may or may not see later changes: after a change, prepare
            the codebook again.
        objective: quantity by which the winning code is chosen.
        bias: (K,) of the codes' dtype, added to the scores of DOT; None: zero.
        backend: one of `available(codes.device)`, or "auto".

    Raises:
        InvalidOption: the backend does not run on this device, or does not support this codebook.
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
    firsts = first_of_equal_tensors(codes, bias)
    if firsts is None:
        return _build(chosen, codes, bias, objective)
    distinct = _build(chosen, codes[firsts], None if bias is None else bias[firsts], objective)
    return MergedSearcher(distinct, firsts)


def _fits(backend: str, codes: Tensor, bias: Tensor | None, objective: Objective) -> bool:
    if backend == "native":
        return native.fits(codes.detach().numpy(), None if bias is None else bias.detach().numpy(), objective)
    return backend != "triton" or cuda.fits(codes)


def _build(backend: str, codes: Tensor, bias: Tensor | None, objective: Objective) -> Searcher:
    reference = functools.partial(TiledSearcher, codes, bias, objective, dtype=torch.float64)
    tiled = functools.partial(TiledSearcher, codes, bias, objective, dtype=torch.float32, fallback=reference)
    match backend:
        case "native":
            arrays = codes.detach().numpy(), None if bias is None else bias.detach().numpy()
            return TensorSearcher(native.NativeSearcher(*arrays, objective, fallback=reference))
        case "triton":
            return cuda.kernel_searcher(codes, bias, objective, fallback=tiled)
        case "torch":
            return tiled()
        case _:
            return reference()
