"""The vector quantizer whose codebook follows moving averages."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.dtypes import autocast_off, widened
from vqserve_server.quantizers.embedding_ema import EmbeddingEMA
from vqserve_server.quantizers.perplexity import count_codes, perplexity_of_counts
from vqserve_server.quantizers.remap import Remap, UnknownIndex
from vqserve_server.quantizers.rows import check_not_empty, from_rows, grid_of, to_rows


class EMAVectorQuantizer(AbstractQuantizer):
    """Nearest code, the codebook a moving average of its tokens (van den Oord et al. 2017, appendix A.1).

    State: `embedding.weight` (K, D), `embedding.cluster_size` (K,), `embedding.embed_avg` (K, D), and `used` (U,) with
    a remap. See `EmbeddingEMA` for codes that no token reaches, and for training on several processes.
    """

    kind: ClassVar[str] = "ema"

    def __init__(  # noqa: PLR0917
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: Remap | None = None,
        unknown_index: UnknownIndex = "random",
        loss_key: str = "loss/vq",
    ) -> None:
        """Draw the codebook from N(0, 1).

        Args:
            n_embed: K, the number of codes.
            embedding_dim: D, the width of a code and the channels of the input.
            beta: weight of the commitment loss.
            decay: share of an average that an update keeps.
            eps: Laplace smoothing of the cluster sizes.
            remap: path of a .npy file, or an integer array, of the full ids in use.
            unknown_index: "random", "extra" or an integer: what an id outside the remap is reported as.
            loss_key: the key of the loss in `info`.

        Raises:
            InvalidArgument: an argument or the remap is not valid; see `AbstractQuantizer`.
        """
        super().__init__(
            num_codes=n_embed,
            input_dim=embedding_dim,
            code_dim=embedding_dim,
            remap=remap,
            unknown_index=unknown_index,
            loss_key=loss_key,
        )
        self.num_tokens = self.num_codes
        self.codebook_dim = self.code_dim
        self.beta = beta
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps)

    def forward(self, z: Tensor, return_encodings: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize, with the gradient passed straight through; in training, then update the codebook.

        loss = beta * mean((sg[z_q] - z)^2), over all elements. The update happens in every grad mode while the module
        is in training and `embedding.update` is true, and is left out, on the device, for a batch that is not finite.

        Args:
            z: (b, D, h, w), (b, D, t, h, w), (b, s, D) or (n, D), floating point; NaN is not looked for.
            return_encodings: report the one-hot rows, N x K.

        Returns:
            z_q of z's shape, contiguous, in torch's promoted type of z and the weight, from the weight before the
            update; and a dict of
            - `loss_key`: 0-dim float32 (float64 if z or the weight is);
            - "encoding_indices": (N,) int64, remapped if there is a remap;
            - "perplexity": 0-dim, as the loss, on full ids;
            - with `return_encodings`, "encodings": (N, K) one-hot rows of full ids, of z's type.

        Raises:
            InvalidShape: another rank or channel count, or no tokens.
            InvalidDtype: z is not floating point.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_not_empty(grid)
        dtype = torch.promote_types(z.dtype, self.weight_dtype)
        with autocast_off(z.device):
            rows = to_rows(z, self.layout).to(widened(dtype))
            ids = self.search_problem().search_in_training(rows.detach())
            z_q = self.embedding(ids).to(rows.dtype)
            loss = self.beta * ((z_q.detach() - rows) ** 2).mean()
            perplexity, _ = perplexity_of_counts(count_codes(ids, self.num_codes), ids.numel(), loss.dtype)
            info = {self.loss_key: loss, "encoding_indices": self._drawn(ids), "perplexity": perplexity}
            if return_encodings:
                info["encodings"] = functional.one_hot(ids, self.num_codes).to(z.dtype)
            out = from_rows(self._straight_through(rows, z_q, dtype), grid, self.layout)
            if self.training and self.embedding.update:
                self.embedding.update_from(rows, ids)
        return out, info

    def code_rows(self) -> Tensor:
        """Return the codebook (K, D), detached."""
        return self.embedding.weight.detach()

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,)."""
        rows: Tensor = self.embedding(ids)
        return rows
