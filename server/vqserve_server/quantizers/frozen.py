"""A quantizer prepared for serving: it never changes, so that everything is prepared once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vqserve_server.errors import InvalidOption
from vqserve_server.quantizers.abstract import AbstractQuantizer, project
from vqserve_server.quantizers.dtypes import autocast_off
from vqserve_server.quantizers.search_problem import SearchProblem
from vqserve_server.search import Searcher

Output = Literal["latents", "code_rows"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenQuantizer:
    """A searcher and tables on one device, made by `freeze`; safe for use by many threads, and pickles.

    Attributes:
        num_codes: K.
        vocab_size: encode reports indices in [0, vocab_size) (an integer sentinel below zero aside).
        decodable: decode takes indices in [0, decodable).
        input_dim: C, the width of the rows that encode takes.
        code_dim: D, the width of a code row.
        output_dim: the width of a decoded row.
        weight_dtype: the type of decoded rows.
        device: where rows, indices and tables are.
    """

    num_codes: int
    vocab_size: int
    decodable: int
    input_dim: int
    code_dim: int
    output_dim: int
    weight_dtype: torch.dtype
    device: torch.device
    _searcher: Searcher
    # What the searcher was made from, and holds as well: it cannot be pickled, so it is made anew.
    _problem: SearchProblem
    _projection: tuple[Tensor, Tensor] | None
    # (K,) what is reported for a full id; None: the winner's index itself.
    _reported: Tensor | None
    # (decodable, D) and (decodable, output_dim); one tensor where there is no output projection.
    _code_rows: Tensor
    _latents: Tensor

    @property
    def search_backend(self) -> str:
        """The name of the search backend."""
        return self._searcher.backend

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_searcher": self.search_backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _searcher=state["_problem"].prepare(state["_searcher"]))

    @torch.no_grad()
    def encode_rows(self, rows: Tensor) -> Tensor:
        """Return the index of every row's code, the same as the quantizer's `encode`.

        Args:
            rows: (n, C) float32 or float64 on the device, finite.

        Returns:
            (n,) int64 on the device.

        Raises:
            NonFiniteLatents: a row's projection leaves float32's range; names the row.
        """
        with autocast_off(self.device):
            if self._projection is not None:
                rows = project(rows, *self._projection, grid=rows.shape[:1])
            winners = self._searcher.search(rows)
        return winners if self._reported is None else self._reported[winners]

    @torch.no_grad()
    def decode_rows(self, indices: Tensor, *, output: Output = "latents") -> Tensor:
        """Return a row for every index, the same as the quantizer's `decode` and `get_codebook_entry`.

        Args:
            indices: (n,) int64 on the device, in [0, decodable): checked by the caller.
            output: "latents" or "code_rows".

        Returns:
            (n, output_dim) latents or (n, D) code rows on the device, of the weight's type.

        Raises:
            InvalidOption: for any other output.
        """
        if output not in ("latents", "code_rows"):
            raise InvalidOption(f"output must be 'latents' or 'code_rows', not {output!r}")
        table = self._latents if output == "latents" else self._code_rows
        if table.device.type == "cpu":
            # On one core in the time that torch takes on two, whose threads then spin.
            return torch.from_numpy(table.numpy().take(indices.numpy(), axis=0))
        return table.index_select(0, indices)


@torch.no_grad()
def freeze(quantizer: AbstractQuantizer, *, device: torch.device | str, search: str = "auto") -> FrozenQuantizer:
    """Prepare a quantizer as it is now; later changes of it are not seen.

    Args:
        quantizer: any quantizer, on any device.
        device: where to serve it.
        search: the search backend, one of `vqserve_server.search.available(device)`, or "auto".

    Raises:
        InvalidOption: the backend does not run on the device.
        CodebookError: what is searched holds NaN or infinity.
    """
    device = torch.device(device)
    # What depends on the codebook alone is computed on the CPU, whatever the device.
    source_device = torch.device("cpu")
    source = copy.deepcopy(quantizer).to(source_device)
    with autocast_off(source_device), autocast_off(device):
        full_ids = source.unmap_to_all(torch.arange(source.decodable))
        code_rows = source.code_rows()[full_ids]
        latents = source.output_rows(code_rows)
        problem = source.search_problem().to(device)
        reported = None
        if problem.reports_full_ids and source.used is not None:
            reported = source.reported(torch.arange(source.num_codes)).to(device)
        projection = source.input_projection()
        served_rows = code_rows.to(device)
        return FrozenQuantizer(
            num_codes=source.num_codes,
            vocab_size=source.vocab_size,
            decodable=source.decodable,
            input_dim=source.input_dim,
            code_dim=source.code_dim,
            output_dim=source.output_dim,
            weight_dtype=source.weight_dtype,
            device=device,
            _searcher=problem.prepare(search),
            _problem=problem,
            _projection=None if projection is None else (projection[0].to(device), projection[1].to(device)),
            _reported=reported,
            _code_rows=served_rows,
            _latents=served_rows if latents is code_rows else latents.to(device),
        )
