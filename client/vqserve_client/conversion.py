"""How a whole array is encoded or decoded in pieces: what the pieces are, and where the result of each goes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from vqserve import payload
from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import LatentDTypeName
from vqserve.errors import InvalidOption, VqserveError
from vqserve.layout import Layout, indices_shape, latents_shape, parse_layout
from vqserve.types import LayoutName, OutputName
from vqserve.validation import check_num_quantizers
from vqserve_client.arrays import (
    Array,
    Cut,
    Plan,
    indices_cut,
    indices_geometry,
    indices_input,
    latents_cut,
    latents_geometry,
    latents_input,
    latents_storage,
    of_whole,
    plan,
)
from vqserve_client.client import Client

# Small enough that several pieces in flight need little memory, large enough that calls cost little.
PIECE_BYTES = 4 << 20
# What each operation makes.
RESULTS = {"encode": "indices", "decode": "latents"}
# Shapes whose cuts are remembered.
_SHAPES = 256


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of a conversion, as those of `Client.encode` and `decode`.

    Attributes:
        layout: where the channels of the latents are; None: the codebook's default.
        num_quantizers: indices of each token; None: all.
        batched: whether arrays have a batch axis.
        dtype: element type of the result; None: the smallest for indices that holds the vocabulary, or float32.
        output: what decode returns.
    """

    layout: LayoutName | None = None
    num_quantizers: int | None = None
    batched: bool = True
    dtype: str | None = None
    output: OutputName = "latents"


@dataclass(frozen=True)
class Piece:
    """One array that is sent, as cuts of the grid of tokens, of the source and of the result."""

    grid: Cut
    source: Cut
    target: Cut


@dataclass(frozen=True)
class Outline:
    """What becomes of an array of one shape.

    Attributes:
        shape: shape of the result.
        tokens: number of tokens.
        cuts: cuts of the grid of tokens, one for each piece.
        layout: layout of the latents.
        whole: the only piece; None: there are several.
    """

    shape: tuple[int, ...]
    tokens: int
    cuts: Plan
    layout: Layout
    whole: Piece | None = None

    def tokens_in(self, part: Array) -> int:
        """Return the number of tokens in a part of the result."""
        return self.tokens if self.whole else part.size * self.tokens // max(1, math.prod(self.shape))


