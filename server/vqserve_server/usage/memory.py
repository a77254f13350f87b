"""Counts of sampled rows in memory that one process writes and others read at any time.

The memory is a chain of blocks, one for each codebook. A block has words with numbers, a JSON text that describes the
codebook, two halves of the window with a counter for each group of codes, and the counts of the codebook's file. The
window is the last full half and the one that is being filled; when that is full, the other one is emptied and filled
again. A later writer (a worker that was started again) goes on with the blocks of an earlier one.

Whoever reads may see a row that is counted in one place and not yet in another. Only when a block is made anew, or a
half emptied, do its numbers not belong together: then its word `EPOCH` is odd, and a reader tries again.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.code_groups import CodeGroups, Ints
from vqserve_server.event_log import event

# Name and size of the memory of one process. What nobody has written to takes no memory.
USAGE = "usage"
USAGE_BYTES = 256 << 20

# Marks memory of this layout: a parent may be older than the worker that it starts after an upgrade.
_MARK = 0x7671_7573_6167_0001
_ALIGNMENT = 64
_START = 64
# Words of a block: its bytes (0: the chain ends), whether it is in use, ...
BYTES, IN_USE, EPOCH, TEXT_BYTES, MADE_AT, TOTAL_ROWS, FILLING, REFERENCE_ROWS, REFERENCE_ERROR = range(9)
# ... and of each half: its rows, the rows that have an error, and the sum of these errors (the last is a float).
HALF_ROWS, ERROR_ROWS, ERROR_SUM = 10, 12, 14
_WORDS = 16
_ATTEMPTS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockText:
    """What a block is about.

    Attributes:
        name: of the codebook.
        digest: of the codebook.
        kind: "vq", "ema" and so on.
        sizes: number of codes of each stage.
    """

    name: str
    digest: str
    kind: str
    sizes: tuple[int, ...]

    @property
    def groups(self) -> CodeGroups:
        """The counters."""
        return CodeGroups(self.sizes)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Numbers of a block at one time.

    Attributes:
        text: what it is about.
        made_at: when its codebook was loaded, in nanoseconds since 1970.
        total_rows: rows that were sampled since the codebook of this name was first loaded.
        usage: (groups.total,) rows of the window, by counter.
        error_rows: rows of the window that have an error.
        error_sum: sum of these errors.
        reference: (groups.total,) counts of the file; None: it has no statistics.
        reference_error: mean error in the file; None: it has none.
    """

    text: BlockText
    made_at: int
    total_rows: int
    usage: Ints
    error_rows: int
    error_sum: float
    reference: Ints | None
    reference_error: float | None


class Block:
    """One block, and where its numbers are.

    Attributes:
        text: what it is about.
        made_at: when it began to be about that, in nanoseconds since 1970.
        words: (16,) int64.
        floats: the same words as float64.
        halves: (2, groups.total) uint32.
        reference: (groups.total,) int64.
    """

    def __init__(self, memory: memoryview, start: int, text: BlockText, text_bytes: int) -> None:
        """Map a block that begins at a byte of the memory."""
        self.text = text
        total = text.groups.total
        at = start + _header_bytes(text_bytes)
        self.words = np.frombuffer(memory, np.int64, _WORDS, start)
        self.made_at = int(self.words[MADE_AT])
        self.floats = self.words.view(np.float64)
        self.halves = np.frombuffer(memory, np.uint32, 2 * total, at).reshape(2, total)
        self.reference = np.frombuffer(memory, np.int64, total, at + _aligned(8 * total))

    def snapshot(self) -> Snapshot | None:
        """Return the present numbers; None if they are being made anew, or the block is no longer in use."""
        for _ in range(_ATTEMPTS):
            epoch = int(self.words[EPOCH])
            if epoch % 2:
                # The writer needs some microseconds, or was killed.
                time.sleep(0.001)
                continue
            words, floats = self.words.copy(), self.floats.copy()
            usage = self.halves.sum(axis=0, dtype=np.int64)
            reference = self.reference.copy() if words[REFERENCE_ROWS] else None
            if int(self.words[EPOCH]) == epoch:
                break
        else:
            return None
        # The room may have been given to another codebook.
        if int(words[MADE_AT]) != self.made_at or not words[IN_USE]:
            return None
        error = float(floats[REFERENCE_ERROR])
        return Snapshot(
            text=self.text,
            made_at=self.made_at,
            total_rows=int(words[TOTAL_ROWS]),
            usage=usage,
            error_rows=int(words[ERROR_ROWS : ERROR_ROWS + 2].sum()),
            error_sum=float(floats[ERROR_SUM : ERROR_SUM + 2].sum()),
            reference=reference,
            reference_error=None if reference is None or math.isnan(error) else error,
        )

    def set_reference(self, rows: int, usage: Ints | None, error: float | None) -> None:
        """Keep the statistics of the codebook's file; zero rows: it has none."""
        self.words[EPOCH] |= 1
        if usage is not None:
            self.reference[:] = usage
        self.floats[REFERENCE_ERROR] = math.nan if error is None else error
        self.words[REFERENCE_ROWS] = rows
        self.words[EPOCH] += 1

    def add(self, places: Ints, errors: npt.NDArray[np.float64], *, rows: int, window_rows: int) -> None:
        """Count sampled rows.

        Args:
            places: counters to add one to, (any,).
            errors: finite errors of some of the rows.
            rows: number of rows.
            window_rows: rows of a full half.
        """
        half = int(self.words[FILLING])
        if self.words[HALF_ROWS + half] >= window_rows:
            half = 1 - half
            self.words[EPOCH] |= 1
            self._empty(half)
            self.words[FILLING] = half
            self.words[EPOCH] += 1
        np.add.at(self.halves[half], places, np.uint32(1))
        self.words[HALF_ROWS + half] += rows
        self.words[ERROR_ROWS + half] += errors.size
        self.floats[ERROR_SUM + half] += errors.sum()
        self.words[TOTAL_ROWS] += rows

    def start_anew(self, total_rows: int) -> None:
        """Forget what was counted, but for the number of rows of earlier codebooks of the name."""
        self.words[EPOCH] |= 1
        for half in range(2):
            self._empty(half)
        self.words[FILLING] = self.words[REFERENCE_ROWS] = 0
        self.made_at = time.time_ns()
        self.words[TOTAL_ROWS], self.words[MADE_AT] = total_rows, self.made_at
        self.words[IN_USE] = 1
        self.words[EPOCH] += 1

    def _empty(self, half: int) -> None:
        self.halves[half] = 0
        for word in (HALF_ROWS, ERROR_ROWS, ERROR_SUM):
            self.words[word + half] = 0


