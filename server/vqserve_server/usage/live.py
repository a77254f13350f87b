"""Samples the rows that a server encodes, and counts which codes they got, and with what error.

Every row has the same probability to be sampled, whoever sent it, in whatever batch and place, and whatever happens to
other rows: so the counts are unbiased. Sampled rows are copied and counted many at once, after the replies are sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqserve_server.code_groups import CodeGroups, Ints
from vqserve_server.usage.memory import Block, BlockText, UsageMemory

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

# Sampled rows that are counted at once, in at most so many bytes; and how long they wait for more.
_BUFFER_ROWS, _BUFFER_BYTES = 1024, 1 << 20
_LONGEST_WAIT_S = 1.0
# Rows of a full half of the window: several for each code, so that those in use are seen; less is too little for any.
_ROWS_PER_CODE, _LEAST_WINDOW_ROWS, _MOST_WINDOW_ROWS = 4, 1 << 14, 1 << 20
_GAPS_AT_ONCE = 4096


class RowSampler:
    """Chooses rows of a stream of batches: each with the same probability, independently of all others."""

    def __init__(self, one_in: int, rng: np.random.Generator) -> None:
        """Choose one row in `one_in` on average."""
        self._gaps = _gaps(one_in, rng)
        self._next = next(self._gaps) - 1

    def choose(self, rows: int) -> list[int]:
        """Return the chosen ones, ascending, of the next rows of the stream; most often none."""
        if self._next >= rows:
            self._next -= rows
            return []
        chosen = []
        position = self._next
        while position < rows:
            chosen.append(position)
            position += next(self._gaps)
        self._next = position - rows
        return chosen


def _gaps(one_in: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield the distances from one chosen row to the next."""
    while True:
        yield from rng.geometric(1 / one_in, _GAPS_AT_ONCE).tolist()


def window_rows(groups: CodeGroups) -> int:
    """Return the rows of a full half of a codebook's window."""
    largest = max(int(stage.stop) - int(stage.start) for stage in groups.stages)
    return min(max(_ROWS_PER_CODE * largest, _LEAST_WINDOW_ROWS), _MOST_WINDOW_ROWS)


