"""The server's certificate, its key, and the authorities that sign the certificates of clients."""

from __future__ import annotations

import binascii
import logging
import os
import re
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from vqserve.errors import StartError
from vqserve_server.access.files import Watched, warn_if_readable
from vqserve_server.config import AccessConfig
from vqserve_server.event_log import ONCE, event

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----.+?-----END [A-Z0-9 ]*PRIVATE KEY-----", re.DOTALL)
_DAY_S = 86_400.0
_WARNED_DAYS = 14
# Tags of the encoding of certificates: RFC 5280, 4.1, and X.690, 8.
_VERSION = 0xA0
_UTC_TIME = 0x17

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificates:
    """What a server needs for TLS, checked.

    Attributes:
        key: the private key, PEM.
        chain: the certificate and those that lead to its authority, PEM.
        client_ca: the authorities of clients, PEM; None: clients need no certificate.
        expires: when the certificate does.
    """

    key: bytes
    chain: bytes
    client_ca: bytes | None
    expires: datetime


class ServerCertificates:
    """The certificates that the settings name; read again when the files have changed. Thread-safe."""

    def __init__(self, config: AccessConfig) -> None:
        """Read and check the files, and log when the certificate expires.

        Raises:
            StartError: a file cannot be used, or the certificate has expired.
        """
        paths = [config.tls_cert, config.tls_key, *([config.tls_client_ca] if config.tls_client_ca else [])]
        self._path = config.tls_cert
        self._watched = Watched("certificates", paths, lambda contents: _certificates(paths, contents))
        warn_if_readable(config.tls_key, holds="the private key")
        # time.monotonic() seconds of the next look at the date.
        self._next_look = 0.0
        self._log_expiry(logging.INFO, ONCE)

    @property
    def value(self) -> Certificates:
        """The newest good ones."""
        return self._watched.value

    @property
    def problem(self) -> str | None:
        """Why the newest files cannot be used; None: they can."""
        return self._watched.problem

    def refresh(self) -> Certificates:
        """Read the files again if they have changed; return the newest good ones."""
        if self._watched.refresh():
            self._log_expiry(logging.INFO)
        elif time.monotonic() >= self._next_look:
            self._log_expiry(logging.DEBUG)
        return self.value

    def _log_expiry(self, level: int, extra: Mapping[str, bool] | None = None) -> None:
        self._next_look = time.monotonic() + _DAY_S
        days = (self.value.expires - datetime.now(UTC)).total_seconds() / _DAY_S
        if days < _WARNED_DAYS:
            level = logging.ERROR if days <= 0 else logging.WARNING
        fields = {"path": self._path, "expires": self.value.expires.isoformat(), "days": int(days)}
        logger.log(level, event("certificate_expires", **fields), extra=extra)


def _certificates(paths: Sequence[str], contents: Sequence[bytes]) -> Certificates:
    cert_path, key_path = paths[:2]
    chain = _found_certificates(cert_path, contents[0])
    key = _found_key(key_path, contents[1])
    _check_pair(cert_path, key_path, chain, key)
    client_ca = None
    if len(contents) > 2:
        client_ca = _found_certificates(paths[2], contents[2])
        _check_authorities(paths[2], client_ca)
    expires = _expiry(cert_path, chain)
    if expires <= datetime.now(UTC):
        raise StartError(f"{cert_path}: the certificate expired on {expires:%Y-%m-%d}: renew it")
    return Certificates(key, chain, client_ca, expires)


def _found_certificates(path: str, content: bytes) -> bytes:
    # Without the text that some programs write between them.
    blocks: list[bytes] = _CERTIFICATE.findall(content)
    if not blocks:
        raise StartError(f"{path}: has no certificate in PEM form (-----BEGIN CERTIFICATE-----)")
    return b"\n".join(blocks) + b"\n"


def _found_key(path: str, content: bytes) -> bytes:
    found = _KEY.search(content)
    if found is None:
        raise StartError(f"{path}: has no private key in PEM form (-----BEGIN PRIVATE KEY-----)")
    if b"ENCRYPTED" in found[0]:
        raise StartError(f"{path}: the private key is encrypted: store it without a password (`openssl pkey`)")
    return found[0] + b"\n"


def _check_pair(cert_path: str, key_path: str, chain: bytes, key: bytes) -> None:
    # Python reads them only from files. These are in memory, and are the very bytes that are going to be served.
    descriptors = [os.memfd_create("vqserve"), os.memfd_create("vqserve")]
    try:
        for descriptor, content in zip(descriptors, (chain, key), strict=True):
            os.write(descriptor, content)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*(f"/proc/self/fd/{one}" for one in descriptors))
    except ssl.SSLError as error:
        if error.reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
            raise StartError(f"{key_path}: is not the key of the certificate {cert_path}") from None
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise StartError(f"{cert_path} or {key_path}: cannot be used for TLS: {reason}") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _check_authorities(path: str, pem: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error).lower().replace("_", " ")
        raise StartError(f"{path}: has a certificate that cannot be used: {reason}") from None


def _expiry(path: str, chain: bytes) -> datetime:
    """Return when the first certificate expires."""
    block = _CERTIFICATE.search(chain)
    try:
        der = ssl.PEM_cert_to_DER_cert(block[0].decode("ascii")) if block is not None else b""
        return _not_after(der)
    except (ValueError, IndexError, binascii.Error):
        raise StartError(f"{path}: the certificate has no date that can be read") from None


def _not_after(der: bytes) -> datetime:
    """Return the field notAfter of a certificate; Python has no function for it."""
    _, at, _ = _element(der, 0)  # Certificate
    _, at, _ = _element(der, at)  # TBSCertificate
    tag, _, end = _element(der, at)
    if tag == _VERSION:
        at = end
    for _ in ("serialNumber", "signature", "issuer"):
        _, _, at = _element(der, at)
    _, at, _ = _element(der, at)  # Validity
    _, _, at = _element(der, at)  # notBefore
    tag, start, end = _element(der, at)
    text = der[start:end].decode("ascii")
    if tag == _UTC_TIME:
        # Two digits are a year from 1950 to 2049.
        text = ("19" if text >= "5" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of an element, and where its content begins and ends."""
    tag, length = der[at], der[at + 1]
    start = at + 2
    if length >= 0x80:
        count = length & 0x7F
        length = int.from_bytes(der[start : start + count], "big")
        start += count
    return tag, start, start + length
