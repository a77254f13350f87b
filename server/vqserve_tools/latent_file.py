"""Latents of a .npy file as rows, in any layout; the file is memory-mapped and read on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidOption, InvalidShape, escape, of_file
from vqserve.layout import Layout, parse_layout, resolve_layout
from vqserve.validation import not_finite, not_latents
from vqserve_server.rows import channels_last
from vqserve_server.validation import first_non_finite

_CHUNK_BYTES = 1 << 26


class LatentRows:
    """Latents of 2 to 5 axes as rows: row i is the token at position i of the grid in C order.

    Attributes:
        array: latents in their original layout.
        layout: layout of the array.
        dim: number of channels, which is the width of a row.
        dtype: type of the rows, float32 or float64.
    """

    def __init__(
        self,
        array: npt.NDArray[Any],
        layout: str | None = None,
        *,
        default: Layout | None = None,
        keeps_float64: bool = False,
    ) -> None:
        """Store an array, memory-mapped or in memory.

        Args:
            array: float16, float32 or float64, 2 to 5 axes.
            layout: "channels_first", "channels_last" or None, the default.
            default: layout for 3 to 5 axes if `layout` is None; None: channels first for 4 and 5 axes, last for 3.
                In arrays of two axes the channels are always last.
            keeps_float64: whether rows of a float64 array stay float64; otherwise all rows are float32.

        Raises:
            InvalidDtype: the elements are no such floats.
            InvalidOption: there is no such layout.
            InvalidShape: wrong rank for latents or for the layout, or no channels.
        """
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise not_latents(array.dtype)
        self.layout = resolve_layout(array.ndim, parse_layout(layout), default)
        self.array = array
        self.dtype = np.dtype(np.float64 if keeps_float64 and array.dtype.itemsize == 8 else np.float32)
        self._rows_last = channels_last(array, self.layout)
        self.dim = self._rows_last.shape[-1]
        if self.dim == 0:
            raise InvalidShape(
                f"latents of shape {array.shape} have no channels in layout {self.layout}", array="latents"
            )

    @classmethod
    def open(
        cls, path: Path, layout: str | None = None, *, default: Layout | None = None, keeps_float64: bool = False
    ) -> LatentRows:
        """Memory-map a .npy file; pickled objects are rejected. See the constructor for the arguments.

        Raises:
            OSError: the file cannot be read.
            InvalidOption: it is no .npy file of numbers.
            InvalidArgument: as the constructor.
        """
        # Opening a pipe would wait for a writer.
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise InvalidOption(f"it is {what}: name a .npy file of latents", path=path)
        try:
            with path.open("rb") as file:
                if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                    raise InvalidOption("it is not a .npy file", path=path)
            array = np.lib.format.open_memmap(path, mode="r")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such file") from None
        except InvalidOption:
            raise
        except ValueError as error:
            raise InvalidOption(f"it is not a .npy file of numbers: {escape(str(error))}", path=path) from None
        with of_file(path):
            return cls(array, layout, default=default, keeps_float64=keeps_float64)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the latents without the channels."""
        return self._rows_last.shape[:-1]

    def __len__(self) -> int:
        return math.prod(self.grid)

    def take(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the rows at these positions, (n, dim) of `dtype` in C order."""
        places = np.unravel_index(positions, self.grid)
        return np.ascontiguousarray(self._rows_last[places], dtype=self.dtype)

    def chunks(self, rows_per_chunk: int) -> Iterator[npt.NDArray[Any]]:
        """Yield all rows in order, at most `rows_per_chunk` at a time."""
        for start in range(0, len(self), rows_per_chunk):
            yield self.take(np.arange(start, min(start + rows_per_chunk, len(self))))

    def check_finite(self) -> None:
        """Check in one pass that all numbers are finite, also when converted to the type of the rows.

        Raises:
            NonFiniteLatents: names the first one's position in the array: "latents[0, 3, 5, 7] is nan".
        """
        if self.array.size == 0:
            return
        bytes_per_item = self.array.size // self.array.shape[0] * self.dtype.itemsize
        step = max(1, _CHUNK_BYTES // bytes_per_item)
        for start in range(0, self.array.shape[0], step):
            chunk = self.array[start : start + step]
            with np.errstate(over="ignore"):
                position = first_non_finite(chunk.astype(self.dtype, copy=False))
            if position is not None:
                value = float(chunk[position])
                whole = [start + position[0], *position[1:]]
                raise not_finite(whole, value, as_float32=math.isfinite(value))
