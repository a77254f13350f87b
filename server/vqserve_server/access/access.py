"""All that decides who can use a server, loaded from the settings."""

from __future__ import annotations

from vqserve_server.access.certificates import ServerCertificates
from vqserve_server.access.tokens import Tokens
from vqserve_server.config import AccessConfig


class Access:
    """The certificates and the tokens of one server.

    Attributes:
        certificates: for TLS; None: connections are plaintext.
        tokens: that callers may use; None: a caller needs none.
    """

    def __init__(self, config: AccessConfig) -> None:
        """Read the files.

        Raises:
            StartError: one cannot be used; the text names it.
        """
        self.certificates = ServerCertificates(config) if config.is_encrypted else None
        self.tokens = Tokens(config.tokens) if config.tokens else None

    def refresh(self) -> None:
        """Read the files that have changed again, now; a file that cannot be used changes nothing."""
        if self.certificates is not None:
            self.certificates.refresh()
        if self.tokens is not None:
            self.tokens.refresh()
