"""The threads that compute: each of them batch after batch on the device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from vqserve_server.device import DeviceStreams, is_device_failure, wait_for_stream
from vqserve_server.engine.admission import EngineStats
from vqserve_server.engine.batch import Batch, BatchFailed, Staging
from vqserve_server.engine.scheduler import Pipeline
from vqserve_server.errors import DeviceBroken, InvalidRequest

logger = logging.getLogger(__name__)


class Worker:
    """The device threads.

    On CUDA each has a stream of its own, so that one's copies run beside another's search. A batch that fails takes
    only its own requests with it. When the device is lost, or a thread dies of anything else, everything that waits
    fails with DeviceBroken and `on_broken` is called.
    """

    def __init__(
        self, pipeline: Pipeline, stats: EngineStats, *, threads: int, on_broken: Callable[[DeviceBroken], None]
    ) -> None:
        self._pipeline = pipeline
        self._stats = stats
        self._on_broken = on_broken
        self._threads = [
            threading.Thread(target=self._guard, name=f"vqserve-device-{i}", daemon=True) for i in range(threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end, which they do when the pipeline is closed; return whether they have."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def _guard(self) -> None:
        try:
            streams, staging = DeviceStreams(), Staging()
            while self._serve_next(streams, staging):
                pass
        except BaseException as error:
            self._break(error)

    def _serve_next(self, streams: DeviceStreams, staging: Staging) -> bool:
        # A call of its own, so that a thread that waits holds no batch, and so no codebook that was replaced.
        batch = self._pipeline.next_for_device()
        if batch is None:
            return False
        with streams.on(batch.key.tokenizer.device):
            self._serve(batch, staging)
        return True

    def _serve(self, batch: Batch, staging: Staging) -> None:
        try:
            self._run(batch, staging)
        except Exception as error:
            if is_device_failure(error):
                raise
            # Before its codebook may go: kernels of a batch that failed half way read it still.
            wait_for_stream(batch.key.tokenizer.device)
            if not isinstance(error, InvalidRequest):
                self._stats.count_failed()
                logger.exception("a batch of %d requests failed", len(batch.parts))
                batch.fail(BatchFailed("the computation failed"))
            # Only what depends on the codebook's weights shows this late: a projection that leaves float32's range.
            elif len(batch.parts) == 1:
                batch.refuse(error)
            else:
                for alone in batch.split():
                    self._serve(alone, staging)

    def _run(self, batch: Batch, staging: Staging) -> None:
        started = time.monotonic()
        batch.compute(staging)
        ended = time.monotonic()
        # First: whoever has a reply finds it counted.
        self._stats.count(requests=len(batch.parts), rows=batch.rows, finished=batch.completes, seconds=ended - started)
        batch.finish(started=started, ended=ended)

    def _break(self, error: BaseException) -> None:
        logger.critical("the device failed: no more requests are served", exc_info=error)
        broken = DeviceBroken("the device failed")
        self._pipeline.close(broken, drop=True)
        self._on_broken(broken)
