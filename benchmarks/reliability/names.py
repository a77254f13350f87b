"""A name for several servers: addresses in a list, and a name server that a test can change."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

_NAME = "servers.test"
_A, _IN = 1, 1
_TTL_S = 1


def free_port(hosts: Sequence[str]) -> int:
    """Return a port that is free on every one of these addresses."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind((hosts[0], 0))
            port: int = first.getsockname()[1]
            try:
                for host in hosts[1:]:
                    stack.enter_context(socket.socket()).bind((host, port))
            except OSError:
                continue
            return port


class NameServer:
    """Answers each question for an IPv4 address with the same hosts.

    Attributes:
        hosts: the addresses that the name has now.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = list(hosts)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        threading.Thread(target=self._answer, daemon=True).start()

    def target(self, port: int) -> str:
        """Return what a gRPC client takes for the name and a port."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/{_NAME}:{port}"

    def _answer(self) -> None:
        while True:
            try:
                question, caller = self._socket.recvfrom(512)
            except OSError:
                return
            self._socket.sendto(self._reply(question), caller)

    def _reply(self, question: bytes) -> bytes:
        # RFC 1035: the header, the question as it came, and for each address a record that names it by its position.
        end = question.index(b"\0", 12) + 5
        kind, group = struct.unpack(">HH", question[end - 4 : end])
        hosts = self.hosts if (kind, group) == (_A, _IN) else []
        header = question[:2] + struct.pack(">HHHHH", 0x8180, 1, len(hosts), 0, 0)
        records = [struct.pack(">HHHIH", 0xC00C, _A, _IN, _TTL_S, 4) + socket.inet_aton(host) for host in hosts]
        return header + question[12:end] + b"".join(records)

    def __enter__(self) -> NameServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def listed(targets: Sequence[str]) -> str:
    """Return a target that is a list of addresses."""
    return "ipv4:" + ",".join(targets)


def targets(hosts: Sequence[str], port: int) -> Iterator[str]:
    return (f"{host}:{port}" for host in hosts)
