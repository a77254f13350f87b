"""A codebook as scan.c wants it: reordered, scaled, in panels, with its error bounds."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.search.bounds import gamma
from vqserve_server.search.native.library import CodebookStruct, Library
from vqserve_server.search.searcher import Objective

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Widths up to which blocks of neighbouring codes are skipped by their boxes. In higher dimensions nearly every box is
# in reach of every row.
MAX_BOXED_DIM = 8
# scan.c has room for this many blocks' boxes.
_MAX_BOXES = 4096
_BOXED_CODES = 128
# Components in a block of panels without boxes: a block is where the running minima are updated, which takes as long
# as some 10 components of a panel.
_UNBOXED_COMPONENTS = 64
_ALIGNMENT = 64
# Norms and bounds are float64 sums of fewer than 2^20 terms; this is far more than they can be off.
_SLACK = 1.0 + 2.0**-20
# DOT is not scaled: codes up to this size leave room for rows.
_LARGEST_UNSCALED = 2.0**40
# Float32 holds sums up to this, errors included, with room to spare.
_LARGEST_SUM = 2.0**125


def fits(codes: Tensor, bias: Tensor | None, objective: Objective) -> bool:
    """Return whether scan.c can search a codebook: float32, and for DOT of ordinary magnitudes."""
    if codes.dtype != torch.float32 or codes.shape[1] > 1024 or codes.device.type != "cpu":
        return False
    if bias is not None and (bias.dtype != torch.float32 or float(bias.abs().max()) > _LARGEST_UNSCALED**2):
        return False
    return objective is Objective.L2 or float(codes.abs().max()) <= _LARGEST_UNSCALED


class NativeCodebook:
    """Holds the arrays that `struct` points to."""

    def __init__(self, codes: Tensor, bias: Tensor | None, objective: Objective, library: Library) -> None:
        """Take codes (K, D) and, for DOT, bias (K,), that fit."""
        array = codes.detach().numpy()
        num_codes, dim = array.shape
        width = library.panel_width
        boxed = objective is Objective.L2 and dim <= MAX_BOXED_DIM and num_codes >= 2 * _BOXED_CODES
        if boxed:
            least = max(_BOXED_CODES, -(-num_codes // (_MAX_BOXES // 2)))
            block = -(-least // width)
        else:
            block = max(1, _UNBOXED_COMPONENTS // (dim + 1))
        order = _neighbours_together(array, block * width) if boxed else _by_norm(array)

        largest = float(np.abs(array).max())
        scale = 2.0 ** -math.floor(math.log2(largest)) if objective is Objective.L2 and largest > 0 else 1.0
        # Codes of float32's smallest numbers stay subnormal: they are searched with wide bounds.
        self._scale = np.float32(min(max(scale, 2.0**-126), 2.0**126))
        scaled = array[order] * self._scale
        wide = scaled.astype(np.float64)
        self._steps = -(-num_codes // width)
        self._blocks = -(-self._steps // block)
        self._slots_per_block = block * width

        offset = 0.5 * np.square(wide).sum(axis=1) if objective is Objective.L2 else _negative(bias, order)
        norms = np.sqrt(np.square(wide).sum(axis=1)) * _SLACK
        self.panels = self._panels(scaled, offset, width)
        # Each component is rounded, multiplied and added; the offset, the bound itself and its use round a few times.
        relative = gamma(2 * dim + 24, torch.float32) * _SLACK
        # Room for products, rows and codes that underflow, flushed to zero or not.
        tiny = (2 * dim + 24) * 2.0**-124
        longest, largest_offset = self._block_max(norms), self._block_max(np.abs(offset))
        self.error_slope = _above(relative * longest + tiny)
        self.error_base = _above(relative * largest_offset + tiny * (1 + longest))
        # No partial sum exceeds |z||a| + |offset|, in whatever order it is summed.
        longest_row = (_LARGEST_SUM - float(largest_offset.max())) / max(float(longest.max()), 2.0**-100)
        self.boxes = self._boxes(scaled) if boxed else None

        self.codes = np.ascontiguousarray(array[order])
        stored = self.codes.astype(np.float64)
        self.offset = 0.5 * np.square(stored).sum(axis=1) if objective is Objective.L2 else offset
        self.bias = None if objective is Objective.L2 else np.ascontiguousarray(-offset, dtype=np.float32)
        relative = gamma(2 * dim + 24, torch.float64) * _SLACK
        self.wide_slope = relative * np.sqrt(np.square(stored).sum(axis=1)) * _SLACK + 2.0**-1000
        self.wide_base = relative * np.abs(self.offset) + dim * 2.0**-1000
        self.id = order.astype(np.int64)
        self.struct = CodebookStruct(
            num_codes=num_codes,
            dim=dim,
            steps=self._steps,
            block=block,
            panels=self.panels.ctypes.data,
            error_slope=self.error_slope.ctypes.data,
            error_base=self.error_base.ctypes.data,
            boxes=None if self.boxes is None else self.boxes.ctypes.data,
            scale=float(self._scale),
            longest_row=min(longest_row, _LARGEST_SUM),
            codes=self.codes.ctypes.data,
            offset=self.offset.ctypes.data,
            bias=None if self.bias is None else self.bias.ctypes.data,
            wide_slope=self.wide_slope.ctypes.data,
            wide_base=self.wide_base.ctypes.data,
            id=self.id.ctypes.data,
        )

    def _panels(self, scaled: Float32s, offset: Float64s, width: int) -> Float32s:
        """Return (steps, D + 1, width): offsets, then components; what is padded never wins."""
        num_codes, dim = scaled.shape
        slots = np.zeros((self._steps * width, dim + 1), np.float32)
        slots[:, 0] = np.inf
        with np.errstate(over="ignore"):
            slots[:num_codes, 0] = offset
        slots[:num_codes, 1:] = scaled
        return _aligned(slots.reshape(self._steps, width, dim + 1).transpose(0, 2, 1))

    def _block_max(self, values: Float64s) -> Float64s:
        slots = np.zeros(self._blocks * self._slots_per_block)
        slots[: values.size] = values
        greatest: Float64s = slots.reshape(self._blocks, -1).max(axis=1)
        return greatest

    def _boxes(self, scaled: Float32s) -> Float32s:
        """Return (blocks, D, 2): the least and greatest of each component in a block."""
        starts = np.arange(self._blocks) * self._slots_per_block
        sides = np.minimum.reduceat(scaled, starts), np.maximum.reduceat(scaled, starts)
        return np.ascontiguousarray(np.stack(sides, axis=-1))


def _negative(bias: Tensor | None, order: Ints) -> Float64s:
    if bias is None:
        return np.zeros(order.size)
    return -bias.detach().numpy()[order].astype(np.float64)


def _above(values: Float64s) -> Float32s:
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(np.inf))


def _aligned(array: Float32s) -> Float32s:
    """Return a copy in C order that starts at a multiple of a vector's size."""
    buffer = np.empty(array.size + _ALIGNMENT // 4, np.float32)
    start = -buffer.ctypes.data % _ALIGNMENT // 4
    copy = buffer[start : start + array.size].reshape(array.shape)
    copy[...] = array
    return copy


def _by_norm(codes: Float32s) -> Ints:
    """Return an order in which the codes of a block have similar norms, so that their bounds are tight."""
    return np.argsort(np.square(codes.astype(np.float64)).sum(axis=1), kind="stable")


def _neighbours_together(codes: Float32s, leaf: int) -> Ints:
    """Return an order in which each run of `leaf` codes is a leaf of a k-d tree: halves by the widest side."""
    leaves: list[Ints] = []
    pending = [np.arange(len(codes))]
    while pending:
        members = pending.pop()
        if members.size <= leaf:
            leaves.append(members)
            continue
        points = codes[members]
        side = points[:, int(np.argmax(points.max(axis=0) - points.min(axis=0)))]
        left = -(-members.size // leaf) // 2 * leaf
        parted = np.argpartition(side, left)
        pending += [members[parted[left:]], members[parted[:left]]]
    return np.concatenate(leaves)
