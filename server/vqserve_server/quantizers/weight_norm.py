"""An embedding table that is weight-normalised per feature column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vqserve_server.quantizers.dtypes import widen, widened
from vqserve_server.search import rounding

_V = TypeVar("_V")
# Torch's current names of the parametrization's tensors and, in its order, the names of its old implementation.
_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class WeightNormEmbedding(nn.Embedding):
    """weight = g * v / ||v||, the norm per column (Salimans and Kingma 2016, arXiv:1602.07868).

    Its state dict is that of torch's own parametrization of an `nn.Embedding` (`torch.nn.utils.parametrizations`,
    dim=1), and it loads the names of `torch.nn.utils.weight_norm` too. Unlike both it can be pickled, and its weight is
    never that of an earlier call.

    Parameters: `parametrizations.weight.original0` = g (1, D) and `.original1` = v (K, D).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        # nn.Embedding's own __init__ would register `weight` as a parameter.
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = self.sparse = False
        originals = nn.Module()
        v = torch.randn(num_embeddings, embedding_dim)
        originals.register_parameter("original0", nn.Parameter(torch.linalg.vector_norm(v, dim=0, keepdim=True)))
        originals.register_parameter("original1", nn.Parameter(v))
        self.parametrizations = nn.Module()
        self.parametrizations.add_module("weight", originals)

    @property
    def g(self) -> nn.Parameter:
        """The columns' norms (1, D)."""
        return self.get_parameter("parametrizations.weight.original0")

    @property
    def v(self) -> nn.Parameter:
        """The columns' directions (K, D)."""
        return self.get_parameter("parametrizations.weight.original1")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (K, D) as it is now, differentiable, in the parameters' type and its rounding errors."""
        norm = torch.linalg.vector_norm(self.v, dim=0, keepdim=True, dtype=widened(self.v.dtype))
        weight: Tensor = self.v * (self.g / norm)
        return weight.to(self.g.dtype)

    def exact_weight(self) -> Tensor:
        """Return the weight (K, D), detached, each entry the exact value rounded once to float32, in g's type."""
        if not bool(torch.isfinite(self.g).all() & torch.isfinite(self.v).all()):
            # Diverged: there are no exact values, and what this gives is not finite either.
            return self.weight.detach()
        return rounding.weight_norm(widen(self.v), widen(self.g)).to(self.g.dtype)

    def reset_parameters(self) -> None:
        """Draw v from N(0, 1) and set g to its column norms."""
        with torch.no_grad():
            self.v.normal_()
            self.g.copy_(torch.linalg.vector_norm(self.v, dim=0, keepdim=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # load_state_dict hands this module a dict of its own, from which its children load next.
        if all(prefix + old in state_dict and prefix + new not in state_dict for new, old in _NAMES.items()):
            for new, old in _NAMES.items():
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def legacy_weight_norm_names(state_dict: Mapping[str, _V]) -> dict[str, _V]:
    """Return a state dict with the names that checkpoints of `torch.nn.utils.weight_norm` have.

    `embedding.parametrizations.weight.original0` becomes `embedding.weight_g` and `.original1` becomes
    `embedding.weight_v`, under any prefix; all else keeps its name and place. For code that expects the old names:
    `VectorQuantizer.load_state_dict` takes both.
    """
    return {_legacy_name(name): value for name, value in state_dict.items()}


def _legacy_name(name: str) -> str:
    for new, old in _NAMES.items():
        start = name.removesuffix(new)
        if start != name and (start == "embedding." or start.endswith(".embedding.")):
            return start + old
    return name
