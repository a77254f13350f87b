"""The quantizer that draws codes by the Gumbel-softmax."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from vqserve.errors import InvalidOption
from vqserve.layout import channel_axis
from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.objective import SearchProblem
from vqserve_server.quantizers.plain_kinds import GumbelKind
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.remap import Remap, UnknownIndex
from vqserve_server.quantizers.tensors import (
    apply_layer,
    autocast_off,
    check_not_empty,
    from_rows,
    grid_of,
    layout_of,
    to_rows,
    widen,
    widened,
)
from vqserve_server.search import Objective


class GumbelQuantizer(GumbelKind, AbstractQuantizer):
    """Codes drawn from logits (Jang, Gu, Poole 2016, arXiv:1611.01144); encode takes the greatest logit.

    Under a remap only the used codes take part, in the order of `used`, so that every index is a position in `used` and
    `unknown_index` is never reported. K stays n_embed in the loss: its minimum there is kl_weight * ln(K / U), not 0.

    State: `proj.weight` (K, H, 1, 1), `proj.bias` (K,), `embed.weight` (K, D), and `used` (U,) with a remap. The
    temperature is a plain attribute, which trainers anneal and no checkpoint keeps.
    """

    def __init__(  # noqa: PLR0917
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        remap: Remap | None = None,
        unknown_index: UnknownIndex = "random",
        loss_key: str = "loss/vq",
    ) -> None:
        """Draw the projection and the codebook as torch's layers do.

        Args:
            num_hiddens: H, the channels of the input.
            embedding_dim: D, the width of a code and the channels of the output.
            n_embed: K, the number of codes.
            straight_through: draw one-hot rows in training, with the soft rows' gradient; eval always does.
            kl_weight: weight of the divergence from even use.
            temp_init: first value of `temperature`.
            remap: path of a .npy file, or an integer array, of the full ids in use.
            unknown_index: "random", "extra" or an integer.
            loss_key: the key of the loss in `info`.

        Raises:
            InvalidArgument: an argument or the remap is not valid; see `AbstractQuantizer`.
        """
        super().__init__(
            num_codes=n_embed,
            input_dim=num_hiddens,
            code_dim=embedding_dim,
            remap=remap,
            unknown_index=unknown_index,
            loss_key=loss_key,
        )
        self.n_embed = self.num_codes
        self.embedding_dim = self.code_dim
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.temperature = temp_init
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(
        self, z: Tensor, temp: float | None = None, return_logits: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw codes from softmax(logits / tau), logits = proj(z).

        The noise is `torch.nn.functional.gumbel_softmax`'s, from torch's global generator, in eval too. loss =
        kl_weight * mean over tokens of sum_j q_j log(q_j * K + 1e-10) with q = softmax(logits).

        Args:
            z: (b, H, h, w), (b, H, t, h, w), (b, s, H) or (n, H), floating point; NaN is not checked for.
            temp: tau; None: the attribute `temperature`.
            return_logits: report the logits.

        Returns:
            z_q of D channels in z's layout, contiguous, in torch's promoted type of z and the codebook; and a dict of
            - `loss_key`: 0-dim float32 (float64 if z or the weight is);
            - "indices": int64 over the grid, the codes drawn, positions in `used` under a remap;
            - with `return_logits`, "logits": K channels (U under a remap) in z's layout, at least float32.

        Raises:
            InvalidShape: another rank or channel count, or no tokens.
            InvalidDtype: z is not floating point.
            InvalidOption: tau is not positive.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_not_empty(grid)
        tau = self.temperature if temp is None else temp
        if not tau > 0:
            raise InvalidOption(f"the temperature must be positive, not {tau}")
        logits = self._logits(z)
        axis = channel_axis(layout_of(z.ndim, self.layout))
        dtype = torch.promote_types(z.dtype, self.weight_dtype)
        with autocast_off(z.device):
            logits = logits.to(widened(torch.promote_types(logits.dtype, dtype)))
            y = functional.gumbel_softmax(logits, tau, hard=self.straight_through or not self.training, dim=axis)
            embed = self.embed.weight if self.used is None else self.embed.weight[self.used]
            z_q = to_rows(y, self.layout) @ embed.to(y.dtype)
            q = torch.softmax(logits, dim=axis)
            divergence = (q * torch.log(q * self.n_embed + 1e-10)).sum(dim=axis).mean()
        info = {self.loss_key: self.kl_weight * divergence, "indices": y.argmax(dim=axis)}
        if return_logits:
            info["logits"] = logits
        return from_rows(z_q.to(dtype), grid, self.layout), info

    def code_rows(self) -> Tensor:
        """Return the codebook (K, D), detached."""
        return self.embed.weight.detach()

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,)."""
        rows: Tensor = self.embed(ids)
        return rows

    def search_problem(self) -> SearchProblem:
        """Return the search for the greatest logit w_j . z + b_j among the codes that take part."""
        weight, bias = rearrange(widen(self.proj.weight), "k c 1 1 -> k c"), widen(self._bias())
        if self.used is None:
            return SearchProblem(codes=weight, objective=Objective.DOT, bias=bias)
        # Equal scores go to the lowest position: an id that `used` lists twice competes once.
        return SearchProblem(
            codes=weight[self.used], objective=Objective.DOT, bias=bias[self.used], reports_full_ids=False
        )

    @property
    def num_reachable(self) -> int:
        """Number of different codes that encode can choose: those of the remap."""
        return self.num_codes if self.used is None else int(torch.unique(self.used).numel())

    def without_remap(self) -> tuple[Quantizer, Tensor | None]:
        """Return this quantizer: the codes outside a remap are never chosen."""
        return self, None

    @property
    def vocab_size(self) -> int:
        """The exclusive bound of the indices that are ever reported or decoded: no sentinel among them."""
        return self.decodable

    def _bias(self) -> Tensor:
        return self.proj.get_parameter("bias")

    def _logits(self, z: Tensor) -> Tensor:
        # Of the codes that take part, in z's layout: a 1x1 convolution of images, else over one long row of tokens.
        axis = channel_axis(layout_of(z.ndim, self.layout))
        if z.ndim == 4 and axis == 1:
            logits = apply_layer(self.proj, z)
        else:
            rows = to_rows(z, self.layout)
            logits = rearrange(apply_layer(self.proj, rearrange(rows, "n c -> 1 c n 1")), "1 k n 1 -> n k")
            logits = from_rows(logits, grid_of(z, self.input_dim, self.layout), self.layout)
        return logits if self.used is None else logits.index_select(axis, self.used)
