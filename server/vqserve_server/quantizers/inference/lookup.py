"""A codebook prepared for serving: a search and two tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqserve.validation import check_output
from vqserve_server.errors import CodebookError
from vqserve_server.quantizers.dtypes import autocast_off
from vqserve_server.quantizers.inference.base import FrozenQuantizer, Output, some
from vqserve_server.quantizers.objective import SearchProblem
from vqserve_server.quantizers.projections import project
from vqserve_server.quantizers.table import Table
from vqserve_server.search import SearchCounts, Searcher


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenLookup(FrozenQuantizer):
    """One codebook: a searcher, and the rows that its indices stand for."""

    _searcher: Searcher
    # What the searcher was made from, and holds as well: it cannot be pickled, so it is made anew.
    _problem: SearchProblem
    _projection: tuple[Tensor, Tensor] | None
    # (K,) what is reported for a full id; None: the winner's index itself.
    _reported: Tensor | None
    # (decodable, D) and (decodable, output_dim); one table where there is no output projection.
    _code_rows: Table
    _latents: Table

    @property
    def search_backend(self) -> str:
        """The name of the search backend."""
        return self._searcher.backend

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_searcher": self.search_backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _searcher=state["_problem"].prepare(state["_searcher"]))

    @torch.no_grad()
    def encode_rows(
        self,
        rows: Tensor,
        *,
        num_quantizers: int | None = None,
        counts: Sequence[SearchCounts] | None = None,
    ) -> Tensor:
        """Return the index (n,) of every row's code; see `FrozenQuantizer.encode_rows`."""
        with autocast_off(self.device):
            if self._projection is not None:
                rows = project(rows, self._projection)
            winners = self._searcher.search(rows, None if counts is None else counts[0])
        return winners if self._reported is None else self._reported[winners]

    @torch.no_grad()
    def decode_rows(self, indices: Tensor, *, output: Output = "latents", dtype: torch.dtype | None = None) -> Tensor:
        """Return the row of every index (n,); see `FrozenQuantizer.decode_rows`."""
        check_output(output)
        return (self._latents if output == "latents" else self._code_rows).take(indices, dtype)

    @torch.no_grad()
    def check_itself(self) -> None:
        """Search for some codes: each is its own nearest, or scores at least as much as itself.

        Raises:
            CodebookError: the search found a worse one.
        """
        problem = self._problem
        looked_for = some(problem.codes.shape[0], self.device)
        with autocast_off(self.device):
            winners = self._searcher.search(problem.codes[looked_for])
            is_right = (winners >= 0) & (winners < problem.codes.shape[0])
            if bool(is_right.all()):
                is_right = problem.is_no_worse(winners, looked_for)
        if not bool(is_right.all()):
            code = int(looked_for[~is_right][0])
            raise CodebookError(f"code {code} is not found at its own place by search {self.search_backend!r}")

    def largest_latents(self) -> Tensor:
        """Return the greatest magnitude (output_dim,) float64 of every channel of what decode gives."""
        return self._latents.rows.abs().amax(dim=0).double()