class CodebookUsage:
    """The sample of one codebook's rows. Safe for use by many threads."""

    def __init__(self, tokenizer: Tokenizer, block: Block, sampler: RowSampler) -> None:
        """Count in a block; the numbers that are there stay."""
        self._tokenizer = tokenizer
        self._block: Block | None = block
        self._sampler = sampler
        self._lock = threading.Lock()
        self._groups = block.text.groups
        self._window_rows = window_rows(self._groups)
        info = tokenizer.info
        capacity = max(1, min(_BUFFER_ROWS, _BUFFER_BYTES // (8 * info.input_dim)))
        # float64 holds all latents as they are.
        self._rows = np.empty((capacity, info.input_dim))
        self._indices = np.zeros((capacity, info.num_quantizers), np.int64)
        # Indices of each row: fewer than all, if the caller wanted fewer.
        self._counts = np.empty(capacity, np.int64)
        self._filled = 0
        self._counted_at = time.monotonic()
        self._statistics = tokenizer.statistics
        self._compare(block)

    def use_statistics(self) -> None:
        """Compare with the statistics that the tokenizer has now."""
        with self._lock:
            if self._block is not None and self._tokenizer.statistics is not self._statistics:
                self._statistics = self._tokenizer.statistics
                self._compare(self._block)

    def close(self) -> None:
        """Count no more; when this returns, nothing writes to the block."""
        with self._lock:
            self._block = None

    def record(
        self, rows: npt.NDArray[np.floating[Any]], indices: Ints, own_rows: Callable[[], Sequence[slice]]
    ) -> None:
        """Sample the rows of a batch.

        Args:
            rows: (n, input_dim) float32 or float64, encoded; not kept.
            indices: (n,) or (n, q) of the first q stages.
            own_rows: returns the rows of the batch that are the server's own, and not traffic.
        """
        with self._lock:
            chosen = self._sampler.choose(len(rows))
            if not chosen or self._block is None:
                return
            own = own_rows()
            if own:
                chosen = [row for row in chosen if not any(part.start <= row < part.stop for part in own)]
            for start in range(0, len(chosen), len(self._rows)):
                part = chosen[start : start + len(self._rows)]
                if self._filled + len(part) > len(self._rows):
                    self._count(self._block)
                self._keep(rows, indices, part)
            if time.monotonic() - self._counted_at > _LONGEST_WAIT_S:
                self._count(self._block)

    def _compare(self, block: Block) -> None:
        statistics = self._statistics
        if statistics is None:
            block.set_reference(0, None, None)
        else:
            block.set_reference(statistics.rows, statistics.usage, statistics.error)

    def _keep(self, rows: npt.NDArray[np.floating[Any]], indices: Ints, chosen: list[int]) -> None:
        kept = slice(self._filled, self._filled + len(chosen))
        # Twice as fast as rows[chosen] for a few.
        found = indices.take(chosen, axis=0).reshape(len(chosen), -1)
        self._rows[kept] = rows.take(chosen, axis=0)
        self._indices[kept, : found.shape[1]] = found
        self._counts[kept] = found.shape[1]
        self._filled = kept.stop

    def _count(self, block: Block) -> None:
        """Count the rows that are kept."""
        count, self._filled = self._filled, 0
        self._counted_at = time.monotonic()
        indices, counts = self._indices[:count], self._counts[:count]
        stages = indices.shape[1]
        is_there = np.arange(stages) < counts[:, None]
        errors = np.empty(0)
        if self._tokenizer.errors is not None:
            whole = counts == stages
            errors = self._tokenizer.errors.of(self._rows[:count][whole], indices[whole])
            errors = errors[np.isfinite(errors)]
        places = self._groups.places(indices)[is_there]
        block.add(places, errors, rows=count, window_rows=self._window_rows)


class LiveUsage:
    """The samples of all codebooks that a process serves, in memory that other processes can read."""

    def __init__(self, memory: memoryview, *, one_in: int, seed: int | None = None) -> None:
        """Sample nothing yet.

        Args:
            memory: zeroed, or left by an earlier process of the same kind.
            one_in: one row in so many is sampled.
            seed: of the choice; None: another one each time.
        """
        self._memory = UsageMemory(memory)
        self._one_in = one_in
        self._rng = np.random.default_rng(seed)
        self._usages: dict[Tokenizer, CodebookUsage] = {}

    def follow(self, tokenizers: Iterable[Tokenizer]) -> None:
        """Sample these codebooks from now on, and no others.

        A codebook that has been sampled under the same name and with the same digest goes on; one with another digest
        starts anew.
        """
        served = list(tokenizers)
        before = self._usages
        # Device threads read it without a lock. What they still sample ends before its memory is used for others.
        self._usages = {each: before[each] for each in served if each in before}
        for tokenizer, usage in before.items():
            if tokenizer not in self._usages:
                usage.close()
        self._memory.keep({tokenizer.info.name for tokenizer in served})
        usages: dict[Tokenizer, CodebookUsage] = {}
        for tokenizer in served:
            if tokenizer in self._usages:
                usages[tokenizer] = self._usages[tokenizer]
                usages[tokenizer].use_statistics()
            elif (block := self._memory.block(_text(tokenizer))) is not None:
                sampler = RowSampler(self._one_in, self._rng.spawn(1)[0])
                usages[tokenizer] = CodebookUsage(tokenizer, block, sampler)
        self._usages = usages

    def record(
        self,
        tokenizer: Tokenizer,
        rows: npt.NDArray[np.floating[Any]],
        indices: Ints,
        own_rows: Callable[[], Sequence[slice]],
    ) -> None:
        """Sample the rows of a batch; see `CodebookUsage.record`. It is quick: it may be called for every batch."""
        usage = self._usages.get(tokenizer)
        if usage is not None:
            usage.record(rows, indices, own_rows)

    def forget(self, tokenizer: Tokenizer) -> None:
        """Sample a codebook no longer, after an error."""
        self._usages = {each: usage for each, usage in self._usages.items() if each is not tokenizer}


def _text(tokenizer: Tokenizer) -> BlockText:
    info = tokenizer.info
    return BlockText(info.name, info.digest, info.kind, tokenizer.code_groups.sizes)
