"""How a grid of tokens is cut into requests, none of which, nor its reply, is larger than a message."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vqserve.errors import VqserveError
from vqserve.layout import Layout, channel_axis
from vqserve.payload import ENVELOPE_BYTES

Cut = tuple[slice, ...]


@dataclass(frozen=True)
class Plan:
    """The cuts of one grid, in C order; every cut keeps all axes, so layouts and positions stay what they are.

    Attributes:
        grid: the shape that is cut.
        axis: the axis that is cut into runs; the axes before it are cut into single steps, those after it not at all.
        step: the longest run on that axis.
    """

    grid: tuple[int, ...]
    axis: int
    step: int

    def __len__(self) -> int:
        if not self.step:
            return 1
        return math.prod(self.grid[: self.axis]) * -(-self.grid[self.axis] // self.step)

    def __iter__(self) -> Iterator[Cut]:
        if not self.step:
            yield (slice(None),) * len(self.grid)
            return
        uncut = (slice(None),) * (len(self.grid) - self.axis - 1)
        for outer in itertools.product(*(range(length) for length in self.grid[: self.axis])):
            singles = tuple(slice(i, i + 1) for i in outer)
            length = self.grid[self.axis]
            for start in range(0, length, self.step):
                yield (*singles, slice(start, min(start + self.step, length)), *uncut)


def plan(grid: Sequence[int], max_rows: int) -> Plan:
    """Return the cuts that leave at most `max_rows` tokens (1 or more) in each, the runs of nearly equal length."""
    grid = tuple(grid)
    if math.prod(grid) <= max_rows:
        return Plan(grid, 0, 0)
    axis, inner = len(grid) - 1, 1
    while axis > 0 and inner * grid[axis] <= max_rows:
        inner *= grid[axis]
        axis -= 1
    runs = -(-grid[axis] // (max_rows // inner))
    return Plan(grid, axis, -(-grid[axis] // runs))


def latents_cut(cut: Cut, layout: Layout) -> Cut:
    """Return the cut of the latents that belongs to a cut of the grid: all channels of it."""
    axis = channel_axis(layout)
    return (*cut, slice(None)) if axis < 0 else (*cut[:axis], slice(None), *cut[axis:])


def indices_cut(cut: Cut, stages: int | None, layout: Layout) -> Cut:
    """Return the cut of the indices that belongs to a cut of the grid: all of each token."""
    return cut if stages is None else latents_cut(cut, layout)


def rows_per_message(max_message_bytes: int, name_bytes: int, *row_bytes: int) -> int:
    """Return how many tokens fit a message when one takes so many bytes, in the request and in the reply; maybe 0."""
    payload_bytes = max_message_bytes - ENVELOPE_BYTES - name_bytes
    return max(0, payload_bytes // max(row_bytes))


def cut_text(cut: Cut) -> str:
    """Return a cut as Python writes it: [0:1, 16:32, :]."""
    runs = (":" if run == slice(None) else f"{run.start}:{run.stop}" for run in cut)
    return f"[{', '.join(runs)}]"


def of_whole(error: VqserveError, *, array: Cut, grid: Cut) -> VqserveError:
    """Return the error about a part of an array as one about the whole; the same one if it has no position there.

    Args:
        error: as the server, which has the part only, made it.
        array: the part, as a cut of the whole array.
        grid: the part, as a cut of the whole array's tokens.
    """
    cut = grid if error.array == "tokens" else array
    return error.shifted([run.start or 0 for run in cut])
