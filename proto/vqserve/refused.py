"""What to tell whoever gave something that is no array of latents or indices; in process and over the wire alike."""

from __future__ import annotations

from numbers import Number

import numpy as np

from vqserve.dtypes import LATENTS


def not_an_array(what: str, value: object) -> str:
    """Return the text for a value that is neither a numpy array nor a torch tensor.

    Args:
        what: "latents" or "indices".
        value: what was given.
    """
    if isinstance(value, np.ma.MaskedArray):
        found = "a masked array, whose mask would be lost"
    elif isinstance(value, Number | np.generic):
        found = "a scalar"
    elif isinstance(value, list | tuple):
        found = f"{type(value).__name__}: numpy.asarray(...) first"
    else:
        found = type(value).__name__
    return f"{what} must be a numpy array or a torch tensor, not {found}"


def not_latents(dtype: object) -> str:
    """Return the text for an array whose elements, numpy's or torch's, are not those of latents."""
    name = str(dtype).removeprefix("torch.")
    hint = "indices? that is decode" if "int" in name else "see .astype(numpy.float32)"
    *names, last = (known.name for known in sorted(LATENTS, key=lambda known: known.storage.itemsize))
    return f"latents must be {', '.join(names)} or {last}, not {name}: {hint}"


def not_indices(dtype: object) -> str:
    """Return the text for an array whose elements, numpy's or torch's, are not those of indices."""
    name = str(dtype).removeprefix("torch.")
    hint = ": latents? that is encode" if "float" in name else ""
    return f"indices must be integers, not {name}{hint}"
