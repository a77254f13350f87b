"""The quantizers: what each computes in training, and exact encode and decode.

Torch only: no gRPC, no files but a remap's. One noun a file; `AbstractQuantizer` has what all share.
"""

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.ema import EMAVectorQuantizer
from vqserve_server.quantizers.embedding_ema import EmbeddingEMA
from vqserve_server.quantizers.frozen import FrozenQuantizer, freeze
from vqserve_server.quantizers.gumbel import GumbelQuantizer
from vqserve_server.quantizers.perplexity import measure_perplexity
from vqserve_server.quantizers.projection import VectorQuantizerWithInputProjection
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.vector import VectorQuantizer
from vqserve_server.quantizers.weight_norm import legacy_weight_norm_names

__all__ = [
    "AbstractQuantizer",
    "EMAVectorQuantizer",
    "EmbeddingEMA",
    "FrozenQuantizer",
    "GumbelQuantizer",
    "Quantizer",
    "VectorQuantizer",
    "VectorQuantizerWithInputProjection",
    "freeze",
    "legacy_weight_norm_names",
    "measure_perplexity",
]
