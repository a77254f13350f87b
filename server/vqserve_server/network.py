"""The addresses that the daemon listens on."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from pathlib import Path

from vqserve.errors import StartError
from vqserve_server.config import AccessConfig
from vqserve_server.event_log import event

logger = logging.getLogger(__name__)

# gRPC parses targets as URIs, in which these characters have a special meaning.
_URI_MARKS = "%?#"


def address(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_address(host: str) -> bool:
    """Return whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_protected(host: str, access: AccessConfig) -> None:
    """Check that what other machines can reach is encrypted, or that the operator wants it not to be.

    A warning says what a host that other machines can reach lacks.

    Raises:
        StartError: it is not encrypted.
    """
    if is_loopback(host):
        return
    if not access.is_encrypted and not access.insecure:
        raise StartError(
            f"{host} can be reached by other machines, and the connections would not be encrypted: give --tls-cert and "
            "--tls-key, or --insecure if everyone on the network may read and change what is sent"
        )
    missing = []
    if not access.is_encrypted:
        missing.append("no TLS: who can reach the network can read and change what is sent")
    if not access.tokens and not access.tls_client_ca:
        missing.append("no tokens: every caller is served")
    if missing:
        logger.warning(event("listening_openly", host=host, risk="; ".join(missing)))


def reserve(host: str, port: int, *, shared: bool, flag: str = "--port") -> socket.socket:
    """Return a socket that is bound to the address but does not listen, so that it gets no connections.

    Args:
        host: name or address.
        port: port number; 0: a free port.
        shared: whether other processes of this user may listen on the address while the socket is open.
        flag: what sets the port, for the error.

    Raises:
        StartError: the address cannot be bound; the error gives the reason.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        held = socket.socket(family, kind, protocol)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
            held.bind(target)
        except OSError:
            held.close()
            raise
    except UnicodeError:
        raise StartError(f"cannot listen on {address(host, port)}: it is no name of a host") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = f"the port is in use: is another vqserved running? Stop it, or choose another with {flag}"
        raise StartError(f"cannot listen on {address(host, port)}: {reason}") from None
    return held


def listen(host: str, port: int, *, flag: str) -> socket.socket:
    """Return a socket that listens on the address.

    Args:
        host: name or address.
        port: port number.
        flag: what sets the port, for the error.

    Raises:
        StartError: the address cannot be bound; the error gives the reason.
    """
    listener = reserve(host, port, shared=False, flag=flag)
    try:
        listener.listen()
    except OSError as error:
        # Another process has bound the port as well, and was faster.
        listener.close()
        raise StartError(f"cannot listen on {address(host, port)}: {error.strerror or error}") from None
    return listener


def check_unix_socket(path: str) -> None:
    """Check that the server can listen on a socket file; the file of a server that has ended is removed.

    Raises:
        StartError: the server cannot listen on it; the error gives the reason.
    """
    check_socket_path(path)
    file = Path(path)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            if _is_listened_on(probe, path):
                raise StartError(f"cannot listen on {path}: another process listens on it")
            if file.is_socket():
                file.unlink()
            probe.bind(path)
            file.unlink()
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {error.strerror or error}") from None


def check_socket_path(path: str) -> None:
    """Check that a socket file could be made, without making it.

    Raises:
        StartError: it could not; the error gives the reason.
    """
    if any(mark in path for mark in _URI_MARKS):
        raise StartError(f"cannot listen on {path}: a target unix:PATH cannot contain any of {' '.join(_URI_MARKS)}")
    file = Path(path)
    try:
        if not file.parent.is_dir():
            raise StartError(f"cannot listen on {path}: there is no folder {file.parent}")
        if file.exists() and not file.is_socket():
            raise StartError(f"cannot listen on {path}: the file exists and is not a socket")
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {error.strerror or error}") from None


def _is_listened_on(probe: socket.socket, path: str) -> bool:
    try:
        probe.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def check(host: str, port: int, *, flag: str = "--port") -> None:
    """Check that the server can listen on an address, before it spends minutes on loading codebooks.

    Raises:
        StartError: the server cannot listen on it; the error gives the reason.
    """
    reserve(host, port, shared=False, flag=flag).close()
