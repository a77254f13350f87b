"""Certificates for tests of TLS, real ones, made by an authority of the test."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    chain: bytes
    key: bytes


class Authority:
    """Signs certificates; `pem` is its own."""

    def __init__(self) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.pem = self._ca.cert_pem.bytes()

    def issue(self, *names: str, days: float = 365) -> Pair:
        """Return a certificate for some hosts, or for a client, that is valid for `days` more days."""
        expires = datetime.now(UTC) + timedelta(days=days)
        made = self._ca.issue_cert(
            *(names or ("localhost", "127.0.0.1")),
            not_before=expires - timedelta(days=1000),
            not_after=expires,
            key_type=trustme.KeyType.ECDSA,
        )
        return Pair(b"".join(one.bytes() for one in made.cert_chain_pems), made.private_key_pem.bytes())


class Folder:
    """Files of a server's certificates, and of the authority of its clients."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cert, self.key, self.client_ca = path / "server.crt", path / "server.key", path / "clients.crt"

    def put(self, pair: Pair) -> None:
        """Replace certificate and key, each in one step."""
        replace(self.key, pair.key)
        replace(self.cert, pair.chain)

    def settings(self, *, mutual: bool = False) -> dict[str, str]:
        """Return the settings of a server that uses the files, as environment variables without the prefix."""
        names = {"server_tls_cert": self.cert, "server_tls_key": self.key}
        return {
            name: str(path)
            for name, path in (names | ({"server_tls_client_ca": self.client_ca} if mutual else {})).items()
        }


def replace(path: Path, content: bytes) -> None:
    """Replace a file in one step, readable by its owner only."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.chmod(0o600)
    os.replace(new, path)  # noqa: PTH105


def connect(target: str, ca: bytes, pair: Pair | None = None, *, token: str = "") -> grpc.Channel:
    """Return a channel with TLS and a connection of its own."""
    own = (None, None) if pair is None else (pair.key, pair.chain)
    credentials = grpc.ssl_channel_credentials(ca, *own)
    if token:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    return grpc.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)])


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
