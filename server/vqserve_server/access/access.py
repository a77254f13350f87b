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

    def refresh(self) -> list[str]:
        """Read the files that have changed again, now; return why some cannot be used: those change nothing."""
        watched = [each for each in (self.certificates, self.tokens) if each is not None]
        for each in watched:
            each.refresh()
        return [each.problem for each in watched if each.problem is not None]
