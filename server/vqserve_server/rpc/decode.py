"""Decode: indices to latents."""

from __future__ import annotations

from vqserve import layout, payload
from vqserve.codebook_info import CodebookInfo
from vqserve.layout import LATENT_RANKS, first_channels
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import INDEX_RANKS, check_has_output, check_indices_shape, check_num_quantizers
from vqserve_server.engine import DecodeJob, DecodeKey, Output
from vqserve_server.engine.job import Deliver
from vqserve_server.errors import InvalidOption
from vqserve_server.rpc.messages import check_dtype, check_index_dtype, check_payload, layout_of
from vqserve_server.rpc.plan import Array, Plan
from vqserve_server.validation import check_indices

_OUTPUTS: dict[int, Output] = {
    pb.DECODE_OUTPUT_UNSPECIFIED: "latents",
    pb.DECODE_OUTPUT_LATENTS: "latents",
    pb.DECODE_OUTPUT_CODE_ROWS: "code_rows",
}


class DecodePlan(Plan[pb.DecodeRequest]):
    """What a DecodeRequest asks for."""

    request_type = pb.DecodeRequest

    def _read(self, head: pb.DecodeRequest, payload_bytes: int, info: CodebookInfo) -> None:
        check_index_dtype(head.dtype)
        ranks = LATENT_RANKS if info.has_stages else INDEX_RANKS
        shape = check_payload(payload_bytes, head.dtype, head.shape, "indices", ranks)
        count = check_num_quantizers(head.num_quantizers or None, available=info.num_quantizers)
        self._layout = check_indices_shape(shape, layout_of(head.layout), info=info, num_quantizers=count)
        latent_dtype = head.latent_dtype or pb.DTYPE_FLOAT32
        check_dtype("latent_dtype", latent_dtype, payload.LATENT_DTYPES)
        if head.output not in _OUTPUTS:
            raise InvalidOption(f"unknown {{option}} {head.output}", option="output")
        check_has_output(_OUTPUTS[head.output], info=info)
        dtype = payload.numpy_dtype(latent_dtype)
        self._key = DecodeKey(self._tokenizer, _OUTPUTS[head.output], dtype, count if info.has_stages else None)
        grid = layout.grid_shape(shape, self._layout) if info.has_stages else shape
        self.rows = layout.num_rows(grid)
        self._takes(head.dtype, shape)
        latents_shape = layout.latents_shape(grid, self._key.channels, self._layout)
        self._gives(latent_dtype, latents_shape, pb.DecodeResponse)

    def array(self, data: memoryview) -> Array:
        """Return the array in a payload, a view: of a residual codebook, of the indices that are used."""
        every = super().array(data)
        count = self._key.num_quantizers
        return every if count is None else every[first_channels(count, self._layout)]

    def check(self, array: Array) -> None:
        """Look at the data.

        Raises:
            IndexOutOfRange: names the first offender.
        """
        check_indices(array, decodable=self._tokenizer.decodable)

    def job(self, array: Array, *, deliver: Deliver, deadline: float | None) -> DecodeJob:
        """Return what the engine is to do."""
        blank, latents = self._blank_reply()
        return DecodeJob(self._key, array, latents, self._layout, owner=blank, deliver=deliver, deadline=deadline)
