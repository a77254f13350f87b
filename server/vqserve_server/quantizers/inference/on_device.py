"""A frozen quantizer, whose rows are tensors on a device, behind the interface of rows of numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.types import OutputName
from vqserve_server.device import Device, to_device, to_host
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.inference.served import Served, Sizes
from vqserve_server.quantizers.tensors import TORCH_DTYPES
from vqserve_server.search import SearchCounts
from vqserve_server.search.native import NativeBatch


@dataclass(frozen=True)
class OnDevice(Served):
    """A frozen quantizer.

    Attributes:
        frozen: takes and gives tensors on its device.
    """

    frozen: FrozenQuantizer

    @property
    def sizes(self) -> Sizes:
        """Its sizes."""
        return self.frozen

    @property
    def device(self) -> Device:
        """Where the tables are and the search runs."""
        return Device(self.frozen.device)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the codebook's elements, and of decoded rows."""
        return np.dtype(str(self.frozen.weight_dtype).removeprefix("torch."))

    @property
    def search_backend(self) -> str:
        """The name of the search backend; "none" where nothing is searched."""
        return self.frozen.search_backend

    @property
    def native_batch(self) -> NativeBatch | None:
        """The quantizer's."""
        return self.frozen.native_batch

    def counting(self, counts: SearchCounts) -> Self:
        """Return a copy whose searches add to counters."""
        return type(self)(self.frozen.counting([counts] * self.frozen.num_quantizers))

    def encode_rows(
        self, rows: npt.NDArray[np.floating[Any]], *, num_quantizers: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the indices of rows; see `Served.encode_rows`."""
        found = self.frozen.encode_rows(to_device(rows, self.frozen.device), num_quantizers=num_quantizers)
        indices: npt.NDArray[np.int64] = to_host(found).numpy()
        return indices

    def decode_rows(
        self, indices: npt.NDArray[np.int64], *, output: OutputName = "latents", dtype: npt.DTypeLike | None = None
    ) -> npt.NDArray[Any]:
        """Return the rows of indices; see `Served.decode_rows`."""
        wanted = None if dtype is None else TORCH_DTYPES[np.dtype(dtype)]
        rows = self.frozen.decode_rows(to_device(indices, self.frozen.device), output=output, dtype=wanted)
        return dtypes.to_numpy(to_host(rows))

    def check_itself(self) -> None:
        """See `Served.check_itself`."""
        self.frozen.check_itself()
