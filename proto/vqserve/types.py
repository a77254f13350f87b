"""Types of the calls that Client, AsyncClient and Tokenizer share, for type checkers; torch is never imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import LatentDTypeName

LayoutName: TypeAlias = Literal["channels_first", "channels_last"]
OutputName: TypeAlias = Literal["latents", "code_rows"]

if TYPE_CHECKING:
    import torch

    # numpy in, numpy out; torch in, torch out.
    ArrayT = TypeVar("ArrayT", npt.NDArray[Any], torch.Tensor)
    LatentDType: TypeAlias = LatentDTypeName | np.dtype[Any] | type[np.floating[Any]] | torch.dtype
else:
    ArrayT = TypeVar("ArrayT")
    LatentDType: TypeAlias = LatentDTypeName | np.dtype[Any] | type[np.floating[Any]]
