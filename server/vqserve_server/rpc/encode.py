"""Encode: latents to indices."""

from __future__ import annotations

import numpy as np

from vqserve import layout, payload
from vqserve.codebook_info import CodebookInfo
from vqserve.layout import LATENT_RANKS
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import check_latents_shape, check_num_quantizers
from vqserve_server.engine import EncodeJob, EncodeKey
from vqserve_server.engine.job import Deliver
from vqserve_server.errors import InvalidDtype
from vqserve_server.rpc.messages import check_dtype, check_latent_dtype, check_payload, layout_of
from vqserve_server.rpc.plan import Array, Plan
from vqserve_server.validation import check_finite


class EncodePlan(Plan[pb.EncodeRequest]):
    """What an EncodeRequest asks for."""

    request_type = pb.EncodeRequest

    def _read(self, head: pb.EncodeRequest, payload_bytes: int, info: CodebookInfo) -> None:
        check_latent_dtype(head.dtype)
        shape = check_payload(payload_bytes, head.dtype, head.shape, "latents", LATENT_RANKS)
        self._layout = check_latents_shape(shape, layout_of(head.layout), info=info)
        grid = layout.grid_shape(shape, self._layout)
        index_dtype = head.index_dtype or payload.index_dtype(info.vocab_size)
        check_dtype("index_dtype", index_dtype, payload.INDEX_DTYPES)
        if not payload.holds_vocabulary(index_dtype, info.vocab_size):
            name = payload.dtype_name(index_dtype)
            raise InvalidDtype(f"index_dtype {name} does not hold the vocabulary of {info.vocab_size} indices")
        count = check_num_quantizers(head.num_quantizers or None, available=info.num_quantizers)
        stages = count if info.has_stages else None
        self.rows = layout.num_rows(grid)
        self._takes(head.dtype, shape)
        self._gives(index_dtype, layout.indices_shape(grid, stages, self._layout), pb.EncodeResponse)
        widened = np.dtype(np.float64 if head.dtype == pb.DTYPE_FLOAT64 else np.float32)
        self._key = EncodeKey(self._tokenizer, widened, stages)

    def check(self, array: Array) -> None:
        """Look at the data.

        Raises:
            NonFiniteLatents: names the first NaN or infinity.
        """
        check_finite(array)

    def job(self, array: Array, *, deliver: Deliver, deadline: float | None) -> EncodeJob:
        """Return what the engine is to do."""
        blank, indices = self._blank_reply()
        return EncodeJob(self._key, array, self._layout, indices, owner=blank, deliver=deliver, deadline=deadline)
