"""Types of the calls that Client, AsyncClient and Tokenizer share, for type checkers; torch is never imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import LatentDTypeName
from vqserve.layout import Layout

LayoutName: TypeAlias = Literal["channels_first", "channels_last"]
OutputName: TypeAlias = Literal["latents", "code_rows"]
OnError: TypeAlias = Literal["raise", "return"]
# The key of an array in encode_many: any object.
KeyT = TypeVar("KeyT")

if TYPE_CHECKING:
    import torch

    # numpy in, numpy out; torch in, torch out.
    ArrayT = TypeVar("ArrayT", npt.NDArray[Any], torch.Tensor)
    LatentDType: TypeAlias = LatentDTypeName | np.dtype[Any] | type[np.floating[Any]] | torch.dtype
else:
    ArrayT = TypeVar("ArrayT")
    LatentDType: TypeAlias = LatentDTypeName | np.dtype[Any] | type[np.floating[Any]]


class EncodeOptions(TypedDict, total=False):
    """The options of `encode`, and those that all calls share."""

    layout: LayoutName | Layout | None
    batched: bool
    num_quantizers: int | None
    codebook: str | None
    digest: str | None
    timeout: float | None


class DecodeOptions(EncodeOptions, total=False):
    """The options of `decode`."""

    dtype: LatentDType
    output: OutputName
