"""Which IP addresses a name has now: from the system, or from the DNS server that a target names."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import struct

from vqserve_client.target import Address

# A DNS server that does not answer within this time is asked again later.
_TIMEOUT_S = 2.0
_DNS_PORT = 53
_KINDS = {1: 4, 28: 16}  # A and AAAA, and the bytes of their addresses


def resolve(name: Address) -> tuple[str, ...]:
    """Return the IP addresses of a name, sorted.

    Raises:
        OSError: nobody could be asked, or the name has no address.
    """
    if name.name_server:
        found = _ask(name.host or "", name.name_server)
    else:
        entries = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
        found = {str(entry[4][0]) for entry in entries}
    # A zone, such as in fe80::1%eth0, is of this machine only.
    usable = {text for text in found if "%" not in text}
    if not usable:
        raise OSError("the name has no address")
    return tuple(sorted(usable, key=lambda text: (":" in text, ipaddress.ip_address(text))))


def _ask(host: str, server: str) -> set[str]:
    ip, _, port = server.rpartition(":") if not server.endswith("]") and ":" in server else (server, "", "")
    family, _, _, _, peer = socket.getaddrinfo(
        ip.removeprefix("[").removesuffix("]"), int(port or _DNS_PORT), type=socket.SOCK_DGRAM
    )[0]
    found: set[str] = set()
    for kind in _KINDS:
        number = secrets.randbits(16)
        labels = b"".join(bytes([len(label)]) + label for label in host.encode("idna").rstrip(b".").split(b"."))
        # One question of class IN, with the wish that the server asks others.
        query = struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", kind, 1)
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.settimeout(_TIMEOUT_S)
            asking.connect(peer)
            asking.send(query)
            reply = asking.recv(1 << 16)
        try:
            found |= _addresses(reply, number, kind)
        except (IndexError, struct.error):
            raise OSError("the DNS server's reply cannot be read") from None
    return found


def _addresses(reply: bytes, number: int, kind: int) -> set[str]:
    replied, flags, questions, answers, _, _ = struct.unpack_from(">6H", reply)
    if replied != number or flags & 0x000F:
        raise OSError("the DNS server does not know the name")
    at = 12
    for _ in range(questions):
        at = _after_name(reply, at) + 4
    found = set()
    for _ in range(answers):
        at = _after_name(reply, at)
        record, _, _, length = struct.unpack_from(">HHIH", reply, at)
        at += 10
        if record == kind and length == _KINDS[kind] and len(reply) >= at + length:
            found.add(str(ipaddress.ip_address(reply[at : at + length])))
        at += length
    return found


def _after_name(reply: bytes, at: int) -> int:
    """Return where a name ends, which ends with an empty label or a reference to another name."""
    while reply[at]:
        if reply[at] >= 0xC0:
            return at + 2
        at += 1 + reply[at]
    return at + 1
