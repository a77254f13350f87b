"""The search that a quantizer defines: codes, objective, bias."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqserve.errors import CodebookError
from vqserve_server import search
from vqserve_server.quantizers.inference.served import is_no_worse
from vqserve_server.quantizers.tensors import are_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchProblem:
    """The codes that are searched, and what decides the winner.

    Attributes:
        codes: (K, D) float32 or float64; only the codes that can win.
        objective: what the winning code minimises or maximises.
        bias: (K,) of the codes' type, for DOT only.
        reports_full_ids: whether the winner's index is a full id; else it is a position in `used` already.
    """

    codes: Tensor
    objective: search.Objective = search.Objective.L2
    bias: Tensor | None = None
    reports_full_ids: bool = True

    def to(self, device: torch.device) -> SearchProblem:
        """Return the problem on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, codes=self.codes.to(device), bias=bias)

    def prepare(self, backend: str = "auto") -> search.Searcher:
        """Return a searcher on the codes' device.

        Raises:
            CodebookError: a code or bias is NaN or infinite; names the first.
            InvalidOption: the backend does not run on the device.
        """
        finite = self._finite()
        if not bool(finite.all()):
            raise CodebookError(f"code {int(torch.nonzero(~finite)[0])} holds NaN or infinity: nothing can be encoded")
        return self._searcher(backend)

    def is_no_worse(self, found: Tensor, asked: Tensor) -> Tensor:
        """Return whether codes `found` (n,) answer the rows of codes `asked` (n,) as well as these do: bool (n,)."""
        biases = None if self.bias is None else (self.bias[found].double(), self.bias[asked].double())
        answer: Tensor = is_no_worse(self.codes[found].double(), self.codes[asked].double(), self.objective, biases)
        return answer

    def search_in_training(self, rows: Tensor) -> Tensor:
        """Return the winning code (N,) int64 of every row (N, D), codes with NaN or infinity never winning.

        A codebook that has diverged must not stop a training loop, which sees it in the loss. Without a finite code
        every row gets code 0.
        """
        finite = self._finite()
        if bool(finite.all()):
            return self._searcher().search(rows)
        kept = torch.nonzero(finite)[:, 0]
        if kept.numel() == 0:
            return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        bias = None if self.bias is None else self.bias[kept]
        return kept[replace(self, codes=self.codes[kept], bias=bias)._searcher().search(rows)]

    def _searcher(self, backend: str = "auto") -> search.Searcher:
        return search.prepare(self.codes, objective=self.objective, bias=self.bias, backend=backend)

    def _finite(self) -> Tensor:
        finite = are_finite(self.codes)
        return finite if self.bias is None else finite & torch.isfinite(self.bias)
