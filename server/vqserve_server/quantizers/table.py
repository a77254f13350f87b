"""Rows that are looked up by index."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.dtypes import to_numpy, to_torch
from vqserve_server.quantizers.narrowing import narrow


class Table:
    """Rows (n, width) of one type on one device, which never change.

    Looked up in a narrower type they are rounded once for all, when that type is first asked for: rounding what was
    looked up takes several times as long as looking it up.

    Attributes:
        rows: the rows as they are.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._narrowed: dict[torch.dtype, Tensor | None] = {}

    def __getstate__(self) -> Tensor:
        return self.rows

    def __setstate__(self, rows: Tensor) -> None:
        self.rows, self._narrowed = rows, {}

    def take(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the row of every index.

        Args:
            indices: (m,) int64 on the rows' device, in [0, n), checked by the caller.
            dtype: a type of latents; None: the rows' own.

        Returns:
            (m, width), a copy: of `dtype` where that is narrower than the rows' and all of the table is within its
            range, each value rounded once to nearest even; else of the rows' own.
        """
        rows = self.rows if dtype is None else self._rounded(dtype)
        if rows.device.type != "cpu":
            return rows.index_select(0, indices)
        # On one core in the time that torch takes on two, whose threads then spin.
        taken: Tensor = to_torch(to_numpy(rows).take(indices.numpy(), axis=0), str(rows.dtype).removeprefix("torch."))
        return taken

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        if dtype.itemsize >= self.rows.dtype.itemsize:
            return self.rows
        if dtype not in self._narrowed:
            narrowed = narrow(self.rows, dtype)
            # The look waits for the device, so that other threads, on streams of their own, find what they read.
            self._narrowed[dtype] = narrowed if bool(torch.isfinite(narrowed).all()) else None
        rounded = self._narrowed[dtype]
        return self.rows if rounded is None else rounded
