"""TLS: which servers a client trusts, and which certificate it shows them."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path

import grpc

from vqserve.errors import InvalidOption, quoted

StrPath = str | PathLike[str]
_SWITCH = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
_PREFIX = "VQSERVE_TLS"
# Where systems keep the certificates that they trust, if Python does not say.
_SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files and names for an encrypted connection; the files are in PEM format.

    They are read when a client is made, when it opens its channel, and again if they have changed and there is no
    connection: a certificate can be renewed without a new client.

    Args:
        ca: certificates of the authorities that the client trusts; None: those that the system trusts.
        cert: certificate of the client, with those between it and its authority, for a server that asks for one.
        key: private key of the client's certificate, not encrypted.
        server_name: name that the server's certificate must have; None: the host of the target.

    Raises:
        InvalidOption: there is a certificate without a key, or a key without a certificate.
        TypeError: a value is of the wrong type.
    """

    ca: StrPath | None = None
    cert: StrPath | None = None
    key: StrPath | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            # As a string, so that it can be pickled for another machine, and compared.
            object.__setattr__(self, name, None if path is None else os.fspath(path))
        if self.server_name is not None and not isinstance(self.server_name, str):
            raise TypeError(f"server_name must be a string, not {type(self.server_name).__name__}")
        if (self.cert is None) != (self.key is None):
            raise InvalidOption(
                "{option} needs both, the client's certificate and its key",
                option="tls",
                hint="Tls(cert=..., key=...), --tls-cert and --tls-key",
            )

    def check(self) -> None:
        """Read the files.

        Raises:
            InvalidOption: a file cannot be read, or is not what it must be.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is not None:
            ca = self.ca
            _reading(ca, "a certificate in PEM format", lambda: context.load_verify_locations(ca))
        if self.cert is not None:
            cert, key = self.cert, self.key
            # Without the password, Python would ask for that of an encrypted key on the terminal.
            _reading(
                cert,
                f"a certificate in PEM format whose private key, not encrypted, is {quoted(str(key), 200)}",
                lambda: context.load_cert_chain(cert, key, password=""),
            )

    def version(self) -> object:
        """Return what differs after a file was replaced."""
        return [_version(path) for path in (self.ca, self.cert, self.key) if path is not None]

    def credentials(self) -> grpc.ChannelCredentials:
        """Return what gRPC needs for a connection.

        Raises:
            InvalidOption: as for check.
        """
        self.check()
        return grpc.ssl_channel_credentials(_system_roots() if self.ca is None else _read(self.ca), *self._own())

    def _own(self) -> tuple[bytes | None, bytes | None]:
        """Return the key and the certificate."""
        return (None, None) if self.cert is None or self.key is None else (_read(self.key), _read(self.cert))


def tls_of(tls: bool | Tls | None) -> Tls | None:
    """Return what an option stands for; None: what the environment says.

    Raises:
        InvalidOption: VQSERVE_TLS is neither on nor off, or a value is wrong.
        TypeError: the option is of another type.
    """
    if tls is None:
        return tls_of_environment()
    if isinstance(tls, Tls):
        return tls
    if not isinstance(tls, bool):
        raise TypeError(f"tls must be True, False or a Tls, not {type(tls).__name__}")
    return Tls() if tls else None


def tls_of_environment(*, switch: bool | None = None, **given: str | None) -> Tls | None:
    """Return the TLS of the variables VQSERVE_TLS, VQSERVE_TLS_CA, and so on; None: no TLS.

    An authority switches TLS on, as VQSERVE_TLS=on does. VQSERVE_TLS_CERT alone does not: it is of use only with TLS.

    Args:
        switch: stands in place of VQSERVE_TLS.
        given: values in place of those of other variables.

    Raises:
        InvalidOption: VQSERVE_TLS is neither on nor off, or a value is wrong.
    """
    if switch is None and not any(given.values()):
        switch = _switch(os.environ.get(_PREFIX) or ("on" if os.environ.get(f"{_PREFIX}_CA") else "off"))
    if switch is False:
        return None
    names = [field.name for field in fields(Tls)]
    return Tls(**{name: given.get(name) or os.environ.get(f"{_PREFIX}_{name.upper()}") or None for name in names})


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise InvalidOption(f"{_PREFIX} must be on or off, not {quoted(text)}", option="tls")
    return _SWITCH[text.lower()]


def _version(path: StrPath) -> object:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _reading(path: StrPath, what: str, read: Callable[[], object]) -> None:
    try:
        read()
    except ssl.SSLError:
        raise InvalidOption(f"{{option}}: {quoted(str(path), 200)} is not {what}", option="tls") from None
    except OSError as error:
        raise _unreadable(error.filename or path, error) from None


def _read(path: StrPath) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: StrPath, error: OSError) -> InvalidOption:
    return InvalidOption(
        f"{{option}}: cannot read {quoted(str(path), 200)}: {error.strerror or 'an error'}", option="tls"
    )


def _system_roots() -> bytes | None:
    """Return the certificates of the authorities that the system trusts; None: those that gRPC brings along."""
    for path in (ssl.get_default_verify_paths().cafile, *_SYSTEM_ROOTS):
        if path is not None and Path(path).is_file():
            return _read(path)
    return None
