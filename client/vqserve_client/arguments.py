"""Parsers of single values on the command line, and options that several commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from vqserve.validation import check_digest_form, check_timeout
from vqserve_client.config import DEFAULT_MAX_MESSAGE_BYTES, ClientConfig
from vqserve_client.target import parse_target
from vqserve_client.tls import tls_of_environment

LAYOUTS = ("channels_first", "channels_last")


def add_connection(command: argparse.ArgumentParser) -> None:
    """Add the options for the server's address and the time of a call."""
    command.add_argument(
        "--target",
        metavar="HOST:PORT",
        type=target,
        action=_Joined,
        default=os.environ.get("VQSERVE_TARGET") or "localhost:50051",
        help="the server; for several servers give it several times, or HOST:PORT,HOST:PORT, or a name with several "
        "addresses; unix:PATH for a socket file (VQSERVE_TARGET; default localhost:50051)",
    )
    command.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="SECONDS", help="for a call with its retries (60)"
    )
    _add_access(command)


class _Joined(argparse.Action):
    """Joins the texts of an option that is given several times with commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add a text; the first one replaces the default."""
        given = getattr(namespace, f"given_{self.dest}", ())
        setattr(namespace, f"given_{self.dest}", (*given, values))
        setattr(namespace, self.dest, ",".join((*given, values)))


def connection(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_connection` as arguments of a client.

    Raises:
        InvalidOption: the options of TLS do not fit together.
    """
    given = {name: getattr(args, f"tls_{name}") for name in ("ca", "cert", "key", "server_name")}
    return {
        "target": args.target,
        "timeout": args.timeout,
        "tls": tls_of_environment(switch=args.tls, **given) or False,
        "token_file": args.token_file,
        "insecure": args.insecure,
    }


def _add_access(command: argparse.ArgumentParser) -> None:
    tls = command.add_argument_group("encryption and access")
    tls.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        help="encrypt the connection, with the authorities that the system trusts (VQSERVE_TLS=on)",
    )
    for name, metavar, what in (
        ("ca", "FILE", "certificates of the authorities to trust instead; implies --tls"),
        ("cert", "FILE", "certificate of this client, for a server that asks for one"),
        ("key", "FILE", "its private key"),
        ("server-name", "NAME", "the name that the server's certificate must have, if not the target's"),
    ):
        variable = f"VQSERVE_TLS_{name.replace('-', '_').upper()}"
        tls.add_argument(f"--tls-{name}", metavar=metavar, help=f"{what} ({variable})")
    tls.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the token that the server knows this caller by (VQSERVE_TOKEN_FILE, or the token itself in "
        "VQSERVE_TOKEN)",
    )
    tls.add_argument(
        "--insecure",
        action="store_true",
        help="send a token without encryption to another machine, on a network that you trust",
    )


def add_codebook(command: argparse.ArgumentParser) -> None:
    """Add the options for the codebook and its layout."""
    command.add_argument(
        "--codebook",
        metavar="NAME",
        default=os.environ.get("VQSERVE_CODEBOOK") or None,
        help="name of the codebook (VQSERVE_CODEBOOK; default: the server's only one)",
    )
    command.add_argument(
        "--digest",
        type=digest,
        help="the digest that the codebook must have, or 8 or more of its first digits; without --codebook, it selects "
        "the codebook that has it",
    )
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="where the channels of the latents are (default: the codebook's, or first for images and video, last for "
        "sequences)",
    )


def add_message_limit(command: argparse._ActionsContainer) -> None:
    """Add the option for the largest message."""
    command.add_argument(
        "--max-message-bytes",
        type=integer(1 << 10),
        default=DEFAULT_MAX_MESSAGE_BYTES,
        metavar="N",
        help=f"of a request or a reply; at most what the server takes ({DEFAULT_MAX_MESSAGE_BYTES})",
    )


def add_connections(command: argparse._ActionsContainer) -> None:
    """Add the option for connections to each server."""
    command.add_argument(
        "--connections",
        type=integer(1),
        default=ClientConfig.connections,
        metavar="N",
        help=f"to each server, for one that has N workers ({ClientConfig.connections})",
    )


def add_progress(command: argparse.ArgumentParser, what: str) -> None:
    """Add the option that shows progress."""
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr is not None and sys.stderr.isatty(),
        help=f"{what} on stderr (default: if that is a terminal)",
    )


def integer(least: int) -> Callable[[str], int]:
    """Return a parser of integers that are at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of {least} or more, not {text!r}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Return a positive number of seconds."""
    try:
        return check_timeout(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}") from None


def seconds_or_zero(text: str) -> float:
    """Return a number of seconds that may be 0."""
    return 0.0 if re.fullmatch(r"0+(\.0*)?", text) else seconds(text)


def target(text: str) -> str:
    """Return a server's address."""
    try:
        return parse_target(text).text
    except ValueError as error:
        source = "VQSERVE_TARGET: " if text == os.environ.get("VQSERVE_TARGET") else ""
        raise argparse.ArgumentTypeError(f"{source}{error}") from None


def digest(text: str) -> str:
    """Return a codebook's digest."""
    try:
        check_digest_form(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: `vqserve codebooks --json` has them") from None
    return text
