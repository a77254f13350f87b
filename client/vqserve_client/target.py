"""The addresses that a client is given: of one server, of a name with several addresses, or of a list of these."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vqserve.errors import InvalidOption, quoted

_FORMS = (
    "{option} must be HOST:PORT, such as 'localhost:50051', a list of these with commas for several servers, "
    "dns:///NAME:PORT, or unix:PATH"
)
_UNIX = ("unix:", "unix-abstract:")
# The second form names the DNS server to ask: dns://SERVER/NAME:PORT.
_DNS = re.compile(r"dns://([^/,]*)/([^/,]+)")
_LISTS = ("ipv4:", "ipv6:")
# As gRPC reads them: in lower case.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True)
class Address:
    """One server's address, or a name that may have the addresses of several.

    Attributes:
        uri: what gRPC connects to.
        host: name or IP address; None for a socket file.
        port: its port; 0 for a socket file.
        name_server: address of the DNS server to ask for the name; "": the system's.
        of_name: the name that this is an address of; None: it was given as it is.
    """

    uri: str
    host: str | None = None
    port: int = 0
    name_server: str = ""
    of_name: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Return whether what is sent there stays on this machine."""
        return self.host is None or _is_loopback(self.host)

    @property
    def is_name(self) -> bool:
        """Return whether it may stand for several servers: a name other than that of this machine."""
        return self.host is not None and not _is_loopback(self.host) and _ip(self.host) is None

    def at(self, ip: str) -> Address:
        """Return one of the addresses of this name."""
        uri = f"[{ip}]:{self.port}" if ":" in ip else f"{ip}:{self.port}"
        return replace(self, uri=uri, host=ip, name_server="", of_name=self.host)


@dataclass(frozen=True)
class Target:
    """The checked addresses of a client.

    Attributes:
        text: the addresses as one text, which `parse_target` takes.
        addresses: one or more.
    """

    text: str
    addresses: tuple[Address, ...]

    @property
    def is_loopback(self) -> bool:
        """Return whether what is sent there stays on this machine."""
        return all(address.is_loopback for address in self.addresses)

    @property
    def host_beyond(self) -> str:
        """Return the first host that is not this machine, or "" if there is none."""
        return next((address.host or "" for address in self.addresses if not address.is_loopback), "")

    @property
    def is_proxied(self) -> bool:
        """Return whether a proxy of the environment may be used: http_proxy is for hosts beyond one's own network."""
        host = self.addresses[0].host or ""
        return len(self.addresses) == 1 and not self.is_loopback and bool(re.search("[.:]", host))

    @property
    def uses_proxy(self) -> bool:
        """Return whether gRPC uses a proxy of the environment; then the proxy, not this client, asks for addresses."""
        if not (self.is_proxied and any(os.environ.get(name) for name in _PROXIES)):
            return False
        exempt = next(filter(None, map(os.environ.get, _NO_PROXY)), "")
        ends = [end.strip() for end in exempt.split(",")]
        return not any(end and (self.addresses[0].host or "").endswith(end) for end in ends)


def parse_target(target: str | Sequence[str]) -> Target:
    """Return the addresses that a text, or a list of texts, stands for.

    Raises:
        TypeError: it is neither.
        InvalidOption: it is none of the forms.
    """
    texts = [target] if isinstance(target, str) else target
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        kind = type(target).__name__
        raise TypeError(f"target must be a string such as 'localhost:50051', or a list of strings, not {kind}")
    whole = ",".join(texts)
    if len(texts) == 1 and texts[0].startswith(_UNIX):
        return Target(whole, (Address(whole),))
    # An address that is given twice is one server.
    addresses = dict.fromkeys(_address(one.strip(), whole) for text in texts for one in _without_kind(text).split(","))
    if not addresses:
        raise InvalidOption("{option} must have an address", option="target")
    return Target(whole, tuple(addresses))


def _without_kind(text: str) -> str:
    return text.removeprefix(_LISTS[0]).removeprefix(_LISTS[1])


def _address(text: str, whole: str) -> Address:
    """Return one address; `whole` is the text that an error quotes."""
    named = _DNS.fullmatch(text)
    # gRPC would take port 443 where there is none, and one that is too large modulo 65536.
    host, _, port = (named[2] if named else text).rpartition(":")
    if host == "" or "://" in host or host.startswith(_UNIX) or not port.isdecimal() or int(port) >= 1 << 16:
        raise InvalidOption(f"{_FORMS}, not {quoted(whole, 200)}", option="target")
    host = host.removeprefix("[").removesuffix("]")
    return Address(text, host, int(port), named[1] if named else "")


def _ip(host: str) -> int | None:
    """Return 4 or 6 for an IP address, None for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    return host.lower() == "localhost" or (_ip(host) is not None and ipaddress.ip_address(host).is_loopback)