class Conversion(ABC):
    """Base of encoding and decoding with one codebook, whose digest every request names.

    Attributes:
        operation: "encode" or "decode".
        info: the codebook.
        options: the options.
        stages: indices per token; None: one, without an axis of stages.
        dtype: element type of the results.
    """

    operation: str
    dtype: np.dtype[Any]

    def __init__(self, info: CodebookInfo, options: ConversionOptions) -> None:
        """Check the options against the codebook.

        Raises:
            InvalidOption: they do not fit.
        """
        count = check_num_quantizers(options.num_quantizers, available=info.num_quantizers)
        self.info = info
        self.options = options
        self.stages = count if info.has_stages else None
        self._layout = parse_layout(options.layout)
        self._outline = lru_cache(_SHAPES)(self._complete)

    def outline(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Outline:
        """Return what becomes of an array; nothing of it is read.

        Raises:
            InvalidArgument: an array of this shape or type cannot be converted.
        """
        return self._outline(shape, dtype)

    def pieces(self, outline: Outline) -> Iterator[Piece]:
        """Return the pieces of an array, in order."""
        return self._cut_up(outline) if outline.whole is None else iter((outline.whole,))

    def _cut_up(self, outline: Outline) -> Iterator[Piece]:
        for cut in outline.cuts:
            source, target = self._cuts(cut, outline.layout)
            yield Piece(self._own(cut), self._own(source), self._own(target))

    @abstractmethod
    def many(self, client: Client, arrays: Iterable[Array], *, on_error: Any = "raise") -> Generator[Any, None, None]:
        """Yield the result of each piece; see Client.encode_many."""

    def of_whole(self, error: VqserveError, piece: Piece) -> VqserveError:
        """Return an error about a piece as an error about the whole array."""
        return of_whole(error, array=piece.source, grid=piece.grid).with_fields(item=None)

    def _complete(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Outline:
        outline = self._outlined(shape, dtype)
        return outline if len(outline.cuts) > 1 else replace(outline, whole=next(self._cut_up(outline)))

    @abstractmethod
    def _outlined(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Outline: ...

    @abstractmethod
    def _cuts(self, cut: Cut, layout: Layout) -> tuple[Cut, Cut]:
        """Return a cut of the grid as cuts of the source and of the result."""

    def _common(self) -> dict[str, Any]:
        return {
            "codebook": self.info.name,
            "digest": self.info.digest,
            "layout": self._layout,
            "num_quantizers": self.stages,
            "batched": self.options.batched,
        }

    def _with_batch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.options.batched else (1, *shape)

    def _own(self, cut: Any) -> Any:
        """Return a shape or a cut as one of the caller's arrays, which may have no batch axis."""
        return cut if self.options.batched else cut[1:]


class Encoding(Conversion):
    """Latents to indices."""

    operation = "encode"

    def __init__(self, info: CodebookInfo, options: ConversionOptions) -> None:
        """Check the options against the codebook.

        Raises:
            InvalidOption: they do not fit.
        """
        super().__init__(info, options)
        smallest = payload.dtype_name(payload.index_dtype(info.vocab_size))
        self.dtype = np.dtype(options.dtype or smallest)
        if np.iinfo(self.dtype).max < info.vocab_size - 1:
            raise InvalidOption(
                f"{{option}} {options.dtype} cannot hold the indices of codebook {info.name!r}, which are below "
                f"{info.vocab_size}: {smallest} is the smallest that can",
                option="dtype",
            )

    def many(self, client: Client, arrays: Iterable[Array], *, on_error: Any = "raise") -> Generator[Any, None, None]:
        """Yield the indices of each piece."""
        return client.encode_many(arrays, on_error=on_error, **self._common())

    def _outlined(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Outline:
        item_bytes = payload.itemsize(latents_input(np.empty(0, dtype)).dtype)
        batched = self.options.batched
        grid, layout = latents_geometry(self._with_batch(shape), self._layout, self.info, batched=batched)
        cuts = plan(grid, max(1, PIECE_BYTES // (self.info.input_dim * item_bytes)))
        return Outline(self._own(indices_shape(grid, self.stages, layout)), math.prod(grid), cuts, layout)

    def _cuts(self, cut: Cut, layout: Layout) -> tuple[Cut, Cut]:
        return latents_cut(cut, layout), indices_cut(cut, self.stages, layout)


class Decoding(Conversion):
    """Indices to latents."""

    operation = "decode"

    def __init__(self, info: CodebookInfo, options: ConversionOptions) -> None:
        """Check the options against the codebook.

        Raises:
            InvalidOption: they do not fit.
        """
        super().__init__(info, options)
        self._width = info.code_dim if options.output == "code_rows" else info.output_dim
        self._wire: LatentDTypeName = options.dtype or "float32"  # type: ignore[assignment]
        self.dtype = latents_storage(payload.dtype_of_name(self._wire), None)

    def many(self, client: Client, arrays: Iterable[Array], *, on_error: Any = "raise") -> Generator[Any, None, None]:
        """Yield the latents of each piece."""
        options = {"dtype": self._wire, "output": self.options.output, **self._common()}
        return client.decode_many(arrays, on_error=on_error, **options)

    def _outlined(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Outline:
        indices_input(np.empty(0, dtype))
        whole, batched = self._with_batch(shape), self.options.batched
        grid, layout = indices_geometry(whole, self._layout, self.info, stages=self.stages, batched=batched)
        cuts = plan(grid, max(1, PIECE_BYTES // (self._width * self.dtype.itemsize)))
        return Outline(self._own(latents_shape(grid, self._width, layout)), math.prod(grid), cuts, layout)

    def _cuts(self, cut: Cut, layout: Layout) -> tuple[Cut, Cut]:
        return indices_cut(cut, self.stages, layout), latents_cut(cut, layout)
