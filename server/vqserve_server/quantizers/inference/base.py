"""The base of quantizers prepared for serving: they never change, so everything is prepared once."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqserve.types import OutputName
from vqserve_server.quantizers.inference.served import Sizes
from vqserve_server.quantizers.tensors import autocast_off
from vqserve_server.search import SearchCounts
from vqserve_server.search.native import NativeBatch

if TYPE_CHECKING:
    from vqserve_server.quantizers.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenQuantizer(Sizes, ABC):
    """A quantizer that serves, on one device, made by `freeze`. It is thread-safe and can be pickled.

    Attributes:
        weight_dtype: the type of decoded rows.
        device: where rows, indices and tables are.
    """

    weight_dtype: torch.dtype
    device: torch.device

    @property
    def native_batch(self) -> NativeBatch | None:
        """What reads and writes the arrays of requests itself; None: this quantizer takes and gives rows only."""
        return None

    @property
    @abstractmethod
    def search_backend(self) -> str:
        """The name of the search backend; "none" where nothing is searched."""

    @abstractmethod
    def encode_rows(self, rows: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        """Return the indices of every row, the same as the quantizer's `encode`.

        Args:
            rows: (n, C) float32 or float64 on the device, finite.
            num_quantizers: how many of a residual quantizer's indices to give, in [1, all]; None: all.

        Returns:
            int64 on the device: (n,), of a residual quantizer (n, num_quantizers).

        Raises:
            TokenBeyondRange: a token leaves float32's range on its way to the codes; its `row` is the first such.
        """

    def counting(self, counts: Sequence[SearchCounts]) -> FrozenQuantizer:
        """Return a copy for measurements, whose searches add to counters.

        Args:
            counts: one for each of a token's indices. They stay as they are where nothing is searched.
        """
        return self

    @abstractmethod
    def decode_rows(
        self, indices: Tensor, *, output: OutputName = "latents", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a row for every token, the same as the quantizer's `decode` and `get_codebook_entry`.

        Args:
            indices: int64 on the device, in [0, decodable), or where the stages differ in [0, stage_vocab_sizes[i]),
                checked by the caller: (n,), of a residual quantizer (n, q) with the first q indices of each token.
            output: "latents" or "code_rows".
            dtype: the type that the caller will round the rows to; a hint.

        Returns:
            (n, output_dim) latents or (n, D) code rows on the device, finite: in the weight's type, or already rounded
            to `dtype`, each value once, where a table of rounded rows can be used.

        Raises:
            InvalidOption: for any other output, and for code rows of a residual quantizer, which has none.
        """

    @abstractmethod
    def check_itself(self) -> None:
        """Self-test: encode a sample of the codes; each must get its own index, or that of an equally good code.

        Raises:
            CodebookError: one did not: this codebook would give wrong tokens on this machine.
        """


@torch.no_grad()
def freeze(
    quantizer: Quantizer, *, device: torch.device | str, search: str = "auto", shares_memory: bool = False
) -> FrozenQuantizer:
    """Return a quantizer prepared for serving, as it is now; later changes of it have no effect.

    Args:
        quantizer: any quantizer, on any device.
        device: where to serve it.
        search: the search backend, one of `vqserve_server.search.available(device)`, or "auto".
        shares_memory: whether the result may use the quantizer's memory; then the quantizer must be on the CPU and not
            change any more.

    Raises:
        InvalidOption: the backend does not run on the device.
        CodebookError: the codes or the projection contain NaN or infinity, or decoding leaves float32's range.
    """
    # What depends on the codebook alone is computed on the CPU, whatever the device.
    source_device = torch.device("cpu")
    device = torch.device(device)
    # The caller may have set another default device, autocast or inference mode: none of them may have an effect.
    with source_device, autocast_off(source_device), autocast_off(device), torch.inference_mode(False):
        source = quantizer if shares_memory else copy.deepcopy(quantizer).to(source_device)
        return source.frozen(device, search)
