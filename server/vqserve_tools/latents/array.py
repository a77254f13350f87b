"""Latents of one array as rows, in any layout; a large .npy file is read on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidOption, InvalidShape, escape, of_file, rows_placed
from vqserve.layout import Layout, channel_axis, parse_layout, resolve_layout
from vqserve.npy import NpyFile
from vqserve.validation import check_channels, not_finite, not_latents
from vqserve_server.rows import channels_last
from vqserve_server.validation import first_non_finite
from vqserve_tools.latents.rows import Description, Ints

_CHUNK_BYTES = 1 << 26
# Larger files are read on demand.
_IN_MEMORY_BYTES = 1 << 30
# Small neighbours of a file are read together, up to this size.
_READ_BYTES = 1 << 22


class ArrayRows:
    """Latents of 2 to 5 axes as rows: row i is the token at position i of the grid in C order.

    Attributes:
        array: latents in their original layout, in memory or in a file.
        layout: layout of the array.
        dim: number of channels, which is the width of a row.
        dtype: type of the rows, float32 or float64.
    """

    def __init__(
        self,
        array: npt.NDArray[Any] | NpyFile,
        layout: str | None = None,
        *,
        default: Layout | None = None,
        keeps_float64: bool = False,
    ) -> None:
        """Store an array or a file.

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
        self._channel_axis = channel_axis(self.layout) % array.ndim
        self.dim = array.shape[self._channel_axis]
        if self.dim == 0:
            raise InvalidShape(
                f"latents of shape {array.shape} have no channels in layout {self.layout}", array="latents"
            )

    @classmethod
    def open(
        cls, path: Path, layout: str | None = None, *, default: Layout | None = None, keeps_float64: bool = False
    ) -> ArrayRows:
        """Open a .npy file; pickled objects are rejected. See the constructor for the arguments.

        A file of up to 1 GiB is read into memory, because training reads it many times in random order.

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
            with path.open("rb") as begin:
                if begin.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                    raise InvalidOption("it is not a .npy file", path=path)
            file = NpyFile(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such file") from None
        except InvalidOption:
            raise
        except ValueError as error:
            raise InvalidOption(f"it is not a .npy file of numbers: {escape(str(error))}", path=path) from None
        with of_file(path):
            rows = cls(file, layout, default=default, keeps_float64=keeps_float64)
        if file.nbytes <= _IN_MEMORY_BYTES:
            rows.array = file[()]
        return rows

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the latents without the channels."""
        return self.array.shape[: self._channel_axis] + self.array.shape[self._channel_axis + 1 :]

    def __len__(self) -> int:
        return math.prod(self.grid)

    def take(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the rows at these positions, (n, dim) of `dtype` in C order.

        Raises:
            OSError: the file cannot be read any more, for example because it was truncated.
        """
        places = np.unravel_index(positions, self.grid)
        if isinstance(self.array, NpyFile):
            return self._read(self.array, places)
        return np.ascontiguousarray(channels_last(self.array, self.layout)[places], dtype=self.dtype)

    def _read(self, file: NpyFile, places: tuple[npt.NDArray[np.intp], ...]) -> npt.NDArray[Any]:
        """Return the rows at places of the grid, from a file."""
        first, *others = places
        if not others:
            return file.items(first).astype(self.dtype, copy=False)
        rows = np.empty((first.size, self.dim), self.dtype)
        order = np.argsort(first, kind="stable")
        most = _READ_BYTES * len(file) // max(1, file.nbytes)
        # The axis of the array that is the second one of the grid.
        axis = 2 if self._channel_axis == 1 else 1
        for own in np.split(order, _ends_of_reads(first[order], most=most)):
            if own.size:
                # The box around the places, with all channels.
                items, seconds = first[own], others[0][own]
                low, start = int(items[0]), int(seconds.min())
                cut = [slice(low, int(items[-1]) + 1), *[slice(None)] * (file.ndim - 1)]
                cut[axis] = slice(start, int(seconds.max()) + 1)
                within = (items - low, seconds - start, *(place[own] for place in others[1:]))
                rows[own] = channels_last(file[tuple(cut)], self.layout)[within]
        return rows

    def chunks(self, rows_per_chunk: int) -> Iterator[npt.NDArray[Any]]:
        """Yield all rows in order, at most `rows_per_chunk` at a time."""
        for start in range(0, len(self), rows_per_chunk):
            yield self.take(np.arange(start, min(start + rows_per_chunk, len(self))))

    def check_channels(self, channels: int) -> None:
        """Check the number of channels.

        Raises:
            InvalidShape: it is another.
        """
        check_channels(self.array.shape, self.layout, channels)

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
            check_finite_as(self.array[start : start + step], self.dtype, (start, *[0] * (self.array.ndim - 1)))

    def placed(self, start: int) -> AbstractContextManager[None]:
        """Return a context that converts errors about rows, counted from `start`, to errors about tokens."""
        return rows_placed(self.grid, start)

    def describe(self) -> Description:
        """Return what the latents are."""
        return Description(
            shape=self.array.shape, dtype=self.array.dtype.name, layout=str(self.layout), tokens=len(self)
        )

    def groupings(self) -> Iterator[tuple[str, Ints]]:
        """Group the rows by the entries of the batch axis: by pictures, recordings or sequences."""
        if len(self.grid) > 1 and len(self):
            yield "entries of the batch axis", np.arange(len(self)) // math.prod(self.grid[1:])


def check_finite_as(part: npt.NDArray[Any], dtype: np.dtype[Any], offset: Sequence[int]) -> None:
    """Check that all numbers of a part of an array are finite, also when converted to a type.

    Args:
        part: float16, float32 or float64.
        dtype: float32 or float64.
        offset: position of the part in its array.

    Raises:
        NonFiniteLatents: names the first other one's position in the array.
    """
    with np.errstate(over="ignore"):
        position = first_non_finite(part.astype(dtype, copy=False))
    if position is not None:
        value = float(part[position])
        whole = [at + by for at, by in zip(position, offset, strict=True)]
        raise not_finite(whole, value, as_float32=math.isfinite(value))


def _ends_of_reads(items: npt.NDArray[np.intp], *, most: int) -> list[int]:
    """Return where ascending positions of items are divided, so that each part is at most `most` neighbours, or one."""
    ends, start = [], 0
    jumps = np.flatnonzero(np.diff(items)) + 1
    for jump in jumps.tolist():
        if items[jump] != items[jump - 1] + 1 or items[jump] - items[start] >= most:
            ends.append(jump)
            start = jump
    return ends
