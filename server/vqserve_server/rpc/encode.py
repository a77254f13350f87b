"""An Encode request from message to job, and its result back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import bfloat16, layout, payload
from vqserve.codebook_info import CodebookInfo
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import EncodeJob, Served
from vqserve_server.errors import InvalidDtype
from vqserve_server.rpc.array_call import ArrayCall
from vqserve_server.rpc.messages import array_of, check_dtype, layout_of, numpy_dtype, stats_of
from vqserve_server.validation import check_finite, check_latents

_BFLOAT16_EXPONENT = np.uint16(0x7F80)


class EncodeCall(ArrayCall[pb.EncodeRequest]):
    """Latents to indices."""

    request_type = pb.EncodeRequest

    def _read(self, request: pb.EncodeRequest, info: CodebookInfo) -> None:
        check_dtype("dtype", request.dtype, payload.LATENT_DTYPES)
        self._latents = array_of(request.latents, request.dtype, request.shape, range(2, 6))
        self._layout = check_latents(self._latents, layout_of(request.layout), info=info)
        self._grid = layout.grid_shape(self._latents.shape, self._layout)
        self._index_dtype = request.index_dtype or payload.index_dtype(info.vocab_size)
        check_dtype("index_dtype", self._index_dtype, payload.INDEX_DTYPES)
        if not payload.holds_vocabulary(self._index_dtype, info.vocab_size):
            name = payload.dtype_name(self._index_dtype)
            raise InvalidDtype(f"index_dtype {name} does not hold the vocabulary of {info.vocab_size} indices")
        self.rows = layout.num_rows(self._grid)
        self.reply_bytes = self.rows * payload.itemsize(self._index_dtype)

    def check(self) -> None:
        """Look at the data.

        Raises:
            NonFiniteLatents: names the first NaN or infinity.
        """
        check_finite_payload(self._latents)

    def job(self, deadline: float | None) -> EncodeJob:
        """Return what the engine is to do."""
        indices = np.empty(self._grid, numpy_dtype(self._index_dtype))
        return EncodeJob(self._tokenizer, self._latents, self._layout, indices, deadline=deadline)

    def reply(self, served: Served, total_us: int) -> bytes:
        """Return the reply."""
        return pb.EncodeResponse(
            digest=self._tokenizer.info.digest,
            dtype=self._index_dtype,  # type: ignore[arg-type]
            shape=self._grid,
            stats=stats_of(served, total_us),
            indices=payload.to_bytes(served.array, self._index_dtype),
        ).SerializeToString()


def check_finite_payload(latents: npt.NDArray[Any]) -> None:
    """Refuse latents with NaN or infinity; uint16 is bfloat16's bit patterns.

    Raises:
        NonFiniteLatents: names the first one's position.
    """
    if latents.dtype != np.uint16:
        check_finite(latents)
    elif ((latents & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any():
        check_finite(bfloat16.widen(latents))
