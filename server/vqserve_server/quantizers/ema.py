"""The vector quantizer whose codebook follows moving averages of the rows assigned to its codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.perplexity import count_codes, perplexity_of_counts
from vqserve_server.quantizers.plain_kinds import EMAKind
from vqserve_server.quantizers.remap import Remap, UnknownIndex
from vqserve_server.quantizers.tensors import autocast_off, check_not_empty, from_rows, grid_of, to_rows, widened


class EmbeddingEMA(nn.Module):
    """Codes as quotients of exponential moving averages (van den Oord et al. 2017, appendix A.1).

    All three tensors are parameters that need no gradient, not buffers: optimizer checkpoints count parameters.

    A code that no token has reached jumps in the first update to about decay * |w0| / eps, since cluster_size starts
    at zero, and shrinks by `decay` an update: it is out of reach for about ln(1 / eps) / (1 - decay) updates, 1150 with
    the defaults. The formula is kept, for trained checkpoints depend on it. The remedy is to
    re-seed such codes from the batch (before the first step: all of them) with the three tensors in agreement, that is
    cluster_size above zero and embed_avg = weight * cluster_size: `vqserve_tools.training` does.

    Attributes:
        weight: (K, D) codes, standard normal at first.
        cluster_size: (K,) moving average of tokens per code, zero at first.
        embed_avg: (K, D) moving average of the sum of tokens per code, a copy of the weight at first.
        decay: share of an average that an update keeps.
        eps: Laplace smoothing of the cluster sizes.
        update: whether training updates the codes.
    """

    def __init__(self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        """Draw K = num_tokens codes of width D = codebook_dim."""
        super().__init__()
        self.decay = decay
        self.eps = eps
        # Not torch.randn: on the device meta, where shapes are found, it loads many modules.
        weight = torch.empty(num_tokens, codebook_dim).normal_()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.update = True

    def forward(self, embed_id: Tensor) -> Tensor:
        """Return the codes (*ids.shape, D) of ids in [0, K)."""
        return functional.embedding(embed_id, self.weight)

    def cluster_size_ema_update(self, new_cluster_size: Tensor, keep: Tensor | None = None) -> None:
        """Move the cluster sizes towards a batch's tokens per code (K,); not where `keep`, 0-dim bool, is true."""
        self._average(self.cluster_size, new_cluster_size, keep)

    def embed_avg_ema_update(self, new_embed_avg: Tensor, keep: Tensor | None = None) -> None:
        """Move the averages towards a batch's sums per code (K, D); not where `keep`, 0-dim bool, is true."""
        self._average(self.embed_avg, new_embed_avg, keep)

    @torch.no_grad()
    def weight_update(self, num_tokens: int, keep: Tensor | None = None) -> None:
        """Set the weight to embed_avg / smoothed cluster sizes, with K = num_tokens; not where `keep` is true."""
        cluster_size = self.cluster_size.to(widened(self.cluster_size.dtype))
        total = cluster_size.sum()
        smoothed = (cluster_size + self.eps) / (total + num_tokens * self.eps) * total
        _replace(self.weight, self.embed_avg / smoothed[:, None], keep)

    @torch.no_grad()
    def update_from(self, rows: Tensor, ids: Tensor) -> None:
        """Take one step of training from a batch: all three updates, or none if the batch is not finite.

        Nothing waits for the device. The sums are those of this process: under DistributedDataParallel every rank
        follows its own share of the batch and the codebooks drift apart, as they do in the original, unless the
        ranks' codebooks are synchronised by the trainer.

        Args:
            rows: (N, D) tokens, at least float32.
            ids: (N,) int64, the code of each.
        """
        num_codes = self.weight.shape[0]
        counts = count_codes(ids, num_codes)
        sums = rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, ids, rows.detach())
        # A sum is finite only if all of its rows are. What overflows the averages' type would spoil them just so.
        is_broken = ~torch.isfinite(sums.to(self.embed_avg.dtype)).all()
        self.cluster_size_ema_update(counts.to(sums.dtype), is_broken)
        self.embed_avg_ema_update(sums, is_broken)
        self.weight_update(num_codes, is_broken)

    @torch.no_grad()
    def _average(self, parameter: nn.Parameter, batch: Tensor, keep: Tensor | None) -> None:
        # In the wider of both types: half averages are rounded once an update.
        wide = torch.promote_types(widened(parameter.dtype), batch.dtype)
        _replace(parameter, self.decay * parameter.to(wide) + (1 - self.decay) * batch, keep)


def _replace(parameter: nn.Parameter, new: Tensor, keep: Tensor | None) -> None:
    new = new.to(parameter.dtype)
    parameter.copy_(new if keep is None else torch.where(keep, parameter, new))


class EMAVectorQuantizer(EMAKind, AbstractQuantizer):
    """Nearest code, the codebook a moving average of its tokens (van den Oord et al. 2017, appendix A.1).

    State: `embedding.weight` (K, D), `embedding.cluster_size` (K,), `embedding.embed_avg` (K, D), and `used` (U,) with
    a remap. See `EmbeddingEMA` for codes that no token reaches, and for training on several processes.
    """

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
            z: (b, D, h, w), (b, D, t, h, w), (b, s, D) or (n, D), floating point; NaN is not checked for.
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
            info = {self.loss_key: loss, "encoding_indices": self._sampled(ids), "perplexity": perplexity}
            if return_encodings:
                info["encodings"] = functional.one_hot(ids, self.num_codes).to(z.dtype)
            out = from_rows(self._straight_through(rows, z_q, dtype), grid, self.layout)
            if self.training and self.embedding.update:
                self.embedding.update_from(rows, ids)
        return out, info

    def code_rows(self) -> Tensor:
        """Return the codebook (K, D), detached."""
        return self.embedding.weight.detach()

    def cluster_sizes(self) -> Tensor:
        """Return the moving average (K,) of tokens per batch and code."""
        return self.embedding.cluster_size.detach()

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,)."""
        rows: Tensor = self.embedding(ids)
        return rows
