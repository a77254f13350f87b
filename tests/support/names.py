"""A name with several addresses: a small DNS server that is asked by a target of the form dns://SERVER/NAME:PORT."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

# Addresses of this machine, for several servers on one port.
HERE = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
_A = 1
_NAME_IN_THE_QUESTION = b"\xc0\x0c"


class NameServer:
    """Answers every question for IPv4 addresses with the same ones.

    Attributes:
        addresses: the addresses; may be changed while it runs.
        asked: released at each such question.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = threading.Semaphore(0)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))

    def target(self, port: int) -> str:
        """Return the target of the name."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/replicas.test:{port}"

    def run(self) -> None:
        """Answer until an empty question comes."""
        with self._socket:
            while True:
                query, peer = self._socket.recvfrom(4096)
                if not query:
                    return
                self._socket.sendto(self._answer(query), peer)

    def close(self) -> None:
        """Send the empty question."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.sendto(b"", self._socket.getsockname())

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5
        (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
        addresses = self.addresses if kind == _A else ()
        if kind == _A:
            self.asked.release()
        head = query[:2] + struct.pack(">HHHHH", 0x8580, 1, len(addresses), 0, 0)
        records = (
            _NAME_IN_THE_QUESTION + struct.pack(">HHIH", _A, 1, 0, 4) + socket.inet_aton(one) for one in addresses
        )
        return head + query[12:end] + b"".join(records)


def port_of(server: Any) -> str:
    """Return the port of a server of the tests."""
    return str(server.target).rpartition(":")[2]


@contextlib.contextmanager
def name_server(*addresses: str) -> Iterator[NameServer]:
    """Run a DNS server that answers with these addresses."""
    server = NameServer(*addresses)
    thread = threading.Thread(target=server.run, name="name-server")
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
