"""Which IP addresses a name has now: from the system, or from the DNS server that a target names."""

from __future__ import annotations

import ipaddress
import socket

from vqserve_client.target import Address

# A DNS server that does not answer within this time is asked again later.
_TIMEOUT_S = 2.0
_DNS_PORT = 53


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
    # Only this form of target needs it.
    import dns.exception  # noqa: PLC0415
    import dns.resolver  # noqa: PLC0415

    ip, _, port = server.rpartition(":") if not server.endswith("]") and ":" in server else (server, "", "")
    asking = dns.resolver.Resolver(configure=False)
    asking.nameservers = [str(socket.getaddrinfo(ip.removeprefix("[").removesuffix("]"), None)[0][4][0])]
    asking.port = int(port or _DNS_PORT)
    asking.lifetime = _TIMEOUT_S
    found: set[str] = set()
    for kind in ("A", "AAAA"):
        try:
            found |= {str(record) for record in asking.resolve(host, kind, raise_on_no_answer=False)}
        except dns.exception.DNSException as error:
            raise OSError(f"the DNS server does not know the name: {error}") from error
    return found
