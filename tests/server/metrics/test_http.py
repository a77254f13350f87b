"""The HTTP server of the metrics port: what it answers, and that no caller keeps it from answering others."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from support.waiting import eventually
from vqserve_server.metrics import http as metrics_http
from vqserve_server.metrics.http import HttpServer, Problem, Request, Response
from vqserve_server.network import listen

BODY = b"what there is\n"


def answer(request: Request) -> Response:
    return Response(BODY)


def big(request: Request) -> Response:
    return Response(b"x" * (8 << 20))


def broken(request: Request) -> Response:
    raise RuntimeError("a secret")


def picky(request: Request) -> Response:
    raise Problem(HTTPStatus.NOT_FOUND, f"no {request.path}")


ROUTES = {"/": answer, "/metrics": answer, "/page/": picky, "/big": big, "/broken": broken}


@pytest.fixture
def server() -> Iterator[HttpServer]:
    listener = listen("127.0.0.1", 0, flag="--metrics-port")
    port = listener.getsockname()[1]
    server = HttpServer(ROUTES, listener)
    server.start()
    yield server
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.fixture
def port(server: HttpServer) -> int:
    return server._listener.getsockname()[1]


def get(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())


def exchange(port: int, request: bytes) -> bytes:
    """Return all that the server answers to some bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(1 << 16):
                received += more
        return received


def test_a_path_is_answered_with_headers_that_trust_nobody(port: int) -> None:
    status, body, headers = get(port, "/metrics?now=1")
    assert (status, body) == (200, BODY)
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["Connection"] == "close"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    # A page of another origin can read nothing.
    assert not any(name.lower().startswith("access-control-") for name in headers)


def test_head_has_no_body(port: int) -> None:
    status, body, headers = get(port, method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(BODY)))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get"])
def test_other_methods_are_refused(port: int, method: str) -> None:
    status, _, headers = get(port, method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/none", "/metrics/", "/metrics/x", "/pages", "//", "/../etc/passwd", "*", "x"])
def test_other_paths_do_not_exist(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_a_folder_answers_for_what_is_in_it(port: int) -> None:
    assert get(port, "/")[1] == BODY
    assert get(port, "/page/style.css")[:2] == (404, b"no /page/style.css\n")
    assert get(port, "/page/../metrics")[0] == 404


def test_an_error_of_a_route_stays_in_the_log(port: int, caplog: pytest.LogCaptureFixture) -> None:
    status, body, _ = get(port, "/broken")
    assert status == 500
    assert b"secret" not in body
    assert "RuntimeError: a secret" in caplog.text


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9464", "127.0.0.1", "127.0.0.1:1", "[::1]:9464", "10.0.0.7:9464"]
)
def test_its_own_addresses_are_hosts(port: int, host: str) -> None:
    assert get(port, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9464", "localhost.evil.example", "", "127.0.0.1.nip.io"]
)
def test_a_name_of_somebody_else_is_refused(port: int, host: str) -> None:
    # A page of evil.example whose name leads here now (DNS rebinding) must read nothing.
    assert get(port, Host=host)[0] == 421


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /metr\xffcs HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\ncookie: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"x" * 100_000, 431),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\nGET /broken HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    ],
)
def test_what_is_not_quite_a_request_is_answered_all_the_same(port: int, request_bytes: bytes, status: int) -> None:
    received = exchange(port, request_bytes)
    assert received.startswith(f"HTTP/1.1 {status} ".encode())
    assert received.count(b"HTTP/1.1 ") == 1
    assert get(port)[0] == 200


def test_a_caller_that_sends_slowly_is_cut_off(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "_READ_S", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_a_caller_that_reads_nothing_is_cut_off(server: HttpServer, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "_WRITE_S", 0.2)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4, socket.MSG_PEEK) == b"HTTP"
        eventually(lambda: not server._connections)


def test_callers_that_do_nothing_keep_nobody_waiting(port: int) -> None:
    with contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            for _ in range(3 * metrics_http._MOST_CONNECTIONS)
        ]
        for connection in idle:
            # The server may have closed it for a later one.
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /me")
        for _ in range(20):
            assert get(port)[0] == 200
        # The first ones were closed for the last ones.
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""


def test_callers_that_connect_all_at_once_are_not_more_than_the_limit(server: HttpServer, port: int) -> None:
    with contextlib.ExitStack() as stack:
        held, resume = threading.Event(), threading.Event()
        # Connections that wait in the kernel are accepted together.
        for _ in range(3):
            held.clear()
            resume.clear()
            server._loop.call_soon_threadsafe(lambda: (held.set(), resume.wait(60)))
            assert held.wait(60)
            for _ in range(90):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            resume.set()
            assert get(port)[0] == 200
        assert len(server._connections) <= metrics_http._MOST_CONNECTIONS


def test_many_callers_at_once_are_all_answered(port: int) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(get(port)[0])) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 40
