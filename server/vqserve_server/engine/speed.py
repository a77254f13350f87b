"""How long batches take, learned from those that were computed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from vqserve_server.config import EngineConfig
from vqserve_server.engine.job import Key

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

# What is assumed before the first batch. It is less than most devices need, so that nothing is rejected unseen.
_FIRST_JOB_S = 50e-6
_FIRST_ROW_S = 1e-6
_LEAST_JOB_S, _LEAST_ROW_S = 5e-6, 1e-10
# How much of an error is corrected at once.
_RATE = 0.25
# A batch counts as at most this much longer than was expected: one that had to warm up, or waited for memory, says
# little about the next, and a device that is slower indeed is known after a few batches.
_MOST_FACTOR, _MOST_EXTRA_S = 4.0, 0.01


# Rows of the first batches, and how fast that changes: much faster where the time is wrong by a factor of 4.
_FIRST_ROWS = 1024
# A batch has at least so many: with a large codebook, which is read once for each batch, fewer would take as long.
LEAST_ROWS = 128
_STEP, _LEAP, _MUCH = 1.1, 2.0, 4.0
# How much longer a batch may take while all jobs are alike: longer batches cost less for each row.
FULL_BATCH = 8
# A batch counts as full with this part of its rows: a job that would fit the next is not split.
_FULL = 0.8


class Speed:
    """The time of batches of one key: so much for each job, and so much for each row.

    The two are adapted to each batch by normalized least mean squares (Widrow and Hoff): of a batch with few rows for
    each job mostly the first, of one with many the second. They give the mean, which says when a queue is empty.

    How many rows a batch may have is learned apart: as many as usually take the time of a batch. A few that are held up
    by others on the machine do not make it smaller.

    Attributes:
        job_s: seconds that a job takes, whatever its rows.
        row_s: seconds that a row takes.
        batch_rows: rows that a batch may have while jobs of several keys or sizes share the device.
    """

    def __init__(self, max_rows: int, batch_s: float) -> None:
        """Assume a fast device.

        Args:
            max_rows: most rows of a batch.
            batch_s: seconds that a batch may take; 0: any.
        """
        self._max_rows = max_rows
        self._batch_s = batch_s
        self.job_s = _FIRST_JOB_S
        self.row_s = _FIRST_ROW_S
        self.batch_rows = min(max_rows, _FIRST_ROWS) if batch_s else max_rows

    @property
    def full_rows(self) -> int:
        """Rows that a batch may have while all jobs are alike."""
        return min(self._max_rows, FULL_BATCH * self.batch_rows)

    def seconds(self, jobs: int, rows: int) -> float:
        """Return how long that many rows of that many jobs are expected to take."""
        return jobs * self.job_s + rows * self.row_s

    def measure(self, jobs: int, rows: int, seconds: float) -> None:
        """Learn from a batch, of one job at least, that took that long."""
        expected = self.seconds(jobs, rows)
        error = min(seconds, _MOST_FACTOR * expected + _MOST_EXTRA_S) - expected
        # A row weighs as much as it costs beside a job, so that each is corrected by its part of the error.
        scale = self.job_s / self.row_s
        scaled = rows / scale
        step = _RATE * error / (jobs * jobs + scaled * scaled)
        self.job_s = max(self.job_s + step * jobs, _LEAST_JOB_S)
        self.row_s = max(self.row_s + step * scaled / scale, _LEAST_ROW_S)
        if self._batch_s and rows >= _FULL * self.batch_rows:
            self._resize(seconds * self.batch_rows / rows)

    def _resize(self, seconds: float) -> None:
        """Learn from the time of a full batch how many rows a batch may have."""
        if seconds > self._batch_s:
            rows = self.batch_rows / (_STEP if seconds < _MUCH * self._batch_s else _LEAP)
        else:
            rows = self.batch_rows * (_STEP if seconds * _MUCH > self._batch_s else _LEAP) + 1
        self.batch_rows = min(self._max_rows, max(LEAST_ROWS, int(rows)))


class Speeds:
    """The speeds of all keys. It does not keep a codebook that is no longer served."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._by_tokenizer: WeakKeyDictionary[Tokenizer, dict[Hashable, Speed]] = WeakKeyDictionary()

    def of(self, key: Key) -> Speed:
        """Return the speed of a key."""
        speeds = self._by_tokenizer.get(key.tokenizer)
        if speeds is None:
            speeds = self._by_tokenizer[key.tokenizer] = {}
        # Without the tokenizer, which the dictionary must not keep.
        options = key[1:]
        speed = speeds.get(options)
        if speed is None:
            speed = speeds[options] = Speed(key.max_rows(self._config), self._config.max_batch_ms * 1e-3)
        return speed
