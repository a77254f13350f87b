"""What a target may be, and what a client does with it."""

from __future__ import annotations

import socket

import pytest

from vqserve_client import Client, InvalidOption
from vqserve_client.cli import main
from vqserve_client.target import parse_target


@pytest.mark.parametrize(
    ("given", "addresses"),
    [
        ("localhost:50051", [("localhost:50051", "localhost", 50051)]),
        ("[::1]:50051", [("[::1]:50051", "::1", 50051)]),
        ("dns:///vq.example:1", [("dns:///vq.example:1", "vq.example", 1)]),
        ("dns://10.0.0.2:53/vq.example:1", [("dns://10.0.0.2:53/vq.example:1", "vq.example", 1)]),
        ("10.0.0.1:1, vq-1:2", [("10.0.0.1:1", "10.0.0.1", 1), ("vq-1:2", "vq-1", 2)]),
        (["10.0.0.1:1", "vq-1:2"], [("10.0.0.1:1", "10.0.0.1", 1), ("vq-1:2", "vq-1", 2)]),
        (
            ("10.0.0.1:1,vq-1:2", "vq-1:3"),
            [("10.0.0.1:1", "10.0.0.1", 1), ("vq-1:2", "vq-1", 2), ("vq-1:3", "vq-1", 3)],
        ),
        ("localhost:1,localhost:2,localhost:1", [("localhost:1", "localhost", 1), ("localhost:2", "localhost", 2)]),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", [("10.0.0.1:1", "10.0.0.1", 1), ("10.0.0.2:1", "10.0.0.2", 1)]),
        ("ipv6:[::1]:1,[fd00::2]:1", [("[::1]:1", "::1", 1), ("[fd00::2]:1", "fd00::2", 1)]),
        ("10.0.0.1:1,[fd00::2]:1", [("10.0.0.1:1", "10.0.0.1", 1), ("[fd00::2]:1", "fd00::2", 1)]),
        ("dns:///a:1,b:1", [("dns:///a:1", "a", 1), ("b:1", "b", 1)]),
        ("unix:/run/vq,1.sock", [("unix:/run/vq,1.sock", None, 0)]),
    ],
)
def test_the_forms(given, addresses):
    target = parse_target(given)
    assert [(one.uri, one.host, one.port) for one in target.addresses] == addresses
    # What a pickled client has, and the command line.
    assert parse_target(target.text) == target


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("host", "must be HOST:PORT, such as 'localhost:50051', a list of these with commas for several servers"),
        ("dns:///host", "must be HOST:PORT"),
        ("dns:///host:1,other", "must be HOST:PORT"),
        ("http://host:1", "must be HOST:PORT"),
        ("10.0.0.1:1,10.0.0.2", "must be HOST:PORT"),
        ("10.0.0.1:1,", "must be HOST:PORT"),
        ("10.0.0.1:1,10.0.0.2:65536", "must be HOST:PORT"),
        ("10.0.0.1:1,unix:/run/vq.sock:1", "must be HOST:PORT"),
    ],
)
def test_what_is_none_of_them(text, reason):
    with pytest.raises(InvalidOption) as caught:
        Client(text)
    assert reason in str(caught.value)
    assert repr(text) in str(caught.value)


def test_the_addresses_of_a_name():
    (name,) = parse_target("dns:///vq.example:50051").addresses
    assert name.is_name
    first, second = name.at("10.0.0.1"), name.at("fd00::2")
    assert [one.uri for one in (first, second)] == ["10.0.0.1:50051", "[fd00::2]:50051"]
    assert {one.of_name for one in (first, second)} == {"vq.example"}
    assert not first.is_name


@pytest.mark.parametrize(
    ("text", "proxied", "loopback"),
    [
        ("localhost:1", False, True),
        ("127.8.8.8:1", False, True),
        ("[::1]:1", False, True),
        ("unix:/run/vq.sock", False, True),
        ("dns:///LOCALHOST:1", False, True),
        ("vqserve:1", False, False),
        ("dns:///vqserve:1", False, False),
        ("10.0.0.1:1,10.0.0.2:1", False, False),
        ("127.0.0.1:1,10.0.0.2:1", False, False),
        ("vq.example:1", True, False),
        ("10.0.0.1:1", True, False),
        ("[fd00::1]:1", True, False),
    ],
)
def test_what_stays_here_and_what_a_proxy_may_see(text, proxied, loopback):
    target = parse_target(text)
    assert (target.is_proxied, target.is_loopback) == (proxied, loopback)


@pytest.fixture
def proxy(monkeypatch):
    """A proxy of the environment that answers nothing; its socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield listener


def test_no_proxy_for_this_machine(proxy, replicas, connect, latents, capsys):
    (server,) = replicas("127.0.0.1")
    port = server.target.rpartition(":")[2]
    for target in (server.target, f"localhost:{port}", f"{server.target},127.0.0.1:1"):
        assert connect(target).encode(latents(2, 4)).shape == (2,)
        assert main(["status", "--target", target, "--timeout", "60"]) == 0
    assert capsys.readouterr().out == "SERVING\n" * 3


def test_names_with_a_dot_go_through_the_proxy(proxy):
    with Client("vq.example:50051", timeout=60) as client:
        call = client._core.pool.pick(0).method("ListCodebooks").future(b"", timeout=60)
        accepted, _ = proxy.accept()
        with accepted:
            assert accepted.recv(1 << 16).startswith(b"CONNECT vq.example:50051 HTTP/1.1\r\n")
        call.cancel()
