"""A data set of latents, read in order, in bounded memory: its items are checked one by one, and become rows.

An item that cannot be used - unreadable, empty, of other channels, with NaN - is left out as a whole, and named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from vqserve.errors import COMMAND_LINE, InvalidArgument, InvalidOption, InvalidShape, escape
from vqserve.layout import Layout, channel_axis, parse_layout, resolve_layout
from vqserve.text import printable
from vqserve.validation import check_channels, not_latents
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item
from vqserve_data.readers import reader_of
from vqserve_data.readers.protocol import SourceFile
from vqserve_server.rows import to_rows
from vqserve_tools.latents.items import Chunk, Form, Piece, checked, is_one_part, item_name, parts
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.latents.rows import counted
from vqserve_tools.progress import progress_of

# Rows of small items are joined until there are so many, or so many bytes.
_CHUNK_ROWS = 1 << 16
_CHUNK_BYTES = 1 << 26
# The first items, which are asked for their channels.
_ITEMS_ASKED = 100
# Bad items that are kept to be named.
_MOST_NAMED = 100
# Characters of a key or a reason in a text.
_LONGEST = 300


@dataclass
class Contents:
    """What one pass over a data set has found so far.

    Attributes:
        items: number of items that are used.
        tokens: number of their rows.
        bad: number of items that cannot be used.
        named: the first of these.
        dtypes: element types of the used items.
        layouts: layouts of the used items.
        first: key and shape of the first used item, and its layout.
    """

    items: int = 0
    tokens: int = 0
    bad: int = 0
    named: list[BadItem] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    layouts: set[Layout] = field(default_factory=set)
    first: tuple[str, tuple[int, ...], Layout] | None = None


class DataSet:
    """Items of files.

    Attributes:
        files: files in the order in which they are read.
        options: how they are read.
        contents: what the last pass has found.
        dim: number of channels; without a number that was asked for it is the usual one of the first items. 0: it is
            not known before the first item is read.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        options: SourceOptions,
        layout: str | None = None,
        *,
        default: Layout | None = None,
        channels: int | None = None,
        keeps_float64: bool = False,
    ) -> None:
        """Store what is read and how; nothing is read yet.

        Args:
            files: files.
            options: how they are read.
            layout: "channels_first", "channels_last" or None, the default.
            default: layout for 3 to 5 axes, with the batch axis, if `layout` is None; None: channels first for 4 and
                5 axes, last for 3. In arrays of two axes the channels are always last.
            channels: number of channels; None: that of most of the first hundred items.
            keeps_float64: whether rows of float64 arrays stay float64; otherwise all rows are float32.

        Raises:
            InvalidOption: there is no such layout.
        """
        self.files = files
        self.options = options
        self.contents = Contents()
        self.dim = channels or 0
        self._layout = parse_layout(layout)
        self._default = default
        self._channels = channels
        self._keeps_float64 = keeps_float64
        self._form = lru_cache(maxsize=1024)(self._new_form)

    def chunks(self, *, progress: bool = False) -> Iterator[Chunk]:
        """Read all items in order, and yield their rows.

        Args:
            progress: whether to show progress on stderr.

        Raises:
            InvalidOption: too many items cannot be used, or a file needs another selection or a library.
        """
        pieces: list[Piece] = []
        count = size = 0
        for piece in self._pieces(progress=progress):
            if pieces and pieces[-1].rows.dtype != piece.rows.dtype:
                yield Chunk(pieces)
                pieces, count, size = [], 0, 0
            pieces.append(piece)
            count += len(piece.rows)
            size += piece.rows.nbytes
            if count >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                yield Chunk(pieces)
                pieces, count, size = [], 0, 0
        if pieces:
            yield Chunk(pieces)

    def piece_with(self, item: int, row: int) -> Piece:
        """Read the data set again up to a row, and return the piece that has it.

        Raises:
            InvalidOption: it is not there any more.
        """
        for piece in self._pieces():
            if piece.item == item and row < piece.first + len(piece.rows):
                return piece
        raise InvalidOption("the sources have changed while they were read")

    def _usual_channels(self) -> int:
        """Return the number of channels of most of the first items whose shapes are known before they are read, or 0.

        If the first item alone decided, all others would be left out because of one that does not belong to them.
        """
        counts = Counter(islice(self._known_channels(), _ITEMS_ASKED))
        return counts.most_common(1)[0][0] if counts else 0

    def _known_channels(self) -> Iterator[int]:
        for file in self.files[:_ITEMS_ASKED]:
            # What cannot be read is named when it is read.
            with suppress(FileError):
                for entry in islice(reader_of(file).entries(file, self.options.selection), _ITEMS_ASKED):
                    if entry.shape is not None and entry.dtype is not None:
                        with suppress(InvalidArgument):
                            yield entry.shape[self._form(entry.shape, entry.dtype).axis]

    def _pieces(self, *, progress: bool = False) -> Iterator[Piece]:
        self.contents = Contents()
        self.dim = self.dim or self._usual_channels()
        select = self.options.selection
        shown = 0
        try:
            with progress_of("reading", len(self.files), "file", shown=progress) as bar:
                for file in self.files:
                    for record in reader_of(file).read(file, select):
                        if isinstance(record, Item):
                            yield from self._pieces_of(record)
                        elif isinstance(record, BadItem):
                            self._leave_out(record)
                        if self.contents.tokens - shown >= _CHUNK_ROWS:
                            shown = self.contents.tokens
                            bar.set_postfix_str(f"{shown} rows")
                            # A line of a log is due even if a file takes long.
                            bar.update(0)
                    bar.update(1)
        except FileError as error:
            raise InvalidOption(escape(str(error))) from error
        self._check_enough()

    def _pieces_of(self, item: Item) -> Iterator[Piece]:
        """Yield the rows of an item; if it cannot be used, none of them."""
        array = item.array
        try:
            form = self._form(array.shape, array.dtype)
            self._check_channels(array.shape, form)
            whole = checked(array, form)
        except (InvalidArgument, FileError, OSError) as error:
            text = error.statement(COMMAND_LINE) if isinstance(error, InvalidArgument) else str(error)
            self._leave_out(BadItem(item.key, item.source, text))
            return
        contents = self.contents
        rows_per_entry = form.tokens if self.options.unbatched or len(form.grid) == 1 else math.prod(form.grid[1:])
        number, first = contents.items, 0
        self.dim = array.shape[form.axis]
        contents.items += 1
        contents.tokens += form.tokens
        contents.dtypes.add(form.stored)
        contents.layouts.add(form.layout)
        contents.first = contents.first or (item.key, array.shape, form.layout)
        for part in parts(array, form) if whole is None else (whole,):
            batch = part[None] if self.options.unbatched else part
            rows = np.ascontiguousarray(to_rows(batch, form.layout), dtype=form.dtype)
            yield Piece(rows, first, number, item.key, item.source, form.grid, rows_per_entry)
            first += len(rows)

    def _new_form(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Form:
        """Return what follows from a shape and a dtype.

        Raises:
            InvalidArgument: they are not those of latents of this data set.
        """
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise not_latents(dtype)
        batched = not self.options.unbatched
        whole = shape if batched else (1, *shape)
        layout = resolve_layout(len(whole), self._layout, self._default, batched=batched)
        axis = channel_axis(layout) % len(whole) - (len(whole) - len(shape))
        if self._channels is not None:
            check_channels(whole, layout, self._channels, batched=batched)
        grid = shape[:axis] + shape[axis + 1 :]
        if 0 in grid:
            raise InvalidShape(f"latents of shape {shape} hold no tokens", array="latents")
        wide = self._keeps_float64 and dtype.itemsize == 8
        return Form(
            layout=layout,
            axis=axis,
            grid=grid,
            tokens=math.prod(grid),
            dtype=np.dtype(np.float64 if wide else np.float32),
            stored=dtype.name,
            is_one_part=is_one_part(shape, dtype),
        )

    def _check_channels(self, shape: tuple[int, ...], form: Form) -> None:
        """Check that an item has as many channels as the others.

        Raises:
            InvalidShape: it has not.
        """
        found = shape[form.axis]
        if found == 0 or (self.dim and found != self.dim):
            before = f", and others have {self.dim}" if self.dim else ""
            if self.dim and len(shape) == 3 and not self.options.unbatched:
                before += ": are they (C, h, w)? pass --unbatched"
            raise InvalidShape(
                f"latents of shape {shape} have {found} channels in layout {form.layout}{before}", array="latents"
            )

    def _leave_out(self, bad: BadItem) -> None:
        contents = self.contents
        contents.bad += 1
        if len(contents.named) < _MOST_NAMED:
            contents.named.append(bad)
        if contents.bad > self.options.max_errors:
            raise InvalidOption(
                f"{counted(contents.bad, 'item')} cannot be used, and {{option}} is {self.options.max_errors}. "
                f"The last: {escape(bad_text(bad))}",
                option="max_errors",
            )

    def _check_enough(self) -> None:
        contents = self.contents
        if not contents.items and not contents.named:
            raise InvalidOption("the sources hold no items")
        if contents.bad > contents.items:
            counts = f"{contents.bad} of {contents.bad + contents.items} items cannot be used"
            raise InvalidOption(f"{counts}. The first: {escape(bad_text(contents.named[0]))}")


def bad_text(bad: BadItem) -> str:
    """Return a line about an item that cannot be used."""
    return f"{printable(item_name(bad.key, bad.source), _LONGEST)}: {printable(bad.reason, _LONGEST)}"
