"""The quantizer that takes the code of the greatest dot product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vqserve_server.quantizers.arguments import CODE_DIM, CODES, LAYOUT, PROJECTIONS, UNKNOWN_INDEX, Argument
from vqserve_server.quantizers.dtypes import widen
from vqserve_server.quantizers.lookup import LookupQuantizer
from vqserve_server.quantizers.quantizer import Metric
from vqserve_server.quantizers.search_problem import SearchProblem
from vqserve_server.search import Objective


class DotQuantizer(LookupQuantizer):
    """index = argmax_j z . e_j, decoded as e_j.

    How index backpropagation quantization searches: its logits are z . e_j without a bias (Shi et al. 2024,
    arXiv:2412.02692). See `LookupQuantizer` for arguments and state.
    """

    kind: ClassVar[str] = "dot"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "n_e": CODES,
        "e_dim": CODE_DIM,
        **PROJECTIONS,
        "unknown_index": UNKNOWN_INDEX,
        "layout": LAYOUT,
    }
    metric: ClassVar[Metric | None] = "dot"

    def search_problem(self) -> SearchProblem:
        """Return the search for the greatest dot product."""
        return SearchProblem(codes=widen(self.embedding.weight), objective=Objective.DOT)
