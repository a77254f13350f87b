"""Batches requests and runs them on the device: threads and numpy, no grpc.

A request passes `Scheduler.check` (can it be in time?), `Admission.enter` (is there capacity?), `Scheduler.put` (into
the queue), a `Batch` with other requests, a device thread, and `Job.resolve`.
"""

from vqserve_server.access import CallerLimits
from vqserve_server.engine.admission import Admission
from vqserve_server.engine.batch import BatchFailed
from vqserve_server.engine.caller import Caller
from vqserve_server.engine.engine import Engine, LiveSet
from vqserve_server.engine.job import DecodeJob, DecodeKey, EncodeJob, EncodeKey, Job, RequestTiming
from vqserve_server.engine.watchdog import Watchdog

__all__ = [
    "Admission",
    "BatchFailed",
    "Caller",
    "CallerLimits",
    "DecodeJob",
    "DecodeKey",
    "EncodeJob",
    "EncodeKey",
    "Engine",
    "Job",
    "LiveSet",
    "RequestTiming",
    "Watchdog",
]
