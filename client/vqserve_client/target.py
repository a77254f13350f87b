"""The address that a client is given: of one server, of a name with several addresses, or a list of servers."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from vqserve.errors import InvalidOption, quoted

_FORMS = (
    "{option} must be HOST:PORT, such as 'localhost:50051', dns:///NAME:PORT for a name of several servers, "
    "IP:PORT,IP:PORT for a list of servers, or unix:PATH"
)
_UNIX = ("unix:", "unix-abstract:")
# gRPC asks the DNS server of the second form itself: dns://SERVER/NAME:PORT.
_DNS = re.compile(r"dns://(?:[^/,]*)/([^/,]+)")
_LISTS = ("ipv4:", "ipv6:")
# gRPC's default, pick_first, sends everything to one address. Either skips servers that are gone or drain.
_ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'


@dataclass(frozen=True)
class Target:
    """A checked address.

    Attributes:
        uri: what gRPC connects to.
        hosts: the names or IP addresses in it; none for a socket file.
    """

    uri: str
    hosts: tuple[str, ...]

    @property
    def is_loopback(self) -> bool:
        """Return whether what is sent there stays on this machine."""
        return all(map(_is_loopback, self.hosts))

    @property
    def is_proxied(self) -> bool:
        """Return whether a proxy of the environment may be used: http_proxy is for hosts beyond one's own network."""
        return len(self.hosts) == 1 and not _is_loopback(self.hosts[0]) and bool(re.search("[.:]", self.hosts[0]))

    @property
    def is_balanced(self) -> bool:
        """Return whether it may stand for several servers: a list, or a name other than that of this machine."""
        return len(self.hosts) > 1 or any(not (_is_loopback(host) or _ip(host)) for host in self.hosts)

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """Return the options of a gRPC channel to it."""
        options: list[tuple[str, str | int]] = []
        if not self.is_proxied:
            options.append(("grpc.enable_http_proxy", 0))
        if self.is_balanced:
            options.append(("grpc.service_config", _ROUND_ROBIN))
        return options


def parse_target(text: str) -> Target:
    """Return the address that a text stands for.

    Raises:
        TypeError: it is not a string.
        InvalidOption: it is none of the forms.
    """
    if not isinstance(text, str):
        raise TypeError(f"target must be a string such as 'localhost:50051', not {type(text).__name__}")
    if text.startswith(_UNIX):
        return Target(text, ())
    if named := _DNS.fullmatch(text):
        return Target(text, (_host(named[1], text),))
    if "," in text or text.startswith(_LISTS):
        return _list(text)
    return Target(text, (_host(text, text),))


def _list(text: str) -> Target:
    addresses = text.removeprefix(_LISTS[0]).removeprefix(_LISTS[1]).split(",")
    # A socket address has no room for a name, and what one name has now may change.
    addresses = [re.sub(r"^localhost(?=:)", "127.0.0.1", address.strip()) for address in addresses]
    hosts = tuple(_host(address, text) for address in addresses)
    versions = {version for host in hosts for version in [_ip(host)] if version}
    if len(versions) != 1 or not all(map(_ip, hosts)):
        raise InvalidOption(
            f"{{option}} must list IP addresses, all IPv4 or all IPv6, not {quoted(text, 200)}",
            option="target",
            hint="for a name of several servers, use dns:///NAME:PORT",
        )
    return Target(f"ipv{versions.pop()}:{','.join(addresses)}", hosts)


def _host(address: str, whole: str) -> str:
    """Return the host of HOST:PORT; `whole` is the text that an error quotes."""
    # gRPC would take port 443 where there is none, and one that is too large modulo 65536.
    host, _, port = address.rpartition(":")
    if host == "" or "://" in host or not port.isdecimal() or int(port) >= 1 << 16:
        raise InvalidOption(f"{_FORMS}, not {quoted(whole, 200)}", option="target")
    return host.removeprefix("[").removesuffix("]")


def _ip(host: str) -> int | None:
    """Return 4 or 6 for an IP address, None for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    return host.lower() == "localhost" or (_ip(host) is not None and ipaddress.ip_address(host).is_loopback)
