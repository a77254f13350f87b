"""gRPC's own texts, which are all that tells some failures apart, and what we say in their place.

They differ between releases; a text that is not known is shown like a server's.
"""

from __future__ import annotations

import re

from vqserve.errors import MessageTooLarge, escape
from vqserve.text import printable

NO_SERVER = "is the server running, and is this its address? `vqserved serve` starts one"

_WANTS_CERTIFICATE = (
    "does it ask for a client certificate, of an authority that it trusts? "
    "Tls(cert=..., key=...), --tls-cert and --tls-key"
)
_LONGEST_CAUSE = 2000
_NO_CONNECTION = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|errors resolving|DNS resolution failed"
)
_LOST_CONNECTION = re.compile(r"Stream removed|Socket closed|recvmsg:|sendmsg:|GOAWAY received|ping timeout")
# What is missing is the first frame of a gRPC server: another kind of server sends something else, or waits for more.
_FOREIGN = re.compile(r"SETTINGS frame|http1\.x server|Failed parsing HTTP/2")
# A server with TLS that is spoken to without, or does not accept the client's certificate.
_CLOSED = re.compile(r"Socket closed|Connection reset|recvmsg")
_TOO_LARGE = re.compile(r"(?:(CLIENT|SERVER): )?(Sent|Received) message larger than max \((\d{1,18}) vs\. (\d{1,18})\)")
_INFLATED = "Decompressed message larger than max"
# gRPC's code for it is that of a full queue.
_METADATA_TOO_LARGE = re.compile(r"received metadata size exceeds (?:hard|soft) limit")
_LIMIT = "max_message_bytes"

# Failures of TLS, the first that fits: gRPC's text, what it means, and what to do.
_TLS = (
    (
        re.compile(r"WRONG_VERSION_NUMBER|HTTP_REQUEST|UNEXPECTED_MESSAGE"),
        "the server does not use TLS",
        "connect without {tls=}, or give the server a certificate",
    ),
    (
        re.compile(r"certificate has expired"),
        "the server's certificate has expired",
        "the server's operator must renew it",
    ),
    (
        re.compile(r"certificate is not yet valid"),
        "the server's certificate is not valid yet",
        "is the clock of this machine right?",
    ),
    (
        re.compile(r"Hostname Verification Check failed|not in peer certificate"),
        "the server's certificate is for another name",
        "connect with a name that is in it, or state that name: Tls(server_name=...), --tls-server-name",
    ),
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED"),
        "the server's certificate is not from an authority that this client trusts",
        "give the certificate of its authority: Tls(ca=...), --tls-ca or VQSERVE_TLS_CA",
    ),
    (
        re.compile(r"handshake failed|verification check failed|security handshaker", re.IGNORECASE),
        "the server and this client do not agree on TLS",
        "the debug log has gRPC's reason",
    ),
)


def is_unconnected(details: str) -> bool:
    """Return whether a call failed because there was no connection."""
    return _NO_CONNECTION.match(details) is not None


def is_disconnected(details: str) -> bool:
    """Return whether a call failed because its connection ended."""
    return _LOST_CONNECTION.match(details) is not None


def is_foreign(details: str) -> bool:
    """Return whether there was no connection because another kind of server listens."""
    return _FOREIGN.search(details) is not None


def is_misunderstood(details: str) -> bool:
    """Return whether there was no connection although something listens: what, or with TLS or without, does not fit."""
    if is_foreign(details) or _CLOSED.match(_cause(details)):
        return True
    return any(text.search(details) for text, _, _ in _TLS)


def is_too_large(details: str) -> bool:
    """Return whether a message was larger than a limit."""
    return _TOO_LARGE.search(details) is not None or _INFLATED in details


def has_too_much_metadata(details: str) -> bool:
    """Return whether a server sent more metadata than gRPC takes."""
    return _METADATA_TOO_LARGE.search(details) is not None


def why_unconnected(details: str, *, is_encrypted: bool) -> tuple[str, str]:
    """Return why there is no connection, and what to do, as templates.

    Args:
        details: gRPC's text.
        is_encrypted: whether the client uses TLS.
    """
    if is_encrypted:
        for text, cause, hint in _TLS:
            if text.search(details):
                return cause, hint
    if is_foreign(details):
        return "what listens there does not speak gRPC", NO_SERVER
    cause = _cause(details)
    if _CLOSED.match(cause):
        return (
            "the server closed it",
            _WANTS_CERTIFICATE if is_encrypted else "does it use TLS? then connect with {tls=}",
        )
    return escape(cause), NO_SERVER


def too_large(details: str) -> MessageTooLarge:
    """Return the error for a message that was larger than a limit."""
    found = _TOO_LARGE.search(details)
    if found is None:
        return MessageTooLarge(
            "a compressed reply is larger than the client's limit", hint="set a larger {max_message_bytes=}"
        )
    side, verb, size, limit = found.groups()
    is_request = (side, verb) in {("CLIENT", "Sent"), ("SERVER", "Received")}
    text = f"{'a request' if is_request else 'a reply' if side else 'a message'} of {size} bytes is larger than"
    if side == "CLIENT":
        return MessageTooLarge(
            f"{text} the client's limit of {limit} bytes", hint="set a larger {max_message_bytes=}", option=_LIMIT
        )
    if side == "SERVER":
        return MessageTooLarge(
            f"{text} the server's limit of {limit} bytes",
            hint="set {suggestion} in the client, or start the server with a larger --max-message-bytes",
            option=_LIMIT,
            suggestion={_LIMIT: int(limit)},
        )
    return MessageTooLarge(
        f"{text} the limit of client or server, {limit} bytes", hint="set a larger {max_message_bytes=} on both"
    )


def _cause(details: str) -> str:
    """Return why there is no connection.

    gRPC puts the system's reason last, after states and addresses: "failed to connect to all addresses; last error:
    UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: connect: Connection refused (111)".
    """
    cause = details.rstrip("]").rpartition(":")[2].strip()
    return printable(re.sub(r" \(\d+\)$", "", cause), _LONGEST_CAUSE)
