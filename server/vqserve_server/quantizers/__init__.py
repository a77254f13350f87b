"""The quantizers: what each computes in training, and exact encode and decode.

No gRPC, and no files except a remap's. Every kind is a class that lists its constructor's `arguments`, and is
registered in `vqserve_server.codebooks.kinds`. `AbstractQuantizer` is the base of all kinds with one codebook.
`inference` has the forms that serve. The classes are torch's modules, and imported on first use: `plain_kinds` has what
files and servers need to know of the simplest of them, without torch.
"""

import importlib
from typing import TYPE_CHECKING

from vqserve_server.quantizers import pickle_names

if TYPE_CHECKING:
    from vqserve_server.quantizers.abstract import AbstractQuantizer
    from vqserve_server.quantizers.ema import EMAVectorQuantizer, EmbeddingEMA
    from vqserve_server.quantizers.gumbel import GumbelQuantizer
    from vqserve_server.quantizers.inference.base import FrozenQuantizer, freeze
    from vqserve_server.quantizers.lookup import CosineQuantizer, DotQuantizer
    from vqserve_server.quantizers.perplexity import measure_perplexity
    from vqserve_server.quantizers.projected import VectorQuantizerWithInputProjection
    from vqserve_server.quantizers.quantizer import Quantizer
    from vqserve_server.quantizers.residual import ResidualQuantizer
    from vqserve_server.quantizers.residual_scalar import ResidualFiniteScalarQuantizer
    from vqserve_server.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
    from vqserve_server.quantizers.vector import VectorQuantizer, legacy_weight_norm_names

__all__ = [
    "AbstractQuantizer",
    "CosineQuantizer",
    "DotQuantizer",
    "EMAVectorQuantizer",
    "EmbeddingEMA",
    "FiniteScalarQuantizer",
    "FrozenQuantizer",
    "GumbelQuantizer",
    "LookupFreeQuantizer",
    "Quantizer",
    "ResidualFiniteScalarQuantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
    "VectorQuantizerWithInputProjection",
    "freeze",
    "legacy_weight_norm_names",
    "measure_perplexity",
]

# The module of each.
_MODULES = {
    "AbstractQuantizer": "abstract",
    "CosineQuantizer": "lookup",
    "DotQuantizer": "lookup",
    "EMAVectorQuantizer": "ema",
    "EmbeddingEMA": "ema",
    "FiniteScalarQuantizer": "scalar",
    "FrozenQuantizer": "inference.base",
    "GumbelQuantizer": "gumbel",
    "LookupFreeQuantizer": "scalar",
    "Quantizer": "quantizer",
    "ResidualFiniteScalarQuantizer": "residual_scalar",
    "ResidualQuantizer": "residual",
    "VectorQuantizer": "vector",
    "VectorQuantizerWithInputProjection": "projected",
    "freeze": "inference.base",
    "legacy_weight_norm_names": "vector",
    "measure_perplexity": "perplexity",
}

pickle_names.register_earlier_names()


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
