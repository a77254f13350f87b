"""The kinds of quantizers that codebook files hold. A new kind needs its class in quantizers/ and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from vqserve.errors import CodebookError
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)

_CLASSES: tuple[type[Quantizer], ...] = (
    VectorQuantizer,
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizerWithInputProjection,
    CosineQuantizer,
    DotQuantizer,
    ResidualQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
)
KINDS: Mapping[str, type[Quantizer]] = {cls.kind: cls for cls in _CLASSES}


def kind_of(quantizer: Quantizer) -> str:
    """Return the kind of a quantizer that a file can hold: a key of `KINDS`.

    Raises:
        CodebookError: it is of none of their classes.
    """
    # A subclass may compute something else: a file of it would be read as its base.
    for kind, cls in KINDS.items():
        if type(quantizer) is cls:
            return kind
    known = ", ".join(cls.__name__ for cls in KINDS.values())
    raise CodebookError(
        f"{type(quantizer).__name__} is not one of {known}: load its state dict into the one that it behaves like"
    )
