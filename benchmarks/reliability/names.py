"""Several servers on one port, each on an address of its own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence


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


def listed(targets: Sequence[str]) -> str:
    """Return a target that is a list of addresses."""
    # Not only with commas, so that an older SDK takes it, too.
    return "ipv4:" + ",".join(targets)
