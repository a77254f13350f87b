"""The vector quantizer of VQ-VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.dtypes import autocast_off, widened
from vqserve_server.quantizers.perplexity import count_codes, perplexity_of_counts
from vqserve_server.quantizers.remap import Remap, UnknownIndex
from vqserve_server.quantizers.rows import check_not_empty, from_rows, grid_of, to_rows
from vqserve_server.quantizers.weight_norm import WeightNormEmbedding


class VectorQuantizer(AbstractQuantizer):
    """Nearest code, learnt by gradient (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv:1711.00937).

    State: `embedding.weight` (K, D), and `used` (U,) with a remap; with `embedding_weight_norm`
    `embedding.parametrizations.weight.original0` (1, D) and `.original1` (K, D) in place of the weight.
    """

    kind: ClassVar[str] = "vq"
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
            z: (b, D, h, w), (b, D, t, h, w), (b, s, D) or (n, D), floating point; NaN is not looked for.

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
            indices = self._drawn(ids)
            info = {self.loss_key: loss, "min_encoding_indices": indices}
            if self.sane_index_shape:
                info["min_encoding_indices"] = indices.reshape(tuple(grid))
            if self.log_perplexity:
                counts = count_codes(ids, self.num_codes)
                info["perplexity"], info["cluster_usage"] = perplexity_of_counts(counts, ids.numel(), loss.dtype)
            return self._straight_through(z, z_q, dtype), info
