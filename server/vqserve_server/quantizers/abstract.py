"""The base of all quantizers with one codebook: encode, decode, code rows, and the remap of reported indices."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from vqserve.errors import CodebookError, rows_placed
from vqserve.validation import check_indices_rank
from vqserve_server.quantizers.inference.lookup import CodeSearch, FrozenLookup, Table
from vqserve_server.quantizers.objective import SearchProblem
from vqserve_server.quantizers.projections import on_device
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.remap import Remap, RemappedModule, UnknownIndex
from vqserve_server.quantizers.tensors import (
    are_finite,
    are_the_same,
    autocast_off,
    check_finite,
    check_size,
    from_rows,
    grid_of,
    grid_of_entries,
    to_rows,
    widen,
)


class AbstractQuantizer(RemappedModule, Quantizer):
    """A codebook of K codes of width D, with an optional remap of the ids that it reports.

    Latents are (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), in float16, bfloat16, float32 or float64; their
    indices are (b, h, w), (b, t, h, w), (b, s) or (n,). `forward(z) -> (z_q, info)` is training's view of a quantizer,
    `encode` and `decode` are inference's.

    A module keeps nothing that it prepared from its weight, which may change at any time without notice: every call
    prepares its search anew. `freeze` gives the form that serves.

    Attributes:
        kind: the name of the class in files and on the wire.
        num_codes: K.
        input_dim: channels that forward and encode take.
        code_dim: D, the width of a code row.
        output_dim: channels that decode returns.
        layout: see `Quantizer`; None is the layout above.
        remap, used, re_embed, unknown_index: see `RemappedModule`.
        loss_key: the key of the loss in `info`.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        input_dim: int,
        code_dim: int,
        remap: Remap | None = None,
        unknown_index: UnknownIndex = "random",
        loss_key: str = "loss/vq",
    ) -> None:
        """Set up the remap.

        Args:
            num_codes: K.
            input_dim: channels that forward and encode take.
            code_dim: D, also the channels that decode returns.
            remap: path of a .npy file, or an integer array, of the full ids in use.
            unknown_index: "random", "extra" or an integer.
            loss_key: the key of the loss in `info`.

        Raises:
            InvalidOption: an argument has none of its values.
            InvalidShape: the remap is empty or not 1-D.
            InvalidDtype: the remap does not hold integers.
            IndexOutOfRange: the remap holds an id outside [0, num_codes).
            OSError: the remap's file cannot be read.
        """
        super().__init__(num_codes, remap, unknown_index)
        check_size("input_dim", input_dim)
        check_size("code_dim", code_dim)
        self.input_dim = int(input_dim)
        self.code_dim = self.output_dim = int(code_dim)
        self.loss_key = loss_key

    # What subclasses define.

    @abstractmethod
    def code_rows(self) -> Tensor:
        """Return the codebook (K, D) as it is now, detached, in the weight's type: the rows that decode gathers."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,), differentiable with respect to the codebook."""

    def search_problem(self) -> SearchProblem:
        """Return the search of encode: for the nearest code, unless a subclass has another objective."""
        return SearchProblem(codes=widen(self.code_rows()))

    def initial_bound(self) -> float | None:
        """Return b if the constructor initialises codes within [-b, b]; None: initial values have no bound."""
        return None

    def cluster_sizes(self) -> Tensor | None:
        """Return the moving average (K,) of tokens per batch and code; None: the kind has no average."""
        return None

    def codebooks(self) -> list[AbstractQuantizer]:
        """Return this one."""
        return [self]

    def without_remap(self) -> tuple[Quantizer, Tensor | None]:
        """Return a copy that reports full ids, and the ids of the remap; see `Quantizer.without_remap`."""
        if self.used is None:
            return self, None
        plain = copy.deepcopy(self)
        plain.drop_remap()
        return plain, self.used

    def output_rows(self, code_rows: Tensor) -> Tensor:
        """Return what decode gives for code rows (N, D): (N, output_dim), detached, in the weight's type."""
        return code_rows

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns."""
        return self.code_rows().dtype

    # Latents to indices and back.

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Return the index of every token's code, exact and the same on every device.

        Args:
            z: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), C = input_dim, floating point.

        Returns:
            int64 indices over the grid: (b, h, w), (b, t, h, w), (b, s) or (n,), remapped if there is a remap.

        Raises:
            InvalidShape: another rank or channel count.
            InvalidDtype: z is not floating point.
            NonFiniteLatents: z holds NaN or infinity; names the position.
            CodebookError: the codes or the projection contain NaN or infinity.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_finite(z)
        rows = widen(to_rows(z, self.layout))
        if rows.shape[0] == 0:
            return rows.new_empty(grid, dtype=torch.int64)
        with rows_placed(grid), autocast_off(z.device):
            return self._code_search(self.search_problem()).encode_rows(rows).reshape(grid)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the latents of indices, as far as the codes keep them.

        Args:
            indices: (b, h, w), (b, t, h, w), (b, s) or (n,), any integer type, in [0, decodable).

        Returns:
            (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), C = output_dim, contiguous, of the weight's type.

        Raises:
            InvalidShape: the indices have not 1 to 4 axes.
            InvalidDtype: they are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        check_indices_rank(indices.ndim)
        ids = self.unmap_to_all(indices).reshape(-1)
        with autocast_off(indices.device):
            codes = self.code_rows()
            # An output row is a function of its code alone: whichever is shorter is computed.
            rows = self.output_rows(codes[ids]) if ids.numel() < self.num_codes else self.output_rows(codes)[ids]
        return from_rows(rows, indices.shape, self.layout)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return raw code rows, never through an output projection, differentiable with respect to the codebook.

        Args:
            indices: any shape and integer type, in [0, decodable).
            shape: channel-last shape of 2 to 5 axes that the result is laid out from: (b, h, w, D) gives
                (b, D, h, w), (b, t, h, w, D) gives (b, D, t, h, w), (b, s, D) and (n, D) stay. None: indices' shape.

        Returns:
            (*indices.shape, D), or as `shape` says.

        Raises:
            InvalidShape: `shape` does not end in D, or holds another number of tokens than there are indices.
            InvalidDtype: the indices are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        grid = None if shape is None else grid_of_entries(shape, width=self.code_dim, count=indices.numel())
        ids = self.unmap_to_all(indices)
        with autocast_off(indices.device):
            rows = self.lookup(ids.reshape(-1))
        return rows.reshape(*indices.shape, self.code_dim) if grid is None else from_rows(rows, grid, self.layout)

    def frozen(self, device: torch.device, search: str = "auto") -> FrozenLookup:
        """Return the form that serves; see `Quantizer.frozen`."""
        code_rows = self.code_rows()
        if self.used is not None:
            code_rows = code_rows[self.unmap_to_all(torch.arange(self.decodable))]
        latents = self.output_rows(code_rows)
        if latents is not code_rows:
            finite = are_finite(latents)
            if not bool(finite.all()):
                first = int(torch.nonzero(~finite)[0])
                raise CodebookError(f"the output projection takes index {first} beyond float32's range")
        searched = self.search_problem()
        problem = searched.to(device)
        # Most kinds search the rows that they decode to: these are in memory once.
        served_rows = Table(problem.codes if are_the_same(searched.codes, code_rows) else code_rows.to(device))
        return FrozenLookup(
            **self.sizes(device),
            **vars(self._code_search(problem, search)),
            _problem=problem,
            _code_rows=served_rows,
            _latents=served_rows if latents is code_rows else Table(latents.to(device)),
        )

    def _code_search(self, problem: SearchProblem, search: str = "auto") -> CodeSearch:
        device, reported = problem.codes.device, None
        if problem.reports_full_ids and self.used is not None:
            reported = self.reported(torch.arange(self.num_codes, device=self.used.device)).to(device)
        return CodeSearch(
            _searcher=problem.prepare(search),
            _projection=on_device(self.input_projection(), device),
            _reported=reported,
        )

    def _straight_through(self, z: Tensor, z_q: Tensor, dtype: torch.dtype) -> Tensor:
        # The value of z_q with the gradient of z (van den Oord et al. 2017, section 3.2).
        return (z + (z_q - z).detach()).to(dtype)
