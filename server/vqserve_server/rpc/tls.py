"""TLS: gRPC's credentials from certificates that may change."""

from __future__ import annotations

from typing import Any

import grpc

from vqserve_server.access import Certificates, ServerCertificates


def server_credentials(certificates: ServerCertificates) -> Any:
    """Return the credentials of a port. Each new connection gets the newest good certificates; others go on."""
    served = certificates.value

    def newest() -> Any:
        # gRPC calls this before each handshake.
        nonlocal served
        found = certificates.refresh()
        if found is served:
            return None
        served = found
        return _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served), newest, require_client_authentication=served.client_ca is not None
    )


def _configuration(certificates: Certificates) -> Any:
    pair = (certificates.key, certificates.chain)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=certificates.client_ca)
