"""What a caller may call the element type of latents."""

from __future__ import annotations

import sys

import numpy as np

from vqserve.errors import InvalidOption

LATENT_DTYPES = ("float32", "float16", "float64", "bfloat16")


def latent_dtype_name(dtype: object) -> str:
    """Return the name of an element type: "float16" for "float16", numpy's and torch's float16, and so on.

    Args:
        dtype: a name, a numpy scalar type or dtype (of this machine's byte order), or a torch dtype.

    Raises:
        InvalidOption: it is none that latents can have; lists those.
    """
    # Never imported here: who passes a torch dtype has torch.
    torch = sys.modules.get("torch")
    name: object = dtype
    if isinstance(dtype, np.dtype) and dtype.isnative:
        name = dtype.name
    elif isinstance(dtype, type) and issubclass(dtype, np.generic):
        name = dtype.__name__
    elif torch is not None and isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    if isinstance(name, str) and name in LATENT_DTYPES:
        return name
    known = ", ".join(repr(known) for known in LATENT_DTYPES)
    raise InvalidOption(
        f"{{option}} must be one of {known} or numpy's or torch's type of that name, not {dtype!r:.60}", option="dtype"
    )
