"""The compiled search for callers that have tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.errors import InvalidArgument
from vqserve_server.search.native.searcher import NativeSearcher
from vqserve_server.search.searcher import RowSearcher, SearchCounts


class TensorSearcher(RowSearcher[Tensor]):
    """A compiled search of tensors on the CPU, whose memory it reads where it is."""

    backend = NativeSearcher.backend

    def __init__(self, arrays: NativeSearcher) -> None:
        """Store the searcher of arrays."""
        self.arrays = arrays

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `RowSearcher.search`."""
        if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
            raise InvalidArgument(
                f"rows must be float32 or float64 on the CPU, not {tuple(rows.shape)} {rows.dtype} on {rows.device}"
            )
        # numpy refuses a negation that torch has postponed.
        winners: Tensor = torch.from_numpy(self.arrays.search(rows.detach().resolve_neg().numpy(), counts))
        return winners
