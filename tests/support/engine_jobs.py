"""Jobs whose outcome can be waited for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

from vqserve.layout import Layout
from vqserve_server.engine import DecodeJob, DecodeKey, EncodeJob, EncodeKey, Job


def _deliver(jobs: list[Job]) -> None:
    # A Future refuses a second outcome: nothing is delivered twice.
    for job in jobs:
        if isinstance(job.outcome, BaseException):
            job.tag.set_exception(job.outcome)
        else:
            job.tag.set_result(job.outcome)


class Jobs:
    """Makes jobs as the server's edge does."""

    def encode(self, tokenizer: Any, latents: np.ndarray, *, deadline: float | None = None) -> EncodeJob:
        """A job for rows (n, C)."""
        key = EncodeKey(tokenizer, np.dtype(np.float64 if latents.dtype == np.float64 else np.float32))
        indices = np.empty(len(latents), np.uint16)
        tag = Future()
        return EncodeJob(key, latents, Layout.CHANNELS_LAST, indices, deliver=_deliver, tag=tag, deadline=deadline)

    def decode(
        self,
        tokenizer: Any,
        indices: np.ndarray,
        latents: np.ndarray,
        layout: Layout = Layout.CHANNELS_LAST,
        *,
        output: Any = "latents",
    ) -> DecodeJob:
        """A job that writes `latents`."""
        return DecodeJob(
            DecodeKey(tokenizer, output, latents.dtype), indices, latents, layout, deliver=_deliver, tag=Future()
        )

    def result(self, job: Job, timeout: float | None = 60.0) -> Any:
        """Wait for a job's outcome, and raise it if it is an error."""
        return job.tag.result(timeout)

    def array(self, job: Job, timeout: float | None = 60.0) -> np.ndarray:
        """Wait for a job's outcome, and return what it has written."""
        self.result(job, timeout)
        return job.result
