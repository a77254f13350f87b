"""The kinds of quantizers that codebook files hold. A new kind needs its class in quantizers/ and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vqserve.errors import CodebookError
from vqserve_server.quantizers.declared import Declared
from vqserve_server.quantizers.plain_kinds import PLAIN_KINDS

if TYPE_CHECKING:
    from vqserve_server.quantizers import Quantizer

# The classes by kind, which are torch's modules.
_CLASSES: Mapping[str, str] = {
    "vq": "VectorQuantizer",
    "ema": "EMAVectorQuantizer",
    "gumbel": "GumbelQuantizer",
    "vq_projection": "VectorQuantizerWithInputProjection",
    "cosine": "CosineQuantizer",
    "dot": "DotQuantizer",
    "rvq": "ResidualQuantizer",
    "fsq": "FiniteScalarQuantizer",
    "lfq": "LookupFreeQuantizer",
    "residual_fsq": "ResidualFiniteScalarQuantizer",
}


class _Kinds(Mapping[str, type[Declared]]):
    """What is declared of each kind: without torch where that is enough, else the class."""

    def __getitem__(self, kind: str) -> type[Declared]:
        return PLAIN_KINDS[kind] if kind in PLAIN_KINDS else class_of(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)

    def __contains__(self, kind: object) -> bool:
        return kind in _CLASSES


KINDS: Mapping[str, type[Declared]] = _Kinds()


def class_of(kind: str) -> type[Quantizer]:
    """Return the class of a key of `KINDS`; torch is imported."""
    found: type[Quantizer] = getattr(importlib.import_module("vqserve_server.quantizers"), _CLASSES[kind])
    return found


def kind_of(quantizer: Quantizer) -> str:
    """Return the kind of a quantizer that a file can hold: a key of `KINDS`.

    Raises:
        CodebookError: it is of none of their classes.
    """
    # A subclass may compute something else: a file of it would be read as its base.
    for kind in KINDS:
        if type(quantizer) is class_of(kind):
            return kind
    known = ", ".join(_CLASSES.values())
    raise CodebookError(
        f"{type(quantizer).__name__} is not one of {known}: load its state dict into the one that it behaves like"
    )
