"""What a call may ask for beside its array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import latent_dtype_name
from vqserve.layout import Layout, parse_layout
from vqserve.types import OutputName
from vqserve.validation import check_has_output, check_num_quantizers, check_output


@dataclass(frozen=True)
class Options:
    """How an array is to be turned; checked, so that `encode_many` refuses nonsense before it begins."""

    layout: Layout | None
    dtype: torch.dtype
    output: OutputName
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
    check_output(output)
    check_has_output(output, info=info)
    count = check_num_quantizers(num_quantizers, available=info.num_quantizers)
    wanted: OutputName = "code_rows" if output == "code_rows" else "latents"
    return Options(parse_layout(layout), getattr(torch, latent_dtype_name(dtype)), wanted, count)
