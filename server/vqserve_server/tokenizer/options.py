"""What a call may ask for beside its array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vqserve.layout import Layout, parse_layout
from vqserve_server.errors import InvalidOption

Output = Literal["latents", "code_rows"]

_OUTPUTS: dict[str, Output] = {"latents": "latents", "code_rows": "code_rows"}
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Options:
    """How an array is to be turned; checked, so that `encode_many` refuses nonsense before it begins."""

    layout: Layout | None = None
    dtype: torch.dtype = torch.float32
    output: Output = "latents"


def options(*, layout: str | None = None, dtype: str = "float32", output: str = "latents") -> Options:
    """Return the options of a call.

    Raises:
        InvalidOption: a value is not one of an option's values.
    """
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InvalidOption(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    if output not in _OUTPUTS:
        raise InvalidOption(f"output must be one of {', '.join(_OUTPUTS)}, not {output!r}")
    try:
        return Options(parse_layout(layout), _DTYPES[dtype], _OUTPUTS[output])
    except ValueError as error:
        raise InvalidOption(str(error)) from None
