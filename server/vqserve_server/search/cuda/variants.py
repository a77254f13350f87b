"""The variants of the kernels: how each is compiled, by architecture, code dimension and row dtype.

This is a table and no tuning at run time: a variant can be compiled when the image is built, and its registers and
memory can be looked at on a machine without a GPU. Nothing here needs Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Compute capabilities for which kernels are compiled: 8.0, 8.9, 9.0, 10.0.
ARCHITECTURES = (80, 89, 90, 100)
# Most components of one block; tl.dot needs at least 16.
_MAX_BLOCK_DIM = 64


@dataclass(frozen=True)
class Variant:
    """One way to compile one kernel.

    Attributes:
        name: unique among the variants of an architecture, and a valid file name.
        architecture: compute capability without the dot, one of `ARCHITECTURES`.
        kernel: name of the function in `kernels.py`, and of the function in the compiled file.
        signature: name and Triton type of every argument that is passed at a launch, in order. "*fp32:16" is a pointer
            to float32 whose address is a multiple of 16 bytes. Numbers are never specialised: any value fits.
        constants: name and value of every argument that is fixed when the kernel is compiled.
        block_rows: rows that one program works on.
        num_warps: warps of a program.
        num_stages: stages of the pipeline of loads.
    """

    name: str
    architecture: int
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    block_rows: int
    num_warps: int
    num_stages: int


_NEAREST = (
    ("rows", "*fp32:16"),
    ("norms", "*fp32:16"),
    ("codes", "*fp32:16"),
    ("offset", "*fp32:16"),
    ("slope", "*fp32:16"),
    ("base", "*fp32:16"),
    ("winners", "*i64:16"),
    ("is_open", "*i8:16"),
    ("count", "i32"),
    ("num_codes", "i32"),
    ("dim", "i32"),
)


def nearest(architecture: int, dim: int) -> Variant:
    """Return the variant that searches codes of D = dim."""
    block_dim = min(_MAX_BLOCK_DIM, max(16, 1 << math.ceil(math.log2(dim))))
    return Variant(
        name=f"nearest_{block_dim}",
        architecture=architecture,
        kernel="nearest",
        signature=_NEAREST,
        constants=(("BLOCK_ROWS", 64), ("BLOCK_CODES", 64), ("BLOCK_DIM", block_dim)),
        block_rows=64,
        num_warps=4,
        num_stages=3,
    )


def all_variants(architecture: int) -> tuple[Variant, ...]:
    """Return every variant that a search on an architecture may launch."""
    return tuple(nearest(architecture, dim) for dim in (16, 32, 64))


def architecture_of(capability: tuple[int, int]) -> int:
    """Return the architecture of the table for a device's compute capability: the greatest that is not above it."""
    wanted = 10 * capability[0] + capability[1]
    return max((known for known in ARCHITECTURES if known <= wanted), default=ARCHITECTURES[0])
