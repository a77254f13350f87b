"""A codebook's arguments and tensors made into a quantizer, which is a module of torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from vqserve_server.codebooks.kinds import class_of
from vqserve_server.quantizers import Quantizer

# What constructors call to fill a weight.
_FILLERS = frozenset({"uniform_", "normal_", "fill_", "zero_", "copy_"})


class _NoInitialValues(TorchFunctionMode):
    """Leaves out the initial values of weights: on the device meta, torch needs sympy for them: a second, 150 MB."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in _FILLERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def built(
    kind: str, arguments: Mapping[str, object], arrays: Mapping[str, npt.NDArray[Any]], *, shares_memory: bool
) -> Quantizer:
    """Return the quantizer, on the CPU and in eval mode; no state of the process has an effect on it.

    Args:
        kind: a key of `KINDS`.
        arguments: of the constructor, checked.
        arrays: the state dict, checked.
        shares_memory: whether it may use the memory of the arrays, and not copies.
    """
    # In inference mode parameters would be made that cannot be trained.
    with torch.inference_mode(False):
        made = torch.from_numpy if shares_memory else partial(torch.tensor, device="cpu")
        tensors = {name: made(array) for name, array in arrays.items()}
        quantizer = _without_memory(kind, arguments)
        # The constructor gets no remap: a state dict brings it. Assigned, because copies would take torch's default
        # type and device from the constructor.
        quantizer.load_state_dict(tensors, strict=True, assign=True)
    return quantizer.eval()


def sizes_of_class(kind: str, arguments: Mapping[str, object]) -> tuple[Mapping[str, tuple[int, ...]], int]:
    """Return the shape of every tensor but a remap, and K, as the class has them.

    Raises:
        InvalidOption: the arguments contradict each other.
        RuntimeError: a number of bytes is beyond 64 bits.
    """
    quantizer = _without_memory(kind, arguments)
    return {name: tuple(tensor.shape) for name, tensor in quantizer.state_dict().items()}, quantizer.num_codes


def _without_memory(kind: str, arguments: Mapping[str, object]) -> Quantizer:
    """Return a quantizer whose tensors have shapes and no memory."""
    options: dict[str, Any] = dict(arguments)
    layout = options.pop("layout")
    with torch.device("meta"), _NoInitialValues():
        quantizer = class_of(kind)(**options)
    quantizer.layout = layout
    return quantizer
