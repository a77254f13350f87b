"""The vector quantizer of VQ-VAE, and the embedding that is weight-normalised per feature column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.perplexity import count_codes, perplexity_of_counts
from vqserve_server.quantizers.plain_kinds import VectorKind
from vqserve_server.quantizers.remap import Remap, UnknownIndex
from vqserve_server.quantizers.tensors import autocast_off, check_not_empty, from_rows, grid_of, to_rows, widen, widened
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


class VectorQuantizer(VectorKind, AbstractQuantizer):
    """Nearest code, learnt by gradient (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv:1711.00937).

    State: `embedding.weight` (K, D), and `used` (U,) with a remap; with `embedding_weight_norm`
    `embedding.parametrizations.weight.original0` (1, D) and `.original1` (K, D) in place of the weight.
    """

    embedding: nn.Embedding

    def __init__(  # noqa: PLR0917
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: Remap | None = None,
        unknown_index: UnknownIndex = "random",
        sane_index_shape: bool = False,
        log_perplexity: bool = False,
        embedding_weight_norm: bool = False,
        loss_key: str = "loss/vq",
    ) -> None:
        """Draw the codebook uniformly from [-1/K, 1/K]; with weight norm, v from N(0, 1).

        Args:
            n_e: K, the number of codes.
            e_dim: D, the width of a code and the channels of the input.
            beta: weight of the commitment loss.
            remap: path of a .npy file, or an integer array, of the full ids in use.
            unknown_index: "random", "extra" or an integer: what an id outside the remap is reported as.
            sane_index_shape: report indices over the grid in `forward`, as `encode` does, and not flat.
            log_perplexity: report perplexity and codes in use in `forward`.
            embedding_weight_norm: normalise the codebook's columns (Salimans and Kingma 2016).
            loss_key: the key of the loss in `info`.

        Raises:
            InvalidArgument: an argument or the remap is not valid; see `AbstractQuantizer`.
        """
        super().__init__(
            num_codes=n_e, input_dim=e_dim, code_dim=e_dim, remap=remap, unknown_index=unknown_index, loss_key=loss_key
        )
        self.n_e = self.num_codes
        self.e_dim = self.code_dim
        self.beta = beta
        self.sane_index_shape = sane_index_shape
        self.log_perplexity = log_perplexity
        if embedding_weight_norm:
            self.embedding = WeightNormEmbedding(n_e, e_dim)
        else:
            self.embedding = nn.Embedding(n_e, e_dim)
            nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize, with the gradient passed straight through.

        loss = beta * mean((sg[z_q] - z)^2) + mean((z_q - sg[z])^2), over all elements.

        Args:
            z: (b, D, h, w), (b, D, t, h, w), (b, s, D) or (n, D), floating point; NaN is not checked for.

        Returns:
            z_q of z's shape, contiguous, in torch's promoted type of z and the weight; and a dict of
            - `loss_key`: 0-dim float32 (float64 if z or the weight is);
            - "min_encoding_indices": int64 (N,), or over the grid with `sane_index_shape`; remapped under a remap;
            - with `log_perplexity`, on full ids, "perplexity" (0-dim, as the loss) and "cluster_usage" (0-dim int64).

        Raises:
            InvalidShape: another rank or channel count, or no tokens.
            InvalidDtype: z is not floating point.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_not_empty(grid)
        z_q, info = self._quantized(to_rows(z, self.layout), grid)
        return from_rows(z_q, grid, self.layout), info

    def code_rows(self) -> Tensor:
        """Return the codebook (K, D), detached; with weight norm each entry is exact, rounded once to float32."""
        if isinstance(self.embedding, WeightNormEmbedding):
            return self.embedding.exact_weight()
        return self.embedding.weight.detach()

    @property
    def embedding_weight_norm(self) -> bool:
        """Whether the codebook's columns are normalised."""
        return isinstance(self.embedding, WeightNormEmbedding)

    def initial_bound(self) -> float | None:
        """Return 1/K; None with weight norm, whose codes are drawn from a normal distribution."""
        return None if self.embedding_weight_norm else 1.0 / self.n_e

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,): the values of `code_rows` with the weight's gradient."""
        rows: Tensor = self.embedding(ids)
        if isinstance(self.embedding, WeightNormEmbedding):
            rows = self.code_rows()[ids] + (rows - rows.detach())
        return rows

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns."""
        return next(self.embedding.parameters()).dtype

    def _quantized(
        self, rows: Tensor, grid: Sequence[int], searched: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # `searched` are the rows whose nearest codes are taken where they are not `rows` themselves.
        dtype = torch.promote_types(rows.dtype, self.weight_dtype)
        with autocast_off(rows.device):
            z = rows.to(widened(dtype))
            ids = self.search_problem().search_in_training((z if searched is None else searched).detach())
            z_q = self.embedding(ids).to(z.dtype)
            loss = self.beta * ((z_q.detach() - z) ** 2).mean() + ((z_q - z.detach()) ** 2).mean()
            indices = self._sampled(ids)
            info = {self.loss_key: loss, "min_encoding_indices": indices}
            if self.sane_index_shape:
                info["min_encoding_indices"] = indices.reshape(tuple(grid))
            if self.log_perplexity:
                counts = count_codes(ids, self.num_codes)
                info["perplexity"], info["cluster_usage"] = perplexity_of_counts(counts, ids.numel(), loss.dtype)
            return self._straight_through(z, z_q, dtype), info
