"""A codebook in the form of the compiled search: reordered, scaled, in panels, with error bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.search.bounds import ScoreBounds
from vqserve_server.search.native.library import CodebookStruct, Library
from vqserve_server.search.searcher import Objective

Floats = npt.NDArray[np.floating[Any]]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Up to this dimension codes get bounding boxes, by which a search skips whole blocks. In higher dimensions nearly every
# box is near every row.
MAX_BOXED_DIM = 12
_LEAST_BOXED_CODES = 256
# Components in a block of panels without boxes. The running minima are updated once per block, which takes as long as
# about 10 components of a panel.
_UNBOXED_COMPONENTS = 64
_ALIGNMENT = 64
# Larger codebooks without boxes keep their order and share the memory of the rows that decode reads: the bounds of a
# block are wider, which costs little beside a search over so many codes.
_MAX_SORTED_BYTES = 1 << 26
# Scores of DOT are not scaled: with codes up to this size products with rows do not overflow.
_LARGEST_UNSCALED = 2.0**40
# Sums up to this, errors included, do not overflow float32.
_LARGEST_SUM = 2.0**125


def fits(codes: Floats, bias: Floats | None, objective: Objective) -> bool:
    """Return whether the compiled search supports a codebook: float32, D <= 1024, and for DOT not too large numbers."""
    if codes.dtype != np.float32 or codes.shape[1] > 1024:
        return False
    if bias is not None and (bias.dtype != np.float32 or float(np.abs(bias).max()) > _LARGEST_UNSCALED**2):
        return False
    return objective is Objective.L2 or _largest(codes) <= _LARGEST_UNSCALED


class NativeCodebook:
    """Holds the arrays that `struct` points to."""

    def __init__(self, codes: Float32s, bias: Float32s | None, objective: Objective, library: Library) -> None:
        """Prepare codes (K, D) and, for DOT, bias (K,), that `fits` accepts."""
        num_codes, dim = codes.shape
        boxed = objective is Objective.L2 and dim <= MAX_BOXED_DIM and num_codes >= _LEAST_BOXED_CODES
        vectors, lanes = library.panel_vectors(is_boxed=boxed), library.lanes
        width = vectors * lanes
        block = 1 if boxed else max(1, _UNBOXED_COMPONENTS // (dim + 1))
        order = _order(codes, width, lanes, boxed=boxed)
        # Not a copy where the codes stay in their order.
        self.codes = np.ascontiguousarray(codes[order])
        self.bias = None if objective is Objective.L2 else np.zeros(num_codes, np.float32)
        if self.bias is not None and bias is not None:
            self.bias[:] = bias[order]

        largest = _largest(codes)
        scale = 2.0 ** -math.floor(math.log2(largest)) if objective is Objective.L2 and largest > 0 else 1.0
        # The smallest codes stay subnormal even when scaled: they are searched with wide bounds.
        scale = min(max(scale, 2.0**-126), 2.0**126)
        scaled = self.codes if scale == 1.0 else self.codes * np.float32(scale)
        narrow = ScoreBounds.of(scaled, self.bias, objective, np.float32)
        panels = -(-num_codes // width)
        blocks = -(-panels // block)
        # If squared distances overflow, a row visits every box, also the padding of the last group.
        visited = -(-blocks // lanes) * lanes
        self.error_slope = _block_max(narrow.slope, visited, block * width)
        self.error_base = _block_max(narrow.base, visited, block * width)
        self.boxes = self.outer = None
        if boxed:
            starts = np.arange(blocks) * width
            low, high = np.minimum.reduceat(scaled, starts), np.maximum.reduceat(scaled, starts)
            self.boxes, low, high = _boxes(low, high, lanes)
            self.outer, _, _ = _boxes(low, high, lanes)
        # A codebook may be gigabytes: its scaled copy is freed before the next copy is made.
        del scaled
        self.panel = _panels(self.codes, scale, -narrow.offset, panels, width)

        wide = ScoreBounds.of(self.codes, self.bias, objective, np.float64)
        self.offset, self.wide_slope, self.wide_base = -wide.offset, wide.slope, wide.base
        self.id = np.arange(num_codes, dtype=np.int64)[order]
        self.struct = CodebookStruct(
            num_codes=num_codes,
            dim=dim,
            vectors=vectors,
            panels=panels,
            block=block,
            panel=self.panel.ctypes.data,
            error_slope=self.error_slope.ctypes.data,
            error_base=self.error_base.ctypes.data,
            box_groups=0 if self.boxes is None else len(self.boxes),
            boxes=None if self.boxes is None else self.boxes.ctypes.data,
            outer_groups=0 if self.outer is None else len(self.outer),
            outer=None if self.outer is None else self.outer.ctypes.data,
            scale=scale,
            longest_row=min(narrow.longest_row, _LARGEST_SUM),
            codes=self.codes.ctypes.data,
            offset=self.offset.ctypes.data,
            bias=None if self.bias is None else self.bias.ctypes.data,
            wide_slope=self.wide_slope.ctypes.data,
            wide_base=self.wide_base.ctypes.data,
            id=self.id.ctypes.data,
        )


def _panels(codes: Float32s, scale: float, offset: Float32s, panels: int, width: int) -> Float32s:
    """Return (panels, D + 1, width): offsets, then scaled components. Padding has an infinite offset and never wins."""
    dim = codes.shape[1]
    panel = _aligned_empty((panels, dim + 1, width))
    full = len(codes) // width
    whole = full * width
    panel[:full, 0] = offset[:whole].reshape(full, width)
    panel[:full, 1:] = codes[:whole].reshape(full, width, dim).transpose(0, 2, 1)
    if full < panels:
        left = len(codes) - whole
        panel[full] = 0
        panel[full, 0] = np.inf
        panel[full, 0, :left] = offset[whole:]
        panel[full, 1:, :left] = codes[whole:].T
    if scale != 1.0:
        panel[:, 1:] *= np.float32(scale)
    return panel


def _block_max(values: Float32s, blocks: int, slots: int) -> Float32s:
    padded = np.zeros(blocks * slots, np.float32)
    padded[: values.size] = values
    greatest: Float32s = padded.reshape(blocks, slots).max(axis=1)
    return greatest


def _boxes(low: Float32s, high: Float32s, lanes: int) -> tuple[Float32s, Float32s, Float32s]:
    """Return (groups, D, 2, lanes) boxes made from (n, D) sides, and the sides of the box around each group."""
    groups = -(-len(low) // lanes)
    sides = []
    for side, beyond in ((low, np.inf), (high, -np.inf)):
        padded = np.full((groups * lanes, side.shape[1]), beyond, np.float32)
        padded[: len(side)] = side
        sides.append(padded.reshape(groups, lanes, -1))
    boxes = _aligned(np.stack(sides, axis=1).transpose(0, 3, 1, 2))
    return boxes, sides[0].min(axis=1), sides[1].max(axis=1)


def _aligned(array: Float32s) -> Float32s:
    """Return a copy in C order whose address is a multiple of _ALIGNMENT bytes."""
    copy = _aligned_empty(array.shape)
    copy[...] = array
    return copy


def _aligned_empty(shape: tuple[int, ...]) -> Float32s:
    buffer = np.empty(math.prod(shape) + _ALIGNMENT // 4, np.float32)
    start = -buffer.ctypes.data % _ALIGNMENT // 4
    return buffer[start : start + math.prod(shape)].reshape(shape)


def _largest(codes: Float32s) -> float:
    """Return the greatest magnitude, without an array of all magnitudes."""
    return max(float(codes.max()), -float(codes.min()))


def _order(codes: Float32s, leaf: int, lanes: int, *, boxed: bool) -> Ints | slice:
    """Return the order of codes in the panels; as an index, so that the order that they have needs no copy."""
    if boxed:
        return _neighbours_together(codes, leaf, lanes)
    return _by_norm(codes) if codes.nbytes <= _MAX_SORTED_BYTES else slice(None)


def _by_norm(codes: Float32s) -> Ints:
    """Return the order of codes by norm: similar norms in a block give tight bounds."""
    return np.argsort(np.square(codes.astype(np.float64)).sum(axis=1), kind="stable")


def _neighbours_together(codes: Float32s, leaf: int, lanes: int) -> Ints:
    """Return the order of codes in a k-d tree that is split at the widest side: each run of `leaf` codes is a leaf.

    Each run of `lanes` leaves is a subtree.
    """
    leaves: list[Ints] = []
    pending = [np.arange(len(codes))]
    while pending:
        members = pending.pop()
        if members.size <= leaf:
            leaves.append(members)
            continue
        points = codes[members]
        side = points[:, int(np.argmax(points.max(axis=0) - points.min(axis=0)))]
        unit = leaf * lanes if members.size > leaf * lanes else leaf
        left = (-(-members.size // unit) // 2) * unit
        parted = np.argpartition(side, left)
        pending += [members[parted[left:]], members[parted[:left]]]
    return np.concatenate(leaves)
