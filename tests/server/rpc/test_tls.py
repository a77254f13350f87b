"""TLS on a real port: who gets in, who does not, and certificates that change under load."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.certificates import Authority, Folder, Pair, connect, free_port, replace
from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from vqserve_client.cli import main as vqserve

LATENTS = np.zeros((3, 4), np.float32)
_TOMORROW = datetime.now(UTC) + timedelta(days=1)
REQUEST = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=LATENTS.shape, latents=LATENTS.tobytes())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def clients() -> Authority:
    return Authority()


@pytest.fixture
def folder(tmp_path: Any, authority: Authority, clients: Authority) -> Folder:
    made = Folder(tmp_path)
    made.put(authority.issue())
    replace(made.client_ca, clients.pem)
    return made


def encode(target: str, ca: bytes, pair: Pair | None = None) -> list[int]:
    with connect(target, ca, pair) as channel:
        reply = TokenizerServiceStub(channel).Encode(REQUEST, timeout=30)
        return list(reply.shape)


def refused(target: str, ca: bytes, pair: Pair | None = None) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        encode(target, ca, pair)
    code: grpc.StatusCode = caught.value.code()
    return code


def test_who_trusts_the_server_gets_in(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    target = serving(fake(), **folder.settings()).target
    assert encode(target, authority.pem) == [3]


def test_who_does_not_trust_the_server_does_not(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    target = serving(fake(), **folder.settings()).target
    assert refused(target, Authority().pem) is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        TokenizerServiceStub(channel).Encode(REQUEST, timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert encode(target, authority.pem) == [3]


def test_a_certificate_for_another_name(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    folder.put(authority.issue("elsewhere.example"))
    target = serving(fake(), **folder.settings()).target
    assert refused(target, authority.pem) is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_that_expired_while_it_was_served(
    serving: Callable[..., Any],
    fake: Callable[..., Any],
    folder: Folder,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder.put(authority.issue(days=-1))
    monkeypatch.setattr("vqserve_server.access.certificates._expiry", lambda path, chain: _TOMORROW)
    target = serving(fake(), **folder.settings()).target
    assert refused(target, authority.pem) is grpc.StatusCode.UNAVAILABLE


def test_clients_with_the_right_certificate_get_in_and_no_others(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority, clients: Authority
) -> None:
    target = serving(fake(), **folder.settings(mutual=True)).target
    assert encode(target, authority.pem, clients.issue("trainer")) == [3]
    for pair in (None, authority.issue("trainer"), clients.issue("trainer", days=-1)):
        assert refused(target, authority.pem, pair) is grpc.StatusCode.UNAVAILABLE
    assert encode(target, authority.pem, clients.issue("trainer")) == [3]


def test_the_authority_of_clients_can_change(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority, clients: Authority
) -> None:
    target = serving(fake(), **folder.settings(mutual=True)).target
    others = Authority()
    old, new = clients.issue("trainer"), others.issue("trainer")
    assert encode(target, authority.pem, old) == [3]
    replace(folder.client_ca, others.pem)
    assert refused(target, authority.pem, old) is grpc.StatusCode.UNAVAILABLE
    assert encode(target, authority.pem, new) == [3]


def served(target: str) -> bytes:
    """Return the certificate that a new connection gets."""
    host, _, port = target.rpartition(":")
    return b"".join(ssl.get_server_certificate((host, int(port))).encode().split())


def leaf(pair: Pair) -> bytes:
    end = b"-----END CERTIFICATE-----"
    return b"".join((pair.chain.partition(end)[0] + end).split())


def test_certificates_change_under_load_and_no_call_fails(
    serving: Callable[..., Any],
    fake: Callable[..., Any],
    folder: Folder,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = serving(fake(), **folder.settings()).target
    done = threading.Event()

    def new_connections() -> int:
        count = 0
        while not done.is_set():
            assert encode(target, authority.pem) == [3]
            count += 1
        return count

    def one_connection() -> int:
        with connect(target, authority.pem) as channel:
            stub, count = TokenizerServiceStub(channel), 0
            while not done.is_set():
                assert list(stub.Encode(REQUEST, timeout=30).shape) == [3]
                count += 1
        return count

    def one_stream() -> int:
        def requests() -> Any:
            while not done.is_set():
                yield REQUEST
                arrived.wait()
                arrived.clear()

        arrived, count = threading.Event(), 0
        with connect(target, authority.pem) as channel:
            for reply in TokenizerServiceStub(channel).EncodeStream(requests()):
                assert list(reply.shape) == [3]
                count += 1
                arrived.set()
        return count

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(one) for one in (new_connections, new_connections, one_connection, one_stream)]
        try:
            for _ in range(10):
                pair = authority.issue()
                folder.put(pair)
                eventually(lambda: served(target) == leaf(pair))  # noqa: B023
                # What is broken changes nothing.
                folder.cert.write_bytes(pair.chain[:100])
                assert served(target) == leaf(pair)
        finally:
            done.set()
        assert all(call.result() for call in calls)
    assert "access_rejected" in caplog.text


def test_sighup_reads_the_certificates_too(
    vqserved: Callable[..., Any], folder: Folder, authority: Authority, put: Callable[..., Any]
) -> None:
    put(folder.path / "books" / "book.safetensors")
    flags = ("--tls-cert", folder.cert, "--tls-key", folder.key)
    daemon = vqserved(folder.path / "books", "--device", "cpu", *flags)
    assert encode(daemon.target, authority.pem) == [3]
    folder.put(authority.issue())
    assert any(" access_reloaded what=certificates" in line for line in daemon.rescan())
    replace(folder.key, b"")
    [line] = [line for line in daemon.rescan() if " access_rejected " in line]
    assert f"{folder.key}: has no private key" in line
    assert encode(daemon.target, authority.pem) == [3]


def test_a_daemon_does_not_start_with_what_is_broken(
    run_vqserved: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    replace(folder.key, authority.issue().key)
    ended = run_vqserved("serve", "--port", "0", "--tls-cert", folder.cert, "--tls-key", folder.key)
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert line == f"vqserved: error: {folder.key}: is not the key of the certificate {folder.cert}"


def health(channel: grpc.Channel) -> int:
    status: int = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status
    return status


def test_health_has_a_port_in_plaintext_that_serves_nothing_else(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    port = free_port()
    server = serving(fake(), health_port=port, **folder.settings(mutual=True))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert health(channel) == health_pb2.HealthCheckResponse.SERVING
        for method in ("/vqserve.v1.TokenizerService/ListCodebooks", "/grpc.reflection.v1alpha.ServerReflection/x"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"", timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        server.stop()
        said = set()
        # It may end before it says so.
        with suppress(grpc.RpcError):
            said |= {answer.status for answer in watched}
        assert said <= {health_pb2.HealthCheckResponse.NOT_SERVING}


def test_health_answers_with_tls_as_well(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    with connect(serving(fake(), **folder.settings()).target, authority.pem) as channel:
        assert health(channel) == health_pb2.HealthCheckResponse.SERVING


def test_the_status_of_a_server_with_tls_is_asked_on_the_port_of_health(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    serving(fake(), health_port=port, **folder.settings(mutual=True))
    assert vqserve(["status", "--target", f"localhost:{port}"]) == 0
    assert capsys.readouterr().out == "SERVING\n"
    # It has nothing else, and the error says so.
    assert vqserve(["codebooks", "--target", f"localhost:{port}"]) == 1
    assert "is this the server's port, and not the one for health checks?" in capsys.readouterr().err


def test_who_connects_and_says_nothing_keeps_nobody_out(
    serving: Callable[..., Any], fake: Callable[..., Any], folder: Folder, authority: Authority
) -> None:
    target = serving(fake(), **folder.settings()).target
    host, _, port = target.rpartition(":")
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(b"\x16\x03\x01")
        assert encode(target, authority.pem) == [3]
