"""What a call may ask for beside its array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vqserve.latent_dtype import latent_dtype_name
from vqserve.layout import Layout, parse_layout
from vqserve_server.errors import InvalidOption

Output = Literal["latents", "code_rows"]

_OUTPUTS: dict[str, Output] = {"latents": "latents", "code_rows": "code_rows"}


@dataclass(frozen=True)
class Options:
    """How an array is to be turned; checked, so that `encode_many` refuses nonsense before it begins."""

    layout: Layout | None = None
    dtype: torch.dtype = torch.float32
    output: Output = "latents"


def options(*, layout: str | None = None, dtype: Any = "float32", output: str = "latents") -> Options:
    """Return the options of a call.

    Raises:
        InvalidOption: a value is not one of an option's values.
    """
    if output not in _OUTPUTS:
        raise InvalidOption(f"output must be one of {', '.join(_OUTPUTS)}, not {output!r}")
    try:
        return Options(parse_layout(layout), getattr(torch, latent_dtype_name(dtype)), _OUTPUTS[output])
    except ValueError as error:
        raise InvalidOption(str(error)) from None