class UsageReader:
    """Reads the blocks of a memory."""

    def __init__(self, memory: memoryview) -> None:
        """Read nothing yet."""
        self._memory = memory
        self._mark = np.frombuffer(memory, np.int64, 1, 0)

    def blocks(self) -> list[Block]:
        """Return the blocks in use."""
        return [block for _, block in self._chain() if block is not None]

    def _chain(self) -> Iterator[tuple[int, Block | None]]:
        """Yield the first byte of each block, and the block if it is in use."""
        start = _START if int(self._mark[0]) == _MARK else len(self._memory)
        while start + 8 * _WORDS <= len(self._memory):
            words = np.frombuffer(self._memory, np.int64, _WORDS, start)
            if not words[BYTES]:
                return
            yield start, self._block(start, words) if words[IN_USE] else None
            start += int(words[BYTES])

    def _block(self, start: int, words: npt.NDArray[np.int64]) -> Block | None:
        made_at, text_bytes = int(words[MADE_AT]), int(words[TEXT_BYTES])
        begin = start + 8 * _WORDS
        try:
            plain: dict[str, Any] = json.loads(bytes(self._memory[begin : begin + text_bytes]))
            text = BlockText(plain["name"], plain["digest"], plain["kind"], tuple(plain["sizes"]))
        except (ValueError, KeyError):
            # The room was given to another codebook, whose text is being written.
            return None
        block = Block(self._memory, start, text, text_bytes)
        return block if block.made_at == made_at else None


class UsageMemory(UsageReader):
    """Finds and makes blocks; one process writes to a memory, one thread at a time."""

    def __init__(self, memory: memoryview) -> None:
        """Go on with the blocks of an earlier writer, if there are any."""
        super().__init__(memory)
        if int(self._mark[0]) not in {0, _MARK}:
            logger.error(event("usage_lost", reason="the parent process is another version of vqserved"))
        elif not self._mark[0]:
            self._mark[0] = _MARK

    def block(self, text: BlockText) -> Block | None:
        """Return the block of a codebook; one of the same name and another digest gives way to it.

        Returns:
            The block, with what was counted for this digest; None if there is no room.
        """
        total_rows = 0
        for block in self.blocks():
            if block.text.name != text.name:
                continue
            # An odd epoch: the earlier writer was killed while it emptied a half.
            if block.text == text and int(block.words[EPOCH]) % 2 == 0:
                return block
            total_rows = max(total_rows, int(block.words[TOTAL_ROWS]))
            release(block)
        made = self._make(text)
        if made is not None:
            made.start_anew(total_rows)
        return made

    def keep(self, names: set[str]) -> None:
        """Give up the blocks of all other names."""
        for block in self.blocks():
            if block.text.name not in names:
                release(block)

    def _make(self, text: BlockText) -> Block | None:
        content = json.dumps(vars(text), separators=(",", ":")).encode()
        total = text.groups.total
        nbytes = _header_bytes(len(content)) + 2 * _aligned(8 * total)
        start = _START
        for begin, _ in self._chain():
            words = np.frombuffer(self._memory, np.int64, _WORDS, begin)
            start = begin
            if not words[IN_USE] and words[BYTES] >= nbytes:
                nbytes = int(words[BYTES])
                break
            start += int(words[BYTES])
        if int(self._mark[0]) != _MARK or start + nbytes + 8 * _WORDS > len(self._memory):
            logger.error(event("usage_lost", name=text.name, reason="there are too many codebooks"))
            return None
        begin = start + 8 * _WORDS
        self._memory[begin : begin + len(content)] = content
        block = Block(self._memory, start, text, len(content))
        block.words[TEXT_BYTES] = len(content)
        # Last: from here on the block is part of the chain.
        block.words[BYTES] = nbytes
        return block


def release(block: Block) -> None:
    """Let the room of a block be used by others."""
    block.words[IN_USE] = 0


def _header_bytes(text_bytes: int) -> int:
    return _aligned(8 * _WORDS + text_bytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
