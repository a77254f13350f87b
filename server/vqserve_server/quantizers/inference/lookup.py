"""One codebook prepared for serving: a search and two tables of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.dtypes import to_numpy, to_torch
from vqserve.types import OutputName
from vqserve.validation import check_output
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.inference.served import misplaced, probe_ids
from vqserve_server.quantizers.objective import SearchProblem
from vqserve_server.quantizers.projections import Projection, project
from vqserve_server.quantizers.tensors import TORCH_DTYPES, are_finite, autocast_off, narrow
from vqserve_server.search import CountingSearcher, SearchCounts, Searcher
from vqserve_server.search.native import NativeBatch


class _Rows(NamedTuple):
    """Rows (n, width) of one type.

    Attributes:
        tensor: the rows.
        array: the same memory as numpy, where it is the host's: bit patterns of types that numpy lacks.
        name: of the type.
    """

    tensor: Tensor
    array: npt.NDArray[Any] | None
    name: str

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        array = to_numpy(tensor) if tensor.device.type == "cpu" else None
        return cls(tensor, array, str(tensor.dtype).removeprefix("torch."))


class Table:
    """Rows (n, width) of one type on one device, which never change.

    All rows are rounded to a narrower type when that type is first requested, and the result is cached: rounding the
    rows of each lookup would take several times as long as the lookup.

    Attributes:
        rows: the rows as they are.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._own = _Rows.of(rows)
        self._by_dtype: dict[torch.dtype | None, _Rows] = {}

    def __getstate__(self) -> Tensor:
        return self.rows

    def __setstate__(self, rows: Tensor) -> None:
        self.__init__(rows)  # type: ignore[misc]

    def take(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the row of every index.

        Args:
            indices: (m,) int64 on the rows' device, in [0, n), checked by the caller.
            dtype: a type of latents; None: the rows' own.

        Returns:
            (m, width), a copy: of `dtype` where that is narrower than the rows' and all of the table is within its
            range, each value rounded once to nearest even; else of the rows' own.
        """
        rows = self._rows_for(dtype)
        if rows.array is None:
            return rows.tensor.index_select(0, indices)
        # numpy takes on one core the time that torch takes on two, and torch's idle threads then keep a core busy.
        taken: Tensor = to_torch(rows.array.take(indices.numpy(), axis=0), rows.name)
        return taken

    def array(self, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        """Return all rows for a type's `storage` (vqserve.dtypes), as `take` does: C order; None: not on the host."""
        array = self._rows_for(TORCH_DTYPES[dtype]).array
        return None if array is None or not array.flags.c_contiguous else array

    def _rows_for(self, dtype: torch.dtype | None) -> _Rows:
        return self._by_dtype.get(dtype) or self._rounded(dtype)

    def _rounded(self, dtype: torch.dtype | None) -> _Rows:
        """Return, and keep, the rows for a type."""
        rows = self._own
        if dtype is not None and dtype.itemsize < self.rows.dtype.itemsize:
            narrowed = narrow(self.rows, dtype)
            # bool() waits for the device: other threads have other streams, and must not read an unfinished table.
            if bool(are_finite(narrowed).all()):
                rows = _Rows.of(narrowed)
        self._by_dtype[dtype] = rows
        return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeSearch:
    """The half of a codebook that encodes rows."""

    _searcher: Searcher
    # Of the rows, before the search.
    _projection: Projection | None
    # (K,) the index that is returned for a full id; None: the id itself.
    _reported: Tensor | None

    @torch.no_grad()
    def encode_rows(self, rows: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        """Return the index (n,) of every row's code; see `FrozenQuantizer.encode_rows`."""
        with autocast_off(rows.device):
            if self._projection is not None:
                rows = project(rows, self._projection)
            winners = self._searcher.search(rows)
        return winners if self._reported is None else self._reported[winners]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenLookup(CodeSearch, FrozenQuantizer):
    """One codebook: its search, and a table of the row for each index."""

    # What the searcher was made from, and holds as well: it cannot be pickled, so it is made anew.
    _problem: SearchProblem
    # (decodable, D) and (decodable, output_dim); one table where there is no output projection.
    _code_rows: Table
    _latents: Table

    @property
    def search_backend(self) -> str:
        """The name of the search backend."""
        return self._searcher.backend

    @cached_property
    def native_batch(self) -> NativeBatch | None:
        """Reads and writes the arrays of requests; None: this codebook needs more than one search and one lookup."""
        found = self._searcher.compiled()
        if found is None or self._projection is not None:
            return None
        names = found.lowest_index
        if self._reported is not None:
            reported = self._reported.numpy()
            names = reported if names is None else reported[names]
            # A sentinel below zero is for replies only that have a sign.
            if (names < 0).any():
                return None
        return NativeBatch(found, names, self._rows_of)

    def _rows_of(self, output: str, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        table = self._latents if output == "latents" else self._code_rows
        return table.array(dtype)

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_searcher": self.search_backend}
        # It has addresses.
        state.pop("native_batch", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _searcher=state["_problem"].prepare(state["_searcher"]))

    def counting(self, counts: Sequence[SearchCounts]) -> FrozenLookup:
        """Return a copy whose search adds to the only counter; see `FrozenQuantizer.counting`."""
        return replace(self, _searcher=CountingSearcher(self._searcher, counts[0]))

    def decode_rows(
        self, indices: Tensor, *, output: OutputName = "latents", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the row of every index (n,); see `FrozenQuantizer.decode_rows`."""
        check_output(output)
        return (self._latents if output == "latents" else self._code_rows).take(indices, dtype)

    @torch.no_grad()
    def check_itself(self) -> None:
        """Search for a sample of the codes: each must win for its own row, or the winner must be no worse.

        Raises:
            CodebookError: the search found a worse one.
        """
        problem = self._problem
        probes = torch.from_numpy(probe_ids(problem.codes.shape[0])).to(self.device)
        with autocast_off(self.device):
            winners = self._searcher.search(problem.codes[probes])
            is_right = (winners >= 0) & (winners < problem.codes.shape[0])
            if bool(is_right.all()):
                is_right = problem.is_no_worse(winners, probes)
        if not bool(is_right.all()):
            raise misplaced(int(probes[~is_right][0]), self.search_backend)

    def largest_latents(self) -> Tensor:
        """Return the greatest magnitude (output_dim,) float64 of each channel of the decoded rows."""
        return self._latents.rows.abs().amax(dim=0).double()
