"""The quantizers: what each computes in training, and exact encode and decode.

Torch only: no gRPC, no files but a remap's. One noun a file; `AbstractQuantizer` has what all share.
"""

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.cosine import CosineQuantizer
from vqserve_server.quantizers.dot import DotQuantizer
from vqserve_server.quantizers.ema import EMAVectorQuantizer
from vqserve_server.quantizers.embedding_ema import EmbeddingEMA
from vqserve_server.quantizers.frozen import FrozenQuantizer, freeze
from vqserve_server.quantizers.fsq import FiniteScalarQuantizer
from vqserve_server.quantizers.gumbel import GumbelQuantizer
from vqserve_server.quantizers.lfq import LookupFreeQuantizer
from vqserve_server.quantizers.perplexity import measure_perplexity
from vqserve_server.quantizers.projection import VectorQuantizerWithInputProjection
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.residual import ResidualQuantizer
from vqserve_server.quantizers.vector import VectorQuantizer
from vqserve_server.quantizers.weight_norm import legacy_weight_norm_names

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
    "ResidualQuantizer",
    "VectorQuantizer",
    "VectorQuantizerWithInputProjection",
    "freeze",
    "legacy_weight_norm_names",
    "measure_perplexity",
]
