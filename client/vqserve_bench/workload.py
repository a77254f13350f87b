"""The requests of a benchmark, made before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqserve import payload
from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import BY_NUMBER, LatentDTypeName
from vqserve.errors import InvalidArgument, InvalidShape, of_file
from vqserve.layout import channel_axis, parse_layout, resolve_layout
from vqserve.npy import NpyFile
from vqserve.trace import SERVICE_NAME
from vqserve.types import LayoutName
from vqserve.validation import check_indices_shape, check_latents_shape
from vqserve_bench.request import Request
from vqserve_bench.served import ReadStats, decode_stats, encode_stats
from vqserve_client.arrays import Array, ArrayInput, indices_input, latents_input
from vqserve_client.calls import ArrayCall
from vqserve_client.catalogue import Pin
from vqserve_client.config import ClientConfig, call_options, decode_options
from vqserve_client.forms import DecodeForm, EncodeForm, Form
from vqserve_data.files import open_array

Grid = tuple[int, ...]

# Requests of one shape have different data: this many variants, or as many as memory allows.
_VARIANTS = 8
_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests to encode or to decode grids of data.

    Attributes:
        method: "encode" or "decode".
        grids: shapes of indices, 1 to 4 axes; each is sent as often as any other.
        dtype: of the latents, which encode sends and decode receives.
        layout: of these latents; None: the codebook's default.
        data: a .npy file of latents to encode, or of indices to decode. Items are taken evenly from its first axis,
            several times if it has too few. None: random latents (standard normal) or indices (uniform).
        seed: of the random data.
    """

    method: str
    grids: tuple[Grid, ...]
    dtype: LatentDTypeName = "float32"
    layout: LayoutName | None = None
    data: Path | None = None
    seed: int = 0

    def path(self, *, stream: bool) -> str:
        """Return the path of the gRPC method."""
        return f"/{SERVICE_NAME}/{self.method.capitalize()}{'Stream' if stream else ''}"

    @property
    def read_stats(self) -> ReadStats:
        """Return the function that reads the statistics of a reply."""
        return encode_stats if self.method == "encode" else decode_stats

    def requests(self, info: CodebookInfo, config: ClientConfig) -> tuple[Request, ...]:
        """Return the requests as the client would send them: they name the codebook's digest.

        Args:
            info: the codebook.
            config: the server's address, and how large messages may be.

        Raises:
            InvalidArgument: if the codebook does not take such a grid, layout or data.
            MessageTooLarge: if a request or its reply does not fit a message.
            FileError: if the data cannot be read.
        """
        channels = info.input_dim if self.method == "encode" else info.output_dim
        row_bytes = channels * payload.itemsize(payload.dtype_of_name(self.dtype))
        for grid in self.grids:
            # Check before any data is made: it might not fit into memory.
            if math.prod(grid) * row_bytes > config.max_message_bytes:
                raise _too_large(grid, info, config)
        tokens = sum(math.prod(grid) for grid in self.grids)
        variants = max(1, min(_VARIANTS, _MEMORY_BYTES // (tokens * row_bytes)))
        make = self._encode if self.method == "encode" else self._decode
        return tuple(make(info, config, tokens * variants))

    def _encode(self, info: CodebookInfo, config: ClientConfig, tokens: int) -> Iterator[Request]:
        rows = self._latent_rows(info, tokens)
        wire = payload.dtype_of_name(self.dtype)
        for grid, start in self._cuts(tokens):
            layout = resolve_layout(len(grid) + 1, parse_layout(self.layout), info.layout)
            latents = np.moveaxis(
                rows[start : start + math.prod(grid)].reshape(*grid, info.input_dim), -1, channel_axis(layout)
            )
            source = ArrayInput(BY_NUMBER[wire].narrow(latents), wire)
            options = call_options(layout=self.layout)
            yield _request(source, EncodeForm(source, info, options, config=config), grid, config)

    def _decode(self, info: CodebookInfo, config: ClientConfig, tokens: int) -> Iterator[Request]:
        indices = self._indices(info, tokens)
        options = decode_options(layout=self.layout, dtype=self.dtype)
        for grid, start in self._cuts(tokens):
            source = indices_input(self._in_grid(indices[start : start + math.prod(grid)], grid, info))
            yield _request(source, DecodeForm(source, info, options, config=config), grid, config)

    def _in_grid(self, tokens: Array, grid: Grid, info: CodebookInfo) -> Array:
        """Return the indices of tokens, (n,) or with stages (n, q), as a request has them."""
        if not info.has_stages:
            return tokens.reshape(grid)
        layout = resolve_layout(len(grid) + 1, parse_layout(self.layout), info.layout)
        return np.moveaxis(tokens.reshape(*grid, info.num_quantizers), -1, channel_axis(layout))

    def _cuts(self, tokens: int) -> Iterator[tuple[Grid, int]]:
        """Yield each grid and where its tokens begin, until `tokens` are used."""
        start = 0
        while start < tokens:
            for grid in self.grids:
                yield grid, start
                start += math.prod(grid)

    def _latent_rows(self, info: CodebookInfo, tokens: int) -> Array:
        """Return latents as rows (tokens, C)."""
        if self.data is None:
            rng = np.random.default_rng(self.seed)
            return rng.standard_normal((tokens, info.input_dim), np.float32)
        array = open_array(self.data)
        with of_file(self.data):
            latents_input(np.empty(0, array.dtype))
            layout = check_latents_shape(array.shape, self.layout, info=info)
        rows = np.moveaxis(_spread(array, tokens * info.input_dim), channel_axis(layout), -1)
        return self._repeated(rows.reshape(-1, info.input_dim), (tokens, info.input_dim))

    def _indices(self, info: CodebookInfo, tokens: int) -> Array:
        """Return indices (tokens,), of a residual codebook (tokens, q)."""
        shape = (tokens, info.num_quantizers) if info.has_stages else (tokens,)
        smallest = payload.numpy_dtype(payload.index_dtype(info.vocab_size))
        if self.data is None:
            sizes = info.stage_vocab_sizes or info.vocab_size
            return np.random.default_rng(self.seed).integers(sizes, size=shape).astype(smallest)
        array = open_array(self.data)
        with of_file(self.data):
            indices_input(np.empty(0, array.dtype))
        if not info.has_stages:
            return self._repeated(_spread(array, tokens), shape)
        with of_file(self.data):
            layout = check_indices_shape(array.shape, self.layout, info=info)
        rows = np.moveaxis(_spread(array, math.prod(shape)), channel_axis(layout), -1)
        return self._repeated(rows.reshape(-1, info.num_quantizers), shape)

    def _repeated(self, array: Array, shape: tuple[int, ...]) -> Array:
        if not array.size:
            raise InvalidShape("it holds no tokens", path=self.data)
        return np.resize(array, shape)


def _spread(array: NpyFile, elements: int) -> Array:
    """Return items spaced evenly over the first axis, with `elements` elements in all if there are that many.

    Evenly, because a file may be larger than memory, and sorted.
    """
    if not array.ndim or not array.size:
        return array[()]
    count = min(len(array), -(-elements * len(array) // array.size))
    return array.items(np.arange(count) * len(array) // count)


def grid_text(grid: Grid) -> str:
    """Return a grid as the command line takes it: 1x32x32."""
    return "x".join(map(str, grid))


def _request(source: ArrayInput, form: Form, grid: Grid, config: ClientConfig) -> Request:
    if form.is_cut:
        raise _too_large(grid, form.info, config)
    pin = Pin(form.info.name, None, target=config.target)
    [request] = ArrayCall(source, form, pin).requests()
    return Request(request.message(), math.prod(grid))


def _too_large(grid: Grid, info: CodebookInfo, config: ClientConfig) -> InvalidArgument:
    return InvalidArgument(
        f"a grid of {grid_text(grid)} or its reply does not fit a message of {config.max_message_bytes} bytes: "
        "take a smaller one, or let both sides take larger messages",
        target=config.target,
        codebook=info.name,
    )
