"""One codebook, loaded and frozen: latents to indices and back, in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.codebook_info import CodebookInfo
from vqserve.layout import Layout, channel_axis, grid_shape
from vqserve_server.codebooks import codebook_digest, load_codebook
from vqserve_server.codebooks.conversion import kind_of
from vqserve_server.codebooks.device import select_device
from vqserve_server.codebooks.narrowing import narrow
from vqserve_server.errors import CodebookError, InvalidDtype, InvalidOption, NonFiniteLatents
from vqserve_server.quantizers import AbstractQuantizer
from vqserve_server.quantizers.frozen import freeze
from vqserve_server.validation import check_finite, check_indices, check_indices_shape, check_latents

Output = Literal["latents", "code_rows"]
ArrayOrTensor = TypeVar("ArrayOrTensor", npt.NDArray[Any], Tensor)

DECODE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_LATENT_DTYPES = frozenset(DECODE_DTYPES.values())
_OUTPUTS = ("latents", "code_rows")
_ELEMENTS_PER_CHUNK = 1 << 22


class Tokenizer:
    """A codebook ready to serve.

    Later changes of the quantizer that it was made from have no effect. Safe for use by many threads.

    Attributes:
        info: what a client may know about the codebook.
        device: where the codebook is and the search runs.
        search: name of the search backend.
    """

    def __init__(
        self,
        quantizer: AbstractQuantizer,
        *,
        name: str = "codebook",
        device: str | torch.device = "auto",
        search: str = "auto",
    ) -> None:
        """Freeze a quantizer.

        Args:
            quantizer: one of the four classes, float32 or float64.
            name: what `info` calls it.
            device: "auto" (a CUDA device that works, else the CPU), "cpu", "cuda" or "cuda:i".
            search: a search backend of that device, or "auto".

        Raises:
            CodebookError: the quantizer cannot be served: half precision, NaN in a weight, a subclass, or codes that
                the output projection takes beyond float32's range.
            InvalidOption: there is no such device or search backend here.
        """
        self.device = select_device(device)
        digest = codebook_digest(quantizer)
        self._frozen = freeze(quantizer, device=self.device, search=search)
        self.search = self._frozen.search_backend
        self.info = CodebookInfo(
            name=name,
            digest=digest,
            kind=kind_of(quantizer),
            num_codes=self._frozen.num_codes,
            vocab_size=self._frozen.vocab_size,
            input_dim=self._frozen.input_dim,
            code_dim=self._frozen.code_dim,
            output_dim=self._frozen.output_dim,
        )
        self._check_table()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "auto", search: str = "auto") -> Tokenizer:
        """Load a codebook file; its stem becomes the name.

        Args:
            path: the file.
            device: as in the constructor.
            search: as in the constructor.

        Raises:
            CodebookFileError: the file is damaged, inconsistent or of an unknown version.
            InvalidOption: there is no such device or search backend here.
        """
        return cls(load_codebook(path).quantizer, name=Path(path).stem, device=device, search=search)

    @property
    def name(self) -> str:
        """The codebook's name."""
        return self.info.name

    @property
    def digest(self) -> str:
        """Lower-case hexadecimal SHA-256 of what encode and decode read."""
        return self.info.digest

    @property
    def decodable(self) -> int:
        """The exclusive bound of the indices that decode accepts: a sentinel for unknown codes can lie beyond it."""
        return self._frozen.decodable

    @property
    def weight_dtype(self) -> torch.dtype:
        """Element type of the codebook, and of `decode_rows`."""
        return self._frozen.weight_dtype

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Tokenizer({info.name!r}, kind={info.kind!r}, num_codes={info.num_codes}, code_dim={info.code_dim}, "
            f"digest={info.digest[:12]!r}, device={str(self.device)!r}, search={self.search!r})"
        )

    def encode(self, latents: ArrayOrTensor, *, layout: str | None = None) -> ArrayOrTensor:
        """Return the index of the code that each latent is nearest to (Gumbel: that scores highest), exactly.

        Args:
            latents: numpy float16, float32 or float64, or torch with bfloat16 too, of 2 to 5 axes with
                `info.input_dim` channels.
            layout: "channels_first" or "channels_last"; None: channels first for 4 and 5 axes, last for 2 and 3.

        Returns:
            The same kind of array, shaped as the latents without their channel axis: numpy of the smallest unsigned
            type that holds the vocabulary, torch of int64 on the latents' device.

        Raises:
            InvalidDtype: the latents are no array of such a type.
            InvalidOption: there is no such layout.
            InvalidShape: the rank or the channel count is not the codebook's.
            NonFiniteLatents: names the position of a NaN or an infinity, or of a token whose projection overflows.
        """
        if isinstance(latents, Tensor):
            return self._encode_tensor(latents, layout)
        if not isinstance(latents, np.ndarray) or isinstance(latents, np.ma.MaskedArray):
            raise InvalidDtype(f"latents must be a numpy array or a torch tensor, not {type(latents).__name__}")
        if latents.dtype.kind != "f" or latents.dtype.itemsize > 8:
            raise InvalidDtype(f"latents must be float16, float32 or float64, not {latents.dtype}")
        resolved = check_latents(latents, layout, info=self.info)
        latents = latents.astype(latents.dtype.newbyteorder("="), copy=False)
        check_finite(latents)
        rows = np.moveaxis(latents, channel_axis(resolved), -1).reshape(-1, self.info.input_dim)
        wide = _tensor(np.ascontiguousarray(rows, np.result_type(rows, np.float32)))
        indices = self._encode_grid(wide.to(self.device), grid_shape(latents.shape, resolved))
        return indices.cpu().numpy().astype(_index_dtype(self.info.vocab_size))

    def decode(
        self, indices: ArrayOrTensor, *, layout: str | None = None, dtype: str = "float32", output: Output = "latents"
    ) -> ArrayOrTensor:
        """Return what indices stand for.

        Args:
            indices: any integers of 1 to 4 axes, in [0, decodable).
            layout: of the result, as in `encode`.
            dtype: of the result: "float32", "float16", "float64", or with torch "bfloat16"; rounded once from the
                codebook's own values.
            output: "latents", which the decoder takes, or "code_rows", the codebook's rows before any projection.

        Returns:
            The same kind of array on the indices' device: their grid with `info.output_dim` channels, for code rows
            `info.code_dim`.

        Raises:
            IndexOutOfRange: names the position, the value and the range.
            InvalidDtype: the indices are no array of integers.
            InvalidOption: there is no such layout, dtype or output, or a value leaves the dtype's range.
            InvalidShape: the rank is not 1 to 4.
        """
        if dtype not in DECODE_DTYPES:
            raise InvalidOption(f"dtype must be one of {', '.join(DECODE_DTYPES)}, not {dtype!r}")
        if output not in _OUTPUTS:
            raise InvalidOption(f"output must be one of {', '.join(_OUTPUTS)}, not {output!r}")
        if isinstance(indices, Tensor):
            if indices.is_complex() or indices.is_floating_point() or indices.dtype == torch.bool:
                raise InvalidDtype(f"indices must be integers, not {indices.dtype}")
            resolved = check_indices_shape(indices, layout, info=self.info)
            ids = self._checked_ids(indices)
            return self._decode_ids(ids, indices.shape, resolved, DECODE_DTYPES[dtype], output).to(indices.device)
        if not isinstance(indices, np.ndarray) or isinstance(indices, np.ma.MaskedArray):
            raise InvalidDtype(f"indices must be a numpy array or a torch tensor, not {type(indices).__name__}")
        if dtype == "bfloat16":
            raise InvalidOption("numpy has no bfloat16: pass torch indices, or take float32")
        resolved = check_indices_shape(indices, layout, info=self.info)
        check_indices(indices, decodable=self.decodable)
        flat = torch.from_numpy(indices.reshape(-1).astype(np.int64))
        result = self._decode_ids(flat, indices.shape, resolved, DECODE_DTYPES[dtype], output)
        return result.cpu().numpy()

    def encode_rows(self, rows: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
        """Return the indices of rows that were checked before.

        Args:
            rows: (n, input_dim) float32 or float64, finite, in C order.

        Returns:
            (n,) int64.
        """
        return self._frozen.encode_rows(_tensor(rows).to(self.device)).cpu().numpy()

    def decode_rows(self, indices: npt.NDArray[np.int64], *, output: Output = "latents") -> npt.NDArray[Any]:
        """Return the rows of indices that were checked before.

        Args:
            indices: (n,) int64 in [0, decodable).
            output: "latents" or "code_rows".

        Returns:
            (n, output_dim) or (n, code_dim) of the codebook's own element type.
        """
        return self._frozen.decode_rows(_tensor(indices).to(self.device), output=output).cpu().numpy()

    def _check_table(self) -> None:
        if self.info.kind != "vq_projection":
            return
        # Weights are finite; what the output projection makes of a code need not be.
        step = max(1, _ELEMENTS_PER_CHUNK // self.info.output_dim)
        for start in range(0, self.decodable, step):
            ids = torch.arange(start, min(start + step, self.decodable), device=self.device)
            finite = torch.isfinite(self._frozen.decode_rows(ids, output="latents")).all(dim=1)
            if not bool(finite.all()):
                first = start + int(torch.nonzero(~finite)[0, 0])
                raise CodebookError(f"the output projection takes index {first} beyond float32's range")

    def _encode_tensor(self, latents: Tensor, layout: str | None) -> Tensor:
        if latents.dtype not in _LATENT_DTYPES:
            raise InvalidDtype(f"latents must be float16, bfloat16, float32 or float64, not {latents.dtype}")
        if latents.layout != torch.strided or latents.device.type == "meta":
            raise InvalidDtype("latents must be a dense tensor with values")
        resolved = check_latents(latents, layout, info=self.info)
        latents = latents.detach()
        finite = torch.isfinite(latents)
        if not bool(finite.all()):
            position = torch.nonzero(~finite)[0].tolist()
            raise NonFiniteLatents(f"latents{position} is {float(latents[tuple(position)])}")
        rows = latents.movedim(channel_axis(resolved), -1).reshape(-1, self.info.input_dim)
        wide = rows.to(self.device, torch.promote_types(rows.dtype, torch.float32)).contiguous()
        return self._encode_grid(wide, grid_shape(latents.shape, resolved)).to(latents.device)

    def _encode_grid(self, rows: Tensor, grid: tuple[int, ...]) -> Tensor:
        try:
            return self._frozen.encode_rows(rows).reshape(grid)
        except NonFiniteLatents:
            # A projection overflowed. The frozen quantizer knows rows: the caller knows the grid.
            position = [int(i) for i in np.unravel_index(self._first_overflow(rows), grid)]
            raise NonFiniteLatents(f"the projection of token {position} leaves the range of float32") from None

    def _first_overflow(self, rows: Tensor) -> int:
        start, stop = 0, rows.shape[0]
        while stop - start > 1:
            middle = (start + stop) // 2
            try:
                self._frozen.encode_rows(rows[start:middle])
                start = middle
            except NonFiniteLatents:
                stop = middle
        return start

    def _checked_ids(self, indices: Tensor) -> Tensor:
        # An unsigned 64-bit index beyond the signed range wraps to a negative one here: out of range all the same,
        # and named by its own value below.
        ids = indices.detach().reshape(-1).to(torch.int64)
        if ids.numel():
            low, high = torch.aminmax(ids)
            if low < 0 or high >= self.decodable:
                check_indices(indices.detach().cpu().numpy(), decodable=self.decodable)
        return ids

    def _decode_ids(
        self, ids: Tensor, grid: tuple[int, ...], layout: Layout, dtype: torch.dtype, output: Output
    ) -> Tensor:
        rows = self._frozen.decode_rows(ids.to(self.device), output=output)
        narrowed = narrow(rows, dtype)
        if narrowed.dtype.itemsize < rows.dtype.itemsize:
            overflowed = ~torch.isfinite(narrowed).all(dim=1)
            if bool(overflowed.any()):
                first = int(torch.nonzero(overflowed)[0, 0])
                position = [int(i) for i in np.unravel_index(first, grid)]
                raise InvalidOption(
                    f"indices{position} decodes to a value beyond the range of {str(dtype).removeprefix('torch.')}: "
                    "take a wider dtype"
                )
        latents = narrowed.reshape(*grid, rows.shape[1])
        return latents.movedim(-1, channel_axis(layout)).contiguous()


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    # torch cannot share read-only memory without a warning; a copy costs next to nothing beside the search.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _index_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32
