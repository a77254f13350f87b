"""Who can use the server: certificates and tokens, read from files that may change. No gRPC, no torch."""

from vqserve_server.access.access import Access
from vqserve_server.access.certificates import Certificates, ServerCertificates
from vqserve_server.access.codebooks import Codebooks
from vqserve_server.access.token_file import CallerLimits
from vqserve_server.access.tokens import Token, Tokens

__all__ = ["Access", "CallerLimits", "Certificates", "Codebooks", "ServerCertificates", "Token", "Tokens"]
