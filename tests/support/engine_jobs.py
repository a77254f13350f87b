"""Jobs whose outcome can be waited for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

from vqserve.layout import Layout
from vqserve_server.engine import Caller, DecodeJob, DecodeKey, EncodeJob, EncodeKey, Job

CALLER = Caller("192.0.2.1")


class Jobs:
    """Makes jobs as the server's edge does."""

    def __init__(self) -> None:
        self._futures: dict[Job, Future[Any]] = {}

    def _make(self, kind: type[Job], *arguments: Any, **options: Any) -> Any:
        future: Future[Any] = Future()

        def on_done() -> None:
            # A second outcome of a Future is an error: nothing is delivered twice.
            if isinstance(job.outcome, BaseException):
                future.set_exception(job.outcome)
            else:
                future.set_result(job.outcome)

        job = kind(*arguments, on_done=on_done, **options)
        self._futures[job] = future
        return job

    def encode(
        self, tokenizer: Any, latents: np.ndarray, *, caller: Caller = CALLER, deadline: float | None = None
    ) -> EncodeJob:
        """A job for rows (n, C)."""
        key = EncodeKey(tokenizer, np.dtype(np.float64 if latents.dtype == np.float64 else np.float32))
        indices = np.empty(len(latents), np.uint16)
        return self._make(
            EncodeJob, key, caller, latents, indices, Layout.CHANNELS_LAST, rows=len(latents), deadline=deadline
        )

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
        key = DecodeKey(tokenizer, output, latents.dtype)
        return self._make(DecodeJob, key, CALLER, indices, latents, layout, rows=indices.size)

    def result(self, job: Job, timeout: float | None = 60.0) -> Any:
        """Wait for a job's outcome, and raise it if it is an error."""
        return self._futures[job].result(timeout)

    def array(self, job: Job, timeout: float | None = 60.0) -> np.ndarray:
        """Wait for a job's outcome, and return what it has written."""
        self.result(job, timeout)
        return job.result
