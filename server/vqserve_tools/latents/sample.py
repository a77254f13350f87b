"""A uniform random sample of the rows of a data set, and all rows of one in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from vqserve.errors import InvalidOption, InvalidShape
from vqserve_tools.latents.dataset import DataSet
from vqserve_tools.latents.items import Chunk, row_named
from vqserve_tools.latents.rows import DataSetSize, Description, Ints, Rows

# Size of a sample if no number of rows is given: as large as the arrays that are read into memory.
_SAMPLE_BYTES = 1 << 30
# Bytes of the numbers that say where a row comes from.
_ORIGIN_BYTES = 3 * 8


class Reservoir:
    """A uniform random sample of rows without replacement, of a stream of unknown length.

    Row i (from 0) of the stream is stored in a random place of [0, i], if the sample has that place: Vitter's
    algorithm R, "Random sampling with a reservoir", 1985. The sample depends on the rows and the generator alone, not
    on how the rows are divided into chunks.

    Attributes:
        seen: number of rows so far.
    """

    def __init__(self, size: int, dim: int, rng: np.random.Generator) -> None:
        """Start without rows.

        Args:
            size: number of rows of the sample, at most.
            dim: width of a row.
            rng: generator of all random choices.
        """
        self.seen = 0
        self._rng = rng
        # Memory that is never written to is never taken.
        self._rows: Rows = np.empty((size, dim), np.float32)
        self._origins: Ints = np.empty((size, 3), np.int64)

    @property
    def rows(self) -> Rows:
        """The sample, (n, dim) float32; float64 if a chunk was."""
        return self._rows[: self.seen]

    @property
    def origins(self) -> Ints:
        """Where each row comes from, (n, 3)."""
        return self._origins[: self.seen]

    def add(self, rows: Rows, origins: Ints) -> None:
        """Add the next rows of the stream, (n, dim), and where they come from, (n, 3)."""
        if rows.dtype == np.float64 and self._rows.dtype == np.float32:
            self._rows = self._rows.astype(np.float64)
        size = len(self._rows)
        fitting = max(0, min(size - self.seen, len(rows)))
        self._rows[self.seen : self.seen + fitting] = rows[:fitting]
        self._origins[self.seen : self.seen + fitting] = origins[:fitting]
        places = self._rng.integers(0, np.arange(self.seen + fitting, self.seen + len(rows)), endpoint=True)
        self.seen += len(rows)
        chosen = np.flatnonzero(places < size)
        # Of several rows for one place the last one stays.
        last, first = np.unique(places[chosen][::-1], return_index=True)
        chosen = chosen[::-1][first] + fitting
        self._rows[last] = rows[chosen]
        self._origins[last] = origins[chosen]


class _DataSetRows:
    """What the two ways to read a data set share."""

    def __init__(self, data: DataSet) -> None:
        self.data = data

    @property
    def dim(self) -> int:
        return self.data.dim

    def check_channels(self, channels: int) -> None:
        """Check the number of channels.

        Raises:
            InvalidShape: it is another.
        """
        # The items of a data set that is read for a codebook have been checked one by one.
        if self.dim not in (0, channels):
            raise InvalidShape(f"latents have {self.dim} channels, the codebook takes {channels}", array="latents")

    def _describe(self, tokens: int, *, is_sampled: bool) -> Description:
        contents = self.data.contents
        return Description(
            shape=None,
            dtype=", ".join(sorted(contents.dtypes)),
            layout=", ".join(sorted(contents.layouts)),
            tokens=tokens,
            data_set=DataSetSize(
                files=len(self.data.files),
                items=contents.items,
                bad_items=contents.bad,
                tokens=contents.tokens,
                is_sampled=is_sampled,
            ),
        )


class SampledRows(_DataSetRows):
    """A sample of the rows of a data set, in memory."""

    def __init__(self, data: DataSet, rows: Rows, origins: Ints) -> None:
        """Store a sample; `draw_sample` makes one.

        Args:
            data: the data set, which was read.
            rows: (n, dim).
            origins: (n, 3), where each row comes from: its item, the entry of the batch axis, the row in the item.
        """
        super().__init__(data)
        self._rows = rows
        self._origins = origins

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, positions: Ints) -> Rows:
        """See RandomRows."""
        return self._rows[positions]

    def chunks(self, rows_per_chunk: int) -> Iterator[Rows]:
        """See LatentRows."""
        for start in range(0, len(self), rows_per_chunk):
            yield self._rows[start : start + rows_per_chunk]

    def check_finite(self) -> None:
        """Do nothing: the items were checked when they were read."""

    def placed(self, start: int) -> AbstractContextManager[None]:
        """See LatentRows."""
        return row_named(self._named, start)

    def _named(self, row: int) -> AbstractContextManager[None]:
        item, _, own = map(int, self._origins[row])
        return self.data.piece_with(item, own).named(own)

    def groupings(self) -> Iterator[tuple[str, Ints]]:
        """Group the rows by items, and by entries of the batch axis."""
        items, entries, _ = self._origins.T
        yield "items", items
        if len(entries) and entries.max() > 0:
            yield "entries of the batch axis", items * (entries.max() + 1) + entries

    def describe(self) -> Description:
        """See LatentRows."""
        return self._describe(len(self), is_sampled=len(self) < self.data.contents.tokens)


def draw_sample(data: DataSet, size: int | None = None, *, seed: int, progress: bool = False) -> SampledRows:
    """Read a data set once, and return a uniform random sample of its rows without replacement, or all its rows.

    Args:
        data: the data set.
        size: number of rows of the sample; None: what fits into 1 GiB, with the numbers that say where they come from.
        seed: seed of the sample; the same sources and seed give the same sample.
        progress: whether to show progress on stderr.

    Raises:
        InvalidOption: too many items cannot be used, or a file needs another selection or a library.
    """
    reservoir: Reservoir | None = None
    for chunk in data.chunks(progress=progress):
        if reservoir is None:
            row_bytes = data.dim * chunk.rows.itemsize + _ORIGIN_BYTES
            # With a sequence the generator is another than that of the training with this seed.
            rng = np.random.default_rng([seed, 1])
            reservoir = Reservoir(size or max(1, _SAMPLE_BYTES // row_bytes), data.dim, rng)
        reservoir.add(chunk.rows, chunk.origins())
    if reservoir is None:
        raise InvalidOption("the sources hold no items")
    return SampledRows(data, reservoir.rows, reservoir.origins)


class StreamedRows(_DataSetRows):
    """All rows of a data set, which is read anew each time."""

    def __init__(self, data: DataSet, *, progress: bool = False) -> None:
        """Store a data set.

        Args:
            data: the data set.
            progress: whether to show progress of the first pass on stderr.
        """
        super().__init__(data)
        self._progress = progress
        self._count: int | None = None
        self._latest: tuple[Chunk, int] | None = None

    def __len__(self) -> int:
        """Return the number of rows; the first time this reads the data set."""
        if self._count is None:
            for _ in self.data.chunks(progress=self._progress):
                pass
            self._count = self.data.contents.tokens
        return self._count

    def check_finite(self) -> None:
        """Read the data set, if that was not done before: what cannot be used is left out."""
        len(self)

    def chunks(self, rows_per_chunk: int) -> Iterator[Rows]:
        """See LatentRows.

        Raises:
            InvalidOption: as `DataSet.chunks`, or there are other rows than at the first time.
        """
        count = len(self)
        for chunk in self.data.chunks():
            for start in range(0, len(chunk.rows), rows_per_chunk):
                self._latest = chunk, start
                yield chunk.rows[start : start + rows_per_chunk]
        if self.data.contents.tokens != count:
            raise InvalidOption("the sources have changed while they were read")

    def placed(self, start: int) -> AbstractContextManager[None]:
        """See LatentRows."""
        del start
        return nullcontext() if self._latest is None else self._latest[0].placed(self._latest[1])

    def describe(self) -> Description:
        """See LatentRows."""
        return self._describe(len(self), is_sampled=False)
