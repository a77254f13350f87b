"""The quantizers: what each computes in training, and exact encode and decode.

Torch only: no gRPC, and no files except a remap's. Every kind is a class that lists its constructor's `arguments`, and
is registered in `vqserve_server.codebooks.kinds`. `AbstractQuantizer` is the base of all kinds with one codebook.
`inference` has the forms that serve.
"""

from vqserve_server.quantizers import pickle_names
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

pickle_names.register_earlier_names()
