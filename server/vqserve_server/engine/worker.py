"""The threads that compute: batch after batch on the device, the next one staged meanwhile."""

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
    """One device thread and one stager.

    A batch that fails takes only its own requests with it. When the device is lost, or a thread dies of anything else,
    everything that waits fails with DeviceBroken and `on_broken` is called.
    """

    def __init__(self, pipeline: Pipeline, stats: EngineStats, *, on_broken: Callable[[DeviceBroken], None]) -> None:
        self._pipeline = pipeline
        self._stats = stats
        self._on_broken = on_broken
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in (("vqserve-device", self._compute_batches), ("vqserve-stager", self._stage_ahead))
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

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            self._break(error)

    def _compute_batches(self) -> None:
        while (batch := self._pipeline.next_for_device()) is not None:
            self._serve(batch)

    def _stage_ahead(self) -> None:
        while self._pipeline.stage_ahead():
            pass

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
        if not batch.drop_dead():
            return
        batch.stage()
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
