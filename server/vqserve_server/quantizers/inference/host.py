"""A plain codebook that serves on the CPU without torch: the compiled search, and a table of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import LATENTS_BY_STORAGE
from vqserve.errors import InvalidOption
from vqserve.types import OutputName
from vqserve.validation import check_output
from vqserve_server.device import CPU, Device
from vqserve_server.quantizers.declared import PlainCodebook
from vqserve_server.quantizers.inference.served import Served, Sizes, is_no_worse, misplaced, probe_ids
from vqserve_server.search import CountingSearcher, RowSearcher, SearchCounts, prepare_arrays
from vqserve_server.search.native import NativeBatch
from vqserve_server.validation import first_non_finite

Rows = npt.NDArray[Any]


class HostTable:
    """Rows (n, width) float32 that never change.

    All rows are rounded to a narrower type when that type is first requested, and the result is cached: rounding the
    rows of each lookup would take several times as long as the lookup.
    """

    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        self.rows = rows
        self._by_storage: dict[np.dtype[Any] | None, Rows] = {}

    def __getstate__(self) -> Rows:
        return self.rows

    def __setstate__(self, rows: Rows) -> None:
        self.__init__(rows)  # type: ignore[misc]

    def take(self, indices: npt.NDArray[np.int64], storage: npt.DTypeLike | None = None) -> Rows:
        """Return the row of every index.

        Args:
            indices: (m,) in [0, n), checked by the caller.
            storage: of a type of latents (vqserve.dtypes); None: float32.

        Returns:
            (m, width), a copy: of that type where it is narrower and all of the table is within its range, each value
            rounded once to nearest even; else float32.
        """
        return self.rows_in(storage).take(indices, axis=0)

    def rows_in(self, storage: npt.DTypeLike | None = None) -> Rows:
        """Return all rows (n, width) in the type that `take` returns."""
        key = None if storage is None else np.dtype(storage)
        rows = self._by_storage.get(key)
        if rows is None:
            rows = self._by_storage[key] = self._rounded(key)
        return rows

    def _rounded(self, storage: np.dtype[Any] | None) -> Rows:
        if storage is None or storage.itemsize >= self.rows.itemsize:
            return self.rows
        with np.errstate(over="ignore", under="ignore"):
            narrowed = LATENTS_BY_STORAGE[storage].narrow(self.rows)
        return narrowed if first_non_finite(narrowed) is None else self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class HostLookup(Sizes, Served):
    """One plain codebook. It is made by `of`."""

    # What the searcher was made from, and holds as well: it cannot be pickled, so it is made anew.
    _codebook: PlainCodebook
    _searcher: RowSearcher[Rows]
    _table: HostTable

    @classmethod
    def of(cls, codebook: PlainCodebook) -> Self | None:
        """Return the form of a finite float32 codebook that is not to be changed; None: no compiled search takes it."""
        searcher = _prepared(codebook)
        if searcher is None:
            return None
        count, width = codebook.code_rows.shape
        return cls(
            num_codes=count,
            vocab_size=count,
            decodable=count,
            input_dim=codebook.codes.shape[1],
            code_dim=width,
            output_dim=width,
            _codebook=codebook,
            _searcher=searcher,
            _table=HostTable(codebook.code_rows),
        )

    @property
    def sizes(self) -> Sizes:
        """Its sizes."""
        return self

    @property
    def device(self) -> Device:
        """The CPU."""
        return CPU

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the codebook's elements, and of decoded rows."""
        return self._table.rows.dtype

    @property
    def search_backend(self) -> str:
        """The name of the search backend."""
        return self._searcher.backend

    @cached_property
    def native_batch(self) -> NativeBatch | None:
        """Reads and writes the arrays of requests."""
        found = self._searcher.compiled()
        return None if found is None else NativeBatch(found, found.lowest_index, self._rows_of)

    def _rows_of(self, output: str, dtype: np.dtype[Any]) -> Rows | None:
        rows = self._table.rows_in(dtype)
        return rows if rows.flags.c_contiguous else None

    def __getstate__(self) -> dict[str, Any]:
        # Both have addresses.
        return {name: value for name, value in vars(self).items() if name not in {"_searcher", "native_batch"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        searcher = _prepared(state["_codebook"])
        if searcher is None:
            raise InvalidOption("this installation has no compiled search, which the codebook was pickled with")
        vars(self).update(state, _searcher=searcher)

    def counting(self, counts: SearchCounts) -> Self:
        """Return a copy whose searches add to counters."""
        return replace(self, _searcher=CountingSearcher(self._searcher, counts))

    def encode_rows(
        self, rows: npt.NDArray[np.floating[Any]], *, num_quantizers: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the index (n,) of every row's code; see `Served.encode_rows`."""
        return self._searcher.search(rows)

    def decode_rows(
        self, indices: npt.NDArray[np.int64], *, output: OutputName = "latents", dtype: npt.DTypeLike | None = None
    ) -> Rows:
        """Return the row of every index (n,); see `Served.decode_rows`."""
        check_output(output)
        return self._table.take(indices, dtype)

    def check_itself(self) -> None:
        """Search for a sample of the codes: each must win for its own row, or the winner must be no worse.

        Raises:
            CodebookError: the search found a worse one.
        """
        codes, bias = self._codebook.codes, self._codebook.bias
        probes = probe_ids(len(codes))
        winners = self._searcher.search(codes[probes])
        is_right = (winners >= 0) & (winners < len(codes))
        if is_right.all():
            biases = None if bias is None else (bias[winners].astype(np.float64), bias[probes].astype(np.float64))
            found, asked = codes[winners].astype(np.float64), codes[probes].astype(np.float64)
            is_right = is_no_worse(found, asked, self._codebook.objective, biases)
        if not is_right.all():
            raise misplaced(int(probes[~is_right][0]), self.search_backend)


def _prepared(codebook: PlainCodebook) -> RowSearcher[Rows] | None:
    return prepare_arrays(codebook.codes, objective=codebook.objective, bias=codebook.bias)
