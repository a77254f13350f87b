"""What one process counts, samples and traces with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vqserve_server.access import Access
from vqserve_server.config import ServeConfig
from vqserve_server.metrics.memory import inherited_part, private_part
from vqserve_server.metrics.port import MetricsPort
from vqserve_server.metrics.present import Processes
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.metrics.store import METRICS, NBYTES
from vqserve_server.monitoring.port import metrics_port
from vqserve_server.search import SearchCounts
from vqserve_server.usage.live import LiveUsage
from vqserve_server.usage.memory import USAGE, USAGE_BYTES

if TYPE_CHECKING:
    from vqserve_server.rpc.tracing import Tracing


@dataclass(frozen=True)
class Instruments:
    """The instruments of one server.

    Attributes:
        metrics: counts what the server does.
        usage: samples the rows that are encoded; None: nobody asks for it.
        tracing: makes spans of requests; None: nobody asks for it.
    """

    metrics: Metrics = field(default_factory=Metrics)
    usage: LiveUsage | None = None
    tracing: Tracing | None = None


class ProcessInstruments:
    """The instruments of this process, in memory that its parent has made or in memory of its own.

    Attributes:
        instruments: them.
        processes: this process, as the only one.
    """

    def __init__(self, config: ServeConfig, environ: Mapping[str, str], *, worker: int | None) -> None:
        """Make them.

        Args:
            config: all settings.
            environ: environment variables, which tell a worker of the memory.
            worker: number of this process among several that share the port; None if it is the only one.

        Raises:
            ModuleNotFoundError: the packages for traces are not installed.
        """
        self._config = config
        memory = inherited_part(METRICS, environ)
        self._memory = private_part(NBYTES) if memory is None else memory
        self._usage_memory = inherited_part(USAGE, environ)
        if self._usage_memory is None and worker is None and config.metrics.samples_traffic:
            self._usage_memory = private_part(USAGE_BYTES)
        self.processes = Processes(pids={0: os.getpid()})
        self.instruments = Instruments(Metrics(self._memory), self._usage(), _tracing(config, worker))

    def port(self, access: Access) -> MetricsPort:
        """Bind the metrics port of this process, which is the only one.

        Raises:
            StartError: the port cannot be bound.
        """
        usage_memories = [] if self._usage_memory is None else [self._usage_memory]
        return metrics_port(self._config, access, self.processes, [self._memory], usage_memories)

    def search_counts(self, codebook: str) -> SearchCounts:
        """Return what counts the searches of a codebook in the metrics."""
        return _LiveCounts(self.instruments.metrics, codebook)

    def close(self) -> None:
        """Send the spans that are left."""
        if self.instruments.tracing is not None:
            self.instruments.tracing.close()

    def _usage(self) -> LiveUsage | None:
        if self._usage_memory is None:
            return None
        return LiveUsage(self._usage_memory, one_in=self._config.metrics.sample_one_in)


class _LiveCounts(SearchCounts):
    """Counts the searches of one codebook in the metrics."""

    def __init__(self, metrics: Metrics, codebook: str) -> None:
        super().__init__()
        self._metrics = metrics
        self._codebook = codebook
        metrics.add("rechecked_rows", 0, codebook=codebook)

    def add(self, *, rows: int = 0, rechecked: int = 0, arbitrated: int = 0) -> None:
        """Count the rows that the fast search left open: few batches have any."""
        del rows, arbitrated
        if rechecked:
            self._metrics.add("rechecked_rows", rechecked, codebook=self._codebook)


def _tracing(config: ServeConfig, worker: int | None) -> Tracing | None:
    if not config.traces.trace_endpoint:
        return None
    # Its packages are an extra.
    from vqserve_server.rpc.tracing import Tracing  # noqa: PLC0415

    return Tracing(config.traces, worker=worker)
