"""A request of the server's own, whose answer is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vqserve.errors import VqserveError
from vqserve.layout import Layout
from vqserve_server.engine.caller import CANARY
from vqserve_server.engine.job import EncodeJob, EncodeKey

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer
    from vqserve_server.tokenizer.probe import Probe


class Canary:
    """One encode of a codebook's probe. Its job goes through the same queue, and in the same batches, as all others.

    Attributes:
        codebook: name of the codebook.
        job: to be queued.
    """

    def __init__(self, tokenizer: Tokenizer, probe: Probe) -> None:
        self.codebook = tokenizer.info.name
        self._expected = probe.indices
        self._found = np.full(probe.indices.shape, -1, np.int64)
        info = tokenizer.info
        key = EncodeKey(tokenizer, probe.rows.dtype, info.num_quantizers if info.has_stages else None)
        self.job = EncodeJob(
            key, CANARY, probe.rows, self._found, Layout.CHANNELS_LAST, rows=len(probe.rows), on_done=_nothing
        )

    @property
    def is_done(self) -> bool:
        """Whether the job has its outcome."""
        return self.job.outcome is not None

    @property
    def has_failed(self) -> bool:
        """Whether the computation has failed; a server that was too busy, or stops, has not failed."""
        return isinstance(self.job.outcome, BaseException) and not isinstance(self.job.outcome, VqserveError)

    @property
    def wrong_rows(self) -> int:
        """How many rows have another answer than the known one."""
        if isinstance(self.job.outcome, BaseException):
            return 0
        return int((self._found != self._expected).reshape(len(self._expected), -1).any(axis=1).sum())


def _nothing() -> None:
    pass
