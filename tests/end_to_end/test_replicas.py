"""Three real servers behind one target, restarted, killed, stopped or drained: callers of the SDK see nothing of it."""

from __future__ import annotations

import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.http2 import ACK, PING, Peer
from support.load import Load
from support.waiting import eventually

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for connections in /proc")

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
LATENTS = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)


@pytest.fixture
def start(vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Start a server of one codebook: start(host, port=0) -> Daemon."""
    path = tmp_path / "book.safetensors"
    put(path)
    return lambda host, port=0: vqserved(f"book={path}", "--device", "cpu", "--host", host, "--port", port)


@pytest.fixture
def servers(start: Callable[..., Any]) -> list[Any]:
    return [start(host) for host in HOSTS]


def target_of(servers: list[Any]) -> str:
    return ",".join(server.target for server in servers)


def is_connected(target: str) -> bool:
    """Whether a client has a connection to a server."""
    host, _, port = target.rpartition(":")
    # As the kernel shows an IPv4 address of a socket that takes IPv6 as well, in the byte order of the machine.
    address = "".join(f"{byte:02X}" for byte in reversed(socket.inet_aton(host)))
    local = re.compile(rf" (?:0{{16}}FFFF0000)?{address}:{int(port):04X} \S+ 01 ")
    return any(local.search(Path(f"/proc/net/{table}").read_text()) for table in ("tcp", "tcp6"))


def served(log: str) -> int:
    [requests] = re.findall(r" served requests=(\d+)", log)
    return int(requests)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_servers_are_replaced_in_turn(servers: list[Any], start: Callable[..., Any], number: signal.Signals) -> None:
    with Load(target_of(servers), LATENTS) as load:
        for i, host in enumerate(HOSTS):
            old = servers[i]
            if number == signal.SIGTERM:
                code, log = old.stop(number)
                assert code == 0
                assert served(log) > 0
            else:
                old.process.send_signal(number)
                load.goes_on()
                old.stop(signal.SIGKILL)
            servers[i] = start(host, old.target.rpartition(":")[2])
            assert servers[i].target == old.target
            eventually(lambda: is_connected(old.target))  # noqa: B023
            load.goes_on()
    for server in servers:
        assert served(server.stop(signal.SIGTERM)[1]) > 0


def test_a_server_that_drains_for_long(servers: list[Any]) -> None:
    drained = servers[0]
    # A call whose message has not come holds the drain.
    slow = Peer(drained.target)
    slow.begin("/vqserve.v1.TokenizerService/Encode")
    slow.send(PING, bytes(8))
    assert any(kind == PING and flags & ACK for kind, flags, _ in slow.frames())
    with Load(target_of(servers), LATENTS) as load:
        drained.process.send_signal(signal.SIGTERM)
        for _ in range(3):
            load.goes_on()
        assert drained.process.poll() is None
        slow.close()
        assert drained.process.wait() == 0
        load.goes_on()
