"""Rows that are looked up by index, rounded once to the type that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.dtypes import to_numpy, to_torch


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in `dtype`, each rounded once to nearest even; what leaves its range becomes an infinity.

    Args:
        values: float32 or float64, finite.
        dtype: a type of latents.
    """
    if values.dtype != torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    # torch goes from float64 to half precision by way of float32, and two roundings to nearest can end next to the
    # nearest. Rounding to odd on the way cannot: it keeps what was cut off in the last bit (Boldo and Melquiond,
    # "When double rounding is odd", 2005). float32 has the two bits to spare that this needs.
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    truncated = nearest.view(torch.int32) - (back.abs() > values.abs()).to(torch.int32)
    odd = truncated | (back != values).to(torch.int32)
    return odd.view(torch.float32).to(dtype)


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
