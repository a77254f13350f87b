"""The metrics port of a server with all that it shows: metrics, codebook health, and the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from vqserve_server.access import Access
from vqserve_server.config import ServeConfig
from vqserve_server.metrics.http import Problem, Request, Response, Route
from vqserve_server.metrics.port import MetricsPort
from vqserve_server.metrics.present import Processes
from vqserve_server.page import HEADERS, page_files
from vqserve_server.usage.health import HealthReader


def metrics_port(
    config: ServeConfig,
    access: Access,
    processes: Processes,
    memories: Sequence[memoryview],
    usage_memories: Sequence[memoryview],
) -> MetricsPort:
    """Bind the port, if the settings have one; nothing is answered before it is entered.

    Args:
        config: the settings.
        access: the certificates.
        processes: whoever starts them keeps it up to date.
        memories: what each process counts in, by its number.
        usage_memories: where each process counts sampled rows, likewise.

    Raises:
        StartError: the port cannot be bound.
    """
    health = HealthReader(usage_memories)
    return MetricsPort(config, access, processes, memories, routes=_routes(health), samples=health.samples)


def _routes(health: HealthReader) -> Mapping[str, Route]:
    def codebooks(request: Request) -> Response:
        return Response(json.dumps(health.as_json(), allow_nan=False).encode(), "application/json")

    return {"/codebooks.json": codebooks, **page_routes()}


def page_routes() -> Mapping[str, Route]:
    """Return the routes of the console."""
    files = page_files()

    def answer(request: Request) -> Response:
        if request.path not in files:
            raise Problem(HTTPStatus.NOT_FOUND, "the console has no such file")
        file = files[request.path]
        return Response(file.body, file.content_type, headers=HEADERS)

    return {"/": answer, "/page/": answer}
