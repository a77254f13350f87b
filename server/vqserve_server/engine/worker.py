"""The device threads: each computes one batch after another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from vqserve.errors import InvalidArgument
from vqserve_server.device import (
    DeviceStreams,
    free_cached_memory,
    is_device_failure,
    is_out_of_memory,
    wait_for_stream,
)
from vqserve_server.engine.admission import EngineStats
from vqserve_server.engine.batch import Batch, BatchFailed, Staging, no_memory
from vqserve_server.engine.caller import CANARY
from vqserve_server.engine.job import EncodeKey
from vqserve_server.engine.row_limits import RowLimits
from vqserve_server.engine.scheduler import Scheduler
from vqserve_server.event_log import event
from vqserve_server.usage.live import LiveUsage, RowSampler

logger = logging.getLogger(__name__)


class DeviceThread(NamedTuple):
    """What a thread that computes batches has of its own.

    Attributes:
        staging: memory for the rows.
        sampler: chooses the rows that are sampled; None: none are.
    """

    staging: Staging
    sampler: RowSampler | None


class Worker:
    """The device threads.

    On CUDA each has its own stream, so that the copies of one run beside the search of another. A batch that fails
    affects only its own requests; one for which there is too little memory is computed in smaller ones. When the
    device is lost, or a thread ends with any other error, `on_broken` is called with the error.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        stats: EngineStats,
        *,
        threads: int,
        on_broken: Callable[[BaseException], None],
        usage: LiveUsage | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._stats = stats
        self._usage = usage
        self._on_broken = on_broken
        self._limits = RowLimits()
        self._threads = [
            threading.Thread(target=self._run, name=f"vqserve-device-{i}", daemon=True) for i in range(threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end, after the scheduler was closed; return whether they have."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def device_thread(self) -> DeviceThread:
        """Return what a further thread needs that computes batches of the CPU."""
        return DeviceThread(Staging(), None if self._usage is None else self._usage.sampler())

    def serve(self, batch: Batch, of: DeviceThread) -> None:
        """Compute a batch and answer its jobs on the calling thread, which has that; no error leaves it."""
        try:
            self._serve(batch, of.staging, of.sampler)
        except BaseException as error:
            self._on_broken(error)

    def _run(self) -> None:
        streams, thread = DeviceStreams(), threading.current_thread().name
        staging, sampler = self.device_thread()
        try:
            while (batch := self._scheduler.next_batch(thread)) is not None:
                with streams.on(batch.key.tokenizer.device):
                    self._serve(batch, staging, sampler)
                # A thread that waits must not keep a batch, and with it a codebook that was replaced.
                del batch
        except BaseException as error:
            self._on_broken(error)

    def _serve(self, batch: Batch, staging: Staging, sampler: RowSampler | None) -> None:
        """Compute a batch and answer its jobs, in smaller batches where the whole cannot be computed."""
        left = [batch]
        while left:
            batch = left.pop(0)
            most = self._limits.of(batch.key)
            if most is not None and batch.rows > most:
                left[:0] = batch.pieces(most)
                continue
            instead = self._compute(batch, staging, sampler)
            if instead is not None:
                left[:0] = instead
                continue
            free_cached_memory(batch.key.tokenizer.device)
            most = self._limits.lower(batch.key, batch.rows)
            fields = {"codebook": batch.key.tokenizer.info.name, "rows": batch.rows}
            if most is not None:
                logger.warning(event("out_of_memory", **fields, retried_rows=most))
                left.insert(0, batch)
            else:
                logger.error(event("out_of_memory", **fields, failed_requests=len(batch.parts)))
                self._stats.count_failed()
                for failed in (batch, *left):
                    failed.fail(no_memory())
                return

    def _compute(self, batch: Batch, staging: Staging, sampler: RowSampler | None) -> list[Batch] | None:
        """Compute a batch and answer its jobs; return the batches that are to be computed in its place.

        It returns None, and no job has an answer, if there was too little memory. The caller goes on from there: the
        traceback, which keeps the memory of the failed attempt, is gone by then.
        """
        try:
            started = time.monotonic()
            batch.compute(staging)
            ended = time.monotonic()
            complete = batch.finish(started=started, ended=ended)
            # Count before the replies are sent: a caller with a reply finds its request in the counters.
            if len(batch.parts) > 1 or batch.parts[0].job.caller is not CANARY:
                requests, seconds = len(batch.parts), ended - started
                self._stats.count(requests=requests, rows=batch.rows, finished=len(complete), seconds=seconds)
                # All jobs of a batch have the same metrics, but the canary.
                metrics = batch.parts[0].job.metrics or batch.parts[-1].job.metrics
                if metrics is not None:
                    metrics.computed(requests, batch.rows, seconds)
                if batch.expired:
                    self._stats.count_expired(batch.expired, "device")
            # Last, all together: the threads of the callers compete with this one.
            for job, timing in complete:
                job.resolve(timing)
            if sampler is not None and isinstance(batch.key, EncodeKey):
                chosen = sampler.choose(batch.rows)
                if chosen:
                    self._record(batch, chosen)
        except Exception as error:
            if is_device_failure(error):
                raise
            # Kernels of the failed batch may still read its codebook, which may be freed after this.
            wait_for_stream(batch.key.tokenizer.device)
            if is_out_of_memory(error):
                return None
            if not isinstance(error, InvalidArgument):
                self._stats.count_failed()
                logger.exception(event("batch_failed", requests=len(batch.parts)))
                batch.fail(BatchFailed("the computation failed"))
            # Validation cannot find a projection that exceeds float32's range: it depends on the codebook's weights.
            elif len(batch.parts) == 1:
                batch.reject(error)
            else:
                return batch.split()
        return []

    def _record(self, batch: Batch, chosen: list[int]) -> None:
        """Let chosen rows of an encode batch be counted, after it was answered: an error here fails no request."""
        if self._usage is None:
            return
        tokenizer = batch.key.tokenizer
        try:
            sample = batch.sample(chosen)
            if sample is not None:
                self._usage.record(tokenizer, *sample)
        except Exception as error:
            if is_device_failure(error):
                raise
            # The next sample may find enough memory.
            if not is_out_of_memory(error):
                self._usage.forget(tokenizer)
                logger.exception(event("usage_failed", codebook=tokenizer.info.name))
