"""The codes of the stages of any quantizer, and their nearest others: for codebooks that only torch computes."""

from __future__ import annotations

import torch

from vqserve_server.quantizers import Quantizer
from vqserve_server.search import prepare
from vqserve_tools.inspection.codes import Floats, Ints, StoredCodes


@torch.no_grad()
def stored_codes_of_class(quantizer: Quantizer) -> list[StoredCodes]:
    """Return the codes of each stage; none where codes are computed."""
    stages = []
    for codebook in quantizer.codebooks():
        rows, sizes = codebook.code_rows(), codebook.cluster_sizes()
        # By directions the length of a code has no effect.
        points = codebook.search_problem().codes if codebook.code_space == "directions" else rows
        stages.append(
            StoredCodes(
                rows=rows.numpy(),
                points=points.numpy(),
                metric=codebook.metric,
                cluster_sizes=None if sizes is None else sizes.numpy(),
                initial_bound=codebook.initial_bound(),
                is_stage=codebook is not quantizer,
            )
        )
    return stages


def nearest_by_torch(rows: Floats, codes: Floats) -> Ints:
    """Return the nearest code (n,) of each row."""
    winners: Ints = prepare(torch.from_numpy(codes)).search(torch.from_numpy(rows)).numpy()
    return winners
