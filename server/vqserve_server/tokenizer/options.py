"""What a call may ask for beside its array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import latent_dtype_name
from vqserve.layout import Layout, parse_layout
from vqserve_server.errors import InvalidOption
from vqserve_server.validation import check_num_quantizers, check_output

Output = Literal["latents", "code_rows"]

_OUTPUTS: dict[str, Output] = {"latents": "latents", "code_rows": "code_rows"}


@dataclass(frozen=True)
class Options:
    """How an array is to be turned; checked, so that `encode_many` refuses nonsense before it begins."""

    layout: Layout | None
    dtype: torch.dtype
    output: Output
    num_quantizers: int


def options(
    *,
    info: CodebookInfo,
    layout: str | None = None,
    dtype: Any = "float32",
    output: str = "latents",
    num_quantizers: int | None = None,
) -> Options:
    """Return the options of a call.

    Raises:
        InvalidOption: a value is not one of an option's values, or the codebook cannot give it.
    """
    if output not in _OUTPUTS:
        raise InvalidOption(f"output must be one of {', '.join(_OUTPUTS)}, not {output!r}")
    check_output(output, info=info)
    count = check_num_quantizers(num_quantizers, available=info.num_quantizers)
    try:
        return Options(parse_layout(layout), getattr(torch, latent_dtype_name(dtype)), _OUTPUTS[output], count)
    except ValueError as error:
        raise InvalidOption(str(error)) from None
