"""The HTTP server of the metrics port: GET of a few paths, on a thread of its own.

It takes nothing from callers but a path and three headers, keeps no connection, and holds few of them for a few
seconds, so that callers who send or read slowly keep nobody else waiting.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from types import MappingProxyType

from vqserve_server.event_log import event
from vqserve_server.network import is_address, is_loopback

# A request is a line and some headers. A browser sends cookies of other servers of the machine, too.
_MOST_HEAD_BYTES = 16 << 10
# Seconds to receive a request, and to send a response.
_READ_S, _WRITE_S = 5.0, 10.0
# Open connections; above that the oldest is closed.
_MOST_CONNECTIONS = 64
# For every response; a page's own headers come after these.
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_METHODS = ("GET", "HEAD")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A request that is well-formed, and for this server.

    Attributes:
        path: as it was sent, without the query.
        accept: the media types that the caller takes.
    """

    path: str
    accept: str = ""


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        body: the content.
        content_type: its media type.
        status: of HTTP.
        headers: more of them, or others in place of the usual ones.
    """

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


# Answers requests for a path, in milliseconds: all requests share one thread.
Route = Callable[[Request], Response]


class Problem(Exception):
    """A request that is not answered: a route may raise it, too."""

    def __init__(self, status: HTTPStatus, text: str, **headers: str) -> None:
        super().__init__(text)
        self.response = Response(f"{text}\n".encode(), status=status, headers=headers)


class HttpServer:
    """Answers requests by a table of routes."""

    def __init__(self, routes: Mapping[str, Route], listener: socket.socket) -> None:
        """Make the server; nothing is answered before `start`.

        Args:
            routes: by path. One that ends with "/" is for the paths below it, too, but "/" itself.
            listener: a socket that listens; the server closes it.
        """
        self._routes = routes
        self._listener = listener
        # A page of the web could reach this port by a name of its own (DNS rebinding), but not by an address.
        self._any_host = not is_loopback(listener.getsockname()[0])
        self._connections: dict[asyncio.Task[None], None] = {}
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vqserve-metrics", daemon=True)

    def start(self) -> None:
        """Answer requests from now on."""
        self._listener.setblocking(False)
        self._thread.start()

    def close(self) -> None:
        """Answer no more, after `start`; what is being answered is cut off."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def answer(self, head: bytes) -> Response:
        """Return the response for the request line and the headers of a request."""
        try:
            request = self._parsed(head)
            return self._route(request.path)(request)
        except Problem as problem:
            return problem.response
        except Exception:
            logger.exception(event("metrics_failed"))
            return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the server's log says what went wrong").response

    def _parsed(self, head: bytes) -> Request:
        line, _, rest = head.partition(b"\r\n")
        try:
            method, target, version = line.decode("ascii").split(" ")
            headers = http.client.parse_headers(io.BytesIO(rest))
        except (ValueError, http.client.HTTPException):
            raise Problem(HTTPStatus.BAD_REQUEST, "this is not a request of HTTP/1.1") from None
        if version not in {"HTTP/1.0", "HTTP/1.1"}:
            raise Problem(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this server speaks HTTP/1.1")
        if method not in _METHODS:
            raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, "this server answers GET only", Allow=", ".join(_METHODS))
        hosts = headers.get_all("Host", [])
        if len(hosts) > 1 or (version == "HTTP/1.1" and not hosts):
            raise Problem(HTTPStatus.BAD_REQUEST, "a request has one Host header")
        if hosts and not self._is_own(hosts[0]):
            raise Problem(HTTPStatus.MISDIRECTED_REQUEST, "this server is not that host: use its address")
        return Request(target.partition("?")[0], headers.get("Accept", ""))

    def _route(self, path: str) -> Route:
        folder = path[: path.rfind("/") + 1]
        for known in (path, folder):
            if known in self._routes and (known == path or known != "/"):
                return self._routes[known]
        raise Problem(HTTPStatus.NOT_FOUND, f"there is nothing here but {', '.join(sorted(self._routes))}")

    def _is_own(self, host: str) -> bool:
        """Return whether a Host header is for this server."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return self._any_host or name == "localhost" or is_address(name.removeprefix("[").removesuffix("]"))

    def _run(self) -> None:
        try:
            # A task: `close` may come before it, and would stop a loop that has to complete it.
            listening = self._loop.create_task(self._listen())
            self._loop.run_forever()
        finally:
            for task in {listening, *asyncio.all_tasks(self._loop)}:
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
            self._listener.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._listener, limit=_MOST_HEAD_BYTES)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close the connection."""
        task = asyncio.current_task()
        if task is None:
            return
        self._connections[task] = None
        if len(self._connections) > _MOST_CONNECTIONS:
            # At once: many may be accepted before it has ended.
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        try:
            head, response = await self._received(reader)
            async with asyncio.timeout(_WRITE_S):
                # Until the caller has all: what is only buffered would be held without an end.
                writer.transport.set_write_buffer_limits(0)
                writer.write(_written(response, with_body=not head.startswith(b"HEAD ")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.CancelledError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self._connections.pop(task, None)

    async def _received(self, reader: asyncio.StreamReader) -> tuple[bytes, Response]:
        try:
            async with asyncio.timeout(_READ_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return b"", Problem(HTTPStatus.REQUEST_TIMEOUT, "the request took too long").response
        except asyncio.LimitOverrunError:
            return b"", Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long").response
        return head, self.answer(head)


def _written(response: Response, *, with_body: bool) -> bytes:
    headers = {
        "Date": formatdate(usegmt=True),
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        **_HEADERS,
        **response.headers,
    }
    lines = [f"HTTP/1.1 {response.status.value} {response.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (response.body if with_body else b"")
