"""A Decode request from message to job, and its result back."""

from __future__ import annotations

import numpy as np

from vqserve import layout, payload
from vqserve.codebook_info import CodebookInfo
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import DecodeJob, Output, Served
from vqserve_server.errors import InvalidOption
from vqserve_server.rpc.array_call import ArrayCall
from vqserve_server.rpc.messages import array_of, check_dtype, layout_of, numpy_dtype, stats_of
from vqserve_server.validation import check_indices, check_indices_shape

_OUTPUTS: dict[int, Output] = {
    pb.DECODE_OUTPUT_UNSPECIFIED: "latents",
    pb.DECODE_OUTPUT_LATENTS: "latents",
    pb.DECODE_OUTPUT_CODE_ROWS: "code_rows",
}


class DecodeCall(ArrayCall[pb.DecodeRequest]):
    """Indices to latents."""

    request_type = pb.DecodeRequest

    def _read(self, request: pb.DecodeRequest, info: CodebookInfo) -> None:
        check_dtype("dtype", request.dtype, payload.INDEX_DTYPES)
        self._indices = array_of(request.indices, request.dtype, request.shape, range(1, 5))
        self._layout = check_indices_shape(self._indices, layout_of(request.layout), info=info)
        self._latent_dtype = request.latent_dtype or pb.DTYPE_FLOAT32
        check_dtype("latent_dtype", self._latent_dtype, payload.LATENT_DTYPES)
        if request.output not in _OUTPUTS:
            raise InvalidOption(f"unknown output {request.output}")
        self._output = _OUTPUTS[request.output]
        channels = info.code_dim if self._output == "code_rows" else info.output_dim
        self._shape = layout.latents_shape(self._indices.shape, channels, self._layout)
        self.rows = layout.num_rows(self._indices.shape)
        self.reply_bytes = self.rows * channels * payload.itemsize(self._latent_dtype)

    def check(self) -> None:
        """Look at the data.

        Raises:
            IndexOutOfRange: names the first offender.
        """
        check_indices(self._indices, decodable=self._tokenizer.decodable)

    def job(self, deadline: float | None) -> DecodeJob:
        """Return what the engine is to do."""
        latents = np.empty(self._shape, numpy_dtype(self._latent_dtype))
        return DecodeJob(self._tokenizer, self._indices, latents, self._layout, output=self._output, deadline=deadline)

    def reply(self, served: Served, total_us: int) -> bytes:
        """Return the reply."""
        return pb.DecodeResponse(
            digest=self._tokenizer.info.digest,
            dtype=self._latent_dtype,
            shape=self._shape,
            stats=stats_of(served, total_us),
            latents=payload.to_bytes(served.array, self._latent_dtype),
        ).SerializeToString()
