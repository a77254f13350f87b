"""The metrics port of a server: what it counts, on the routes of one HTTP server."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Self

from vqserve.errors import StartError
from vqserve_server.access import Access
from vqserve_server.config import ServeConfig
from vqserve_server.event_log import event
from vqserve_server.metrics.collector import Collector, Sample
from vqserve_server.metrics.http import HttpServer, Request, Response, Route
from vqserve_server.metrics.present import Present, Processes
from vqserve_server.network import address, is_loopback, listen

logger = logging.getLogger(__name__)


class MetricsPort:
    """Shows the metrics of one server, of one process or of several."""

    def __init__(
        self,
        config: ServeConfig,
        access: Access,
        processes: Processes,
        memories: Sequence[memoryview],
        *,
        routes: Mapping[str, Route] | None = None,
        samples: Callable[[], Iterable[Sample]] = tuple,
    ) -> None:
        """Bind the port, if the settings have one; nothing is answered before it is entered.

        Args:
            config: the settings.
            access: the certificates.
            processes: whoever starts them keeps it up to date.
            memories: what each process counts in, by its number.
            routes: more of them, beside /metrics.
            samples: more of them, beside those that the memories have and that are known here.

        Raises:
            StartError: the port cannot be bound.
        """
        present = Present(config, access, processes)
        self._collector = Collector(memories, lambda: chain(present(), samples()))
        listener = _listener(config)
        self._server = None
        if listener is not None:
            self._server = HttpServer({"/metrics": self._metrics, **(routes or {})}, listener)

    def __enter__(self) -> Self:
        """Answer requests from now on."""
        if self._server is not None:
            self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()

    def worker_ended(self, number: int) -> None:
        """Forget what a worker had at the moment, and keep what it has counted."""
        self._collector.reset_gauges(number)

    def _metrics(self, request: Request) -> Response:
        body, content_type = self._collector.exposition(request.accept)
        return Response(body, content_type)


def _listener(config: ServeConfig) -> socket.socket | None:
    """Return a socket that is bound to the port; None: there is none.

    Raises:
        StartError: a port that the settings ask for cannot be bound.
    """
    metrics = config.metrics
    if not metrics.port or metrics.port in {config.rpc.port, config.access.health_port}:
        return None
    try:
        listener = listen(metrics.metrics_host, metrics.port, flag="--metrics-port")
    except StartError as error:
        if metrics.is_port_required:
            raise
        logger.warning(event("metrics_port_taken", port=metrics.port, reason=error.text()))
        return None
    if not is_loopback(metrics.metrics_host):
        risk = "no TLS and no tokens: who can reach the metrics port learns what is served, and how much"
        logger.warning(event("listening_openly", host=metrics.metrics_host, risk=risk))
    # An error of the start that comes after it is the only line of the log.
    logger.debug(event("metrics", address=address(metrics.metrics_host, metrics.port)))
    return listener
