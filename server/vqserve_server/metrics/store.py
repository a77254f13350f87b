"""Numbers with names and labels in shared memory: one process adds to them, another one reads them at any time.

The memory is a sequence of records, each with the name and the labels of a series and its cells: 64-bit floats, which a
processor writes and reads as a whole. Records are only added, and the length of all of them is written last, so that a
reader finds complete records whenever the writer is interrupted or killed. A later writer goes on in the same cells.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from typing import NamedTuple

from vqserve_server.event_log import event

# Name of the memory.
METRICS = "metrics"
# Bytes of the memory of one process: room for some five thousand codebooks. What is not used costs nothing.
NBYTES = 16 << 20
_WORD = 8
# Marks memory of this layout: a parent may be older than the worker that it starts after an upgrade.
_MARK = 0x7671_6D65_7472_0001
# Cells at the end for what finds no room; nobody reads them.
_SPARE = 256

logger = logging.getLogger(__name__)

# Labels in the order of their names.
Labels = tuple[tuple[str, str], ...]


def labels_of(labels: Mapping[str, str]) -> Labels:
    """Return labels as a key."""
    return tuple(sorted(labels.items()))


class Series(NamedTuple):
    """A name with labels, and where its cells are.

    Attributes:
        name: of the family.
        labels: its labels.
        start: index of the first cell.
        stop: index after the last one.
    """

    name: str
    labels: Labels
    start: int
    stop: int


class Reader:
    """Reads the series in a memory, as far as they are complete."""

    def __init__(self, memory: memoryview) -> None:
        """Read nothing yet; the memory's size is a multiple of eight bytes."""
        self._bytes = memory
        self._words = memory.cast("Q")
        self.cells = memory.cast("d")
        self._series: list[Series] = []
        self._next = 2

    def series(self) -> list[Series]:
        """Return all series, in the order in which they were added."""
        end = self._words[1] if self._words[0] == _MARK else 0
        while self._next < end:
            # Words: the sizes of text and cells, the text, the cells.
            sizes = self._words[self._next]
            num_bytes, num_cells = sizes >> 32, sizes & 0xFFFFFFFF
            text = (self._next + 1) * _WORD
            start = self._next + 1 + -(-num_bytes // _WORD)
            name, labels = json.loads(bytes(self._bytes[text : text + num_bytes]))
            self._series.append(Series(name, labels_of(labels), start, start + num_cells))
            self._next = start + num_cells
        return self._series

    def values(self, series: Series) -> list[float]:
        """Return the present values of a series."""
        return list(self.cells[series.start : series.stop])


class Store(Reader):
    """Finds and adds series. Whoever has an index writes to `cells`; each index has one writer at a time."""

    def __init__(self, memory: memoryview) -> None:
        """Go on with the series of a former writer, if there are any."""
        super().__init__(memory)
        self._lock = threading.Lock()
        self._is_full = False
        if self._words[0] not in {0, _MARK}:
            logger.error(event("metrics_lost", reason="the parent process is another version of vqserved"))
            self._is_full = True
        elif not self._words[0]:
            self._words[1] = self._next
            self._words[0] = _MARK
        self._index = {(each.name, each.labels): each for each in self.series()}

    def cell(self, name: str, count: int = 1, /, **labels: str) -> int:
        """Return the index of the first of `count` cells of a series, which is added if it is new.

        What finds no room gets cells that nobody reads, and the log says so once.
        """
        key = name, labels_of(labels)
        with self._lock:
            found = self._index.get(key)
            if found is None or found.stop - found.start != count:
                found = self._add(name, labels, count)
            if found is None:
                return len(self.cells) - _SPARE
            return found.start

    def _add(self, name: str, labels: Mapping[str, str], count: int) -> Series | None:
        text = json.dumps([name, labels], separators=(",", ":")).encode()
        begin = self._words[1]
        start = begin + 1 + -(-len(text) // _WORD)
        if self._is_full or start + count > len(self.cells) - _SPARE:
            if not self._is_full:
                logger.error(event("metrics_lost", reason="there are too many series"))
            self._is_full = True
            return None
        self._bytes[(begin + 1) * _WORD : (begin + 1) * _WORD + len(text)] = text
        self._words[begin] = len(text) << 32 | count
        # Last: a reader, or a later writer, takes a record for complete from here on.
        self._words[1] = start + count
        series = Series(name, labels_of(labels), start, start + count)
        self._index[name, series.labels] = series
        return series
