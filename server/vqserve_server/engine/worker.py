"""The thread that computes: batch after batch on the device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from vqserve_server.engine.batch import Batch
from vqserve_server.engine.device_failure import is_device_failure
from vqserve_server.engine.pipeline import Pipeline
from vqserve_server.engine.stats import EngineStats
from vqserve_server.errors import DeviceBroken, InvalidRequest

logger = logging.getLogger(__name__)


class BatchFailed(RuntimeError):
    """The computation failed for a reason that is not the caller's; the log has it."""


class Worker:
    """One device thread.

    A batch that fails takes only its own requests with it. When the device is lost, or the thread dies of anything
    else, everything that waits fails with DeviceBroken and `on_broken` is called.
    """

    def __init__(self, pipeline: Pipeline, stats: EngineStats, *, on_broken: Callable[[DeviceBroken], None]) -> None:
        self._pipeline = pipeline
        self._stats = stats
        self._on_broken = on_broken
        self._thread = threading.Thread(target=self._guard, name="vqserve-device", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, which it does when the pipeline is closed; return whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _guard(self) -> None:
        try:
            while self._serve_next():
                pass
        except BaseException as error:
            self._break(error)

    def _serve_next(self) -> bool:
        # A call of its own, so that a thread that waits holds no batch, and so no codebook that was replaced.
        batch = self._pipeline.next_for_device()
        if batch is None:
            return False
        self._serve(batch)
        return True

    def _serve(self, batch: Batch) -> None:
        try:
            self._run(batch)
        except InvalidRequest as error:
            # Only what depends on the codebook's weights shows this late: a projection that leaves float32's range.
            if len(batch.parts) == 1:
                batch.fail(error)
                return
            for alone in batch.split():
                self._serve(alone)
        except Exception as error:
            if is_device_failure(error):
                raise
            self._stats.failed_batches += 1
            logger.exception("a batch of %d requests failed", len(batch.parts))
            batch.fail(BatchFailed("the computation failed"))

    def _run(self, batch: Batch) -> None:
        started = time.monotonic()
        results = batch.compute()
        ended = time.monotonic()
        finished = batch.reply(results, started=started, ended=ended)
        self._stats.count(requests=len(batch.parts), rows=batch.rows, finished=finished, seconds=ended - started)

    def _break(self, error: BaseException) -> None:
        logger.critical("the device failed: no more requests are served", exc_info=error)
        broken = DeviceBroken("the device failed")
        self._pipeline.close(broken, drop=True)
        self._on_broken(broken)
